from lightning_modules.encoders import FastEncoder, ReportEncoder, TorchvisionEncoder
from lightning_modules.losses import (
    BatchLoss,
    CosineDistance,
    EuclideanDistance,
    LMNNLoss,
    MahalanobisDistance,
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
