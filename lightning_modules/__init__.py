from lightning_modules.encoders import FastEncoder, ReportEncoder
from lightning_modules.losses import MultiNegativeLoss, RandomTripletMarginLoss
from lightning_modules.probes import LinearProbe, MLPProbe
from lightning_modules.regression import LogisticRegression, SoftmaxRegression
from lightning_modules.supervised_encoder import SupervisedEncoder
from lightning_modules.triplet_encoder import TripletEncoder

__all__ = [
    "FastEncoder",
    "LinearProbe",
    "LogisticRegression",
    "MLPProbe",
    "MultiNegativeLoss",
    "RandomTripletMarginLoss",
    "ReportEncoder",
    "SoftmaxRegression",
    "SupervisedEncoder",
    "TripletEncoder",
]
