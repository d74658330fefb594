import matplotlib.style

from callbacks.curves import Curves
from callbacks.frozen_encoder import FrozenEncoder
from callbacks.inspection import Inspection
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.mining_monitor import MiningMonitor
from callbacks.predictions import PredictionWriter
from callbacks.progress import Progress
from callbacks.report import Report
from callbacks.retrieval_monitor import RetrievalMonitor
from callbacks.run_files import RunFiles
from callbacks.run_logger import RunLogger
from callbacks.training_monitor import TrainingMonitor
from callbacks.tsne import TSNE

# Ten colours that colour-blind readers tell apart (M. A. Petroff, 2021); here, since all that draws imports this package.
matplotlib.style.use("petroff10")

__all__ = [
    "Curves",
    "FrozenEncoder",
    "Inspection",
    "LastCheckpoint",
    "MiningMonitor",
    "PredictionWriter",
    "Progress",
    "Report",
    "RetrievalMonitor",
    "RunFiles",
    "RunLogger",
    "TSNE",
    "TrainingMonitor",
]
