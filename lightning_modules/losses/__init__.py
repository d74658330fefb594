"""Losses over the pairs and triplets of a batch: modules for a config, pure functions below them."""

from lightning_modules.losses.distances import CosineDistance, EuclideanDistance, MahalanobisDistance
from lightning_modules.losses.modules import (
    BatchLoss,
    LMNNLoss,
    MultiNegativeLoss,
    PairwiseContrastiveLoss,
    PrototypicalLoss,
    SoftMarginTripletLoss,
    SupConLoss,
    TripletMarginLoss,
)
