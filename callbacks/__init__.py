"""Callback subclasses, one a file; `figures.py` draws for them."""

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.curves import Curves
from callbacks.frozen_encoder import FrozenEncoder
from callbacks.inspection import Inspection
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.mining_monitor import MiningMonitor
from callbacks.model_parts import ModelParts
from callbacks.prediction_writer import PredictionWriter
from callbacks.progress import Progress
from callbacks.report import Report
from callbacks.retrieval_monitor import RetrievalMonitor
from callbacks.run_files import RunFiles
from callbacks.training_monitor import TrainingMonitor
from callbacks.tsne import TSNE
from callbacks.view_sheet import ViewSheet

# Those whose options the command line has, as `--<class in snake case>.<option>`; what does not apply to a stage does
# nothing there. The command line adds Progress, ModelParts and RunFiles by itself.
NAMED = (
    BestCheckpoint, LastCheckpoint, FrozenEncoder, Curves, TrainingMonitor, MiningMonitor, RetrievalMonitor, TSNE,
    ViewSheet, Inspection, PredictionWriter, Report,
)  # fmt: skip
