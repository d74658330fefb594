from callbacks.curves import Curves
from callbacks.frozen_encoder import FrozenEncoder
from callbacks.predictions import PredictionWriter
from callbacks.run_files import RunFiles
from callbacks.run_logger import RunLogger
from callbacks.tsne import TSNE

__all__ = ["Curves", "FrozenEncoder", "PredictionWriter", "RunFiles", "RunLogger", "TSNE"]
