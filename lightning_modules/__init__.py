from lightning_modules.distances import CosineDistance, EuclideanDistance, MahalanobisDistance
from lightning_modules.encoders import ReportEncoder
from lightning_modules.fast_encoder import FastEncoder
from lightning_modules.losses import (
    BatchLoss,
    LMNNLoss,
    MultiNegativeLoss,
    PairwiseContrastiveLoss,
    PrototypicalLoss,
    SoftMarginTripletLoss,
    SupConLoss,
    TripletMarginLoss,
)
from lightning_modules.probe_grid import LinearProbeGrid
from lightning_modules.probes import LinearProbe, MLPProbe
from lightning_modules.regression import LogisticRegression, SoftmaxRegression
from lightning_modules.supervised_encoder import SupervisedEncoder
from lightning_modules.torchvision_encoder import TorchvisionEncoder
from lightning_modules.triplet_encoder import TripletEncoder

__all__ = [
    "BatchLoss",
    "CosineDistance",
    "EuclideanDistance",
    "FastEncoder",
    "LMNNLoss",
    "LinearProbe",
    "LinearProbeGrid",
    "LogisticRegression",
    "MLPProbe",
    "MahalanobisDistance",
    "MultiNegativeLoss",
    "PairwiseContrastiveLoss",
    "PrototypicalLoss",
    "ReportEncoder",
    "SoftMarginTripletLoss",
    "SoftmaxRegression",
    "SupConLoss",
    "SupervisedEncoder",
    "TorchvisionEncoder",
    "TripletEncoder",
    "TripletMarginLoss",
]
