"""Stages, encoders, losses and distances: what a config can name."""

from lightning_modules.encoder_stage import EncoderStage
from lightning_modules.encoders import FastEncoder, RandomPatches, ReportEncoder, TorchvisionEncoder
from lightning_modules.fine_tune import FineTune
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
from lightning_modules.probe import LinearProbe, MLPProbe, Probe
from lightning_modules.probe_grid import LinearProbeGrid
from lightning_modules.regression import LogisticRegression, SoftmaxRegression
from lightning_modules.stage import Stage
from lightning_modules.supervised_encoder import SupervisedEncoder
from lightning_modules.triplet_encoder import TripletEncoder
