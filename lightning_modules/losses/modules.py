"""Losses over the pairs and triplets of a batch, as modules that a config selects by `class_path`.

Every module is called as loss(z, labels, generator) with embeddings `z` (B, D), `labels` (B,) and a CPU generator for
those that draw. A batch without what a loss needs gives 0 and still backpropagates (zero gradients).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from errors import require
from lightning_modules.losses import functional
from lightning_modules.losses.distances import CosineDistance, EuclideanDistance
from lightning_modules.losses.functional import distance_matrix, rows
from lightning_modules.losses.triplets import anchor_blocks, hardest_triplets, random_triplets

Triplets = Literal["random", "hard", "semihard", "all"]


class BatchLoss(nn.Module):
    """What a config can name as `model.loss`. A subclass implements forward(z, labels, generator) → a scalar loss.

    The attributes tell MiningMonitor what to measure by: the distance that the loss compares, its margin or
    temperature, and the value at which it stands still where positives are as far away as negatives.
    """

    distance: nn.Module
    margin: float | None = None
    temperature: float | None = None
    pinned_at: float | None = None

    def __init__(self, distance: nn.Module | None = None) -> None:
        super().__init__()
        self.distance = CosineDistance() if distance is None else distance


class TripletMarginLoss(BatchLoss):
    """max(0, d(a, p) − d(a, n) + margin) over the triplets of a batch.

    Args:
        triplets: `random`: one positive and one negative drawn for every anchor (the report); `hard`: every anchor's
            farthest positive and nearest negative (batch-hard); `all`: mean over every triplet of the batch where the
            loss is above 0; `semihard`: those of them with d(a, n) > d(a, p).
        margin: by how much a negative shall be farther away than a positive, in units of `distance`.
        distance: EuclideanDistance (also for null), CosineDistance or MahalanobisDistance.
    """

    def __init__(self, triplets: Triplets = "random", margin: float = 1.0, distance: nn.Module | None = None) -> None:
        super().__init__(EuclideanDistance() if distance is None else distance)
        _check_margin(self, margin)
        self.triplets, self.margin, self.pinned_at = triplets, margin, margin  # the loss where all embeddings are alike

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.triplets in ("random", "hard"):
            return functional.triplet_margin_loss(*_sampled(self, z, labels, generator), self.margin)
        semihard = self.triplets == "semihard"
        return functional.dense_triplet_margin_loss(z, labels, self.margin, self.distance, semihard)


class SoftMarginTripletLoss(BatchLoss):
    """log(1 + exp(d(a, p) − d(a, n))): a margin without a parameter, which never lets go of a triplet.

    Args:
        triplets: `random` or `hard`, as in TripletMarginLoss.
        distance: EuclideanDistance (also for null), CosineDistance or MahalanobisDistance.
    """

    def __init__(self, triplets: Literal["random", "hard"] = "hard", distance: nn.Module | None = None) -> None:
        super().__init__(EuclideanDistance() if distance is None else distance)
        self.triplets, self.pinned_at = triplets, math.log(2)

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.soft_margin_loss(*_sampled(self, z, labels, generator))


class LMNNLoss(BatchLoss):
    """Large margin nearest neighbour, see `lmnn_loss`: the report's figure 6.

    Args:
        margin: impostors are pushed out of the target neighbour's distance plus this.
        push: μ, the weight of pushing against pulling.
        neighbours: how many of the nearest images of its class each image pulls.
        distance: null for the squared Euclidean distance, or MahalanobisDistance with `squared: true`.
    """

    def __init__(
        self, margin: float = 1.0, push: float = 0.5, neighbours: int = 3, distance: nn.Module | None = None
    ) -> None:
        super().__init__(EuclideanDistance(squared=True) if distance is None else distance)
        _check_margin(self, margin)
        require(0 < push < 1, "LMNNLoss push", push, "between 0 and 1")
        require(neighbours >= 1, "LMNNLoss neighbours", neighbours, "at least 1")
        self.margin, self.push, self.neighbours = margin, push, neighbours

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.lmnn_loss(z, labels, self.margin, self.push, self.neighbours, self.distance)


class _TemperatureLoss(BatchLoss):
    """A loss of exp(cosine similarity / temperature).

    Args:
        temperature: τ; the smaller, the more the hardest pairs weigh.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        require(0 < temperature < math.inf, f"{type(self).__name__} temperature", temperature, "above 0")
        self.temperature = temperature


class MultiNegativeLoss(_TemperatureLoss):
    """Every positive pair against all negatives of the batch at once, see `multi_negative_loss`."""

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.multi_negative_loss(z, labels, self.temperature)


class SupConLoss(_TemperatureLoss):
    """Supervised contrastive loss, see `supcon_loss`; where the labels are numbers of images, the NT-Xent of views.

    Args:
        decoupled: an anchor's positives do not stand among what they are compared with.
    """

    def __init__(self, temperature: float = 0.1, decoupled: bool = False) -> None:
        super().__init__(temperature)
        self.decoupled = decoupled

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.supcon_loss(z, labels, self.temperature, self.decoupled)


class PrototypicalLoss(_TemperatureLoss):
    """Each image against the mean of its class and those of all others in the batch, see `prototypical_loss`.

    Args:
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, temperature: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(temperature)
        require(0 <= label_smoothing < 1, "PrototypicalLoss label_smoothing", label_smoothing, "in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.prototypical_loss(z, labels, self.temperature, self.label_smoothing)


class PairwiseContrastiveLoss(_TemperatureLoss):
    """The report's equation 2, see `pairwise_contrastive_loss`."""

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return functional.pairwise_contrastive_loss(z, labels, self.temperature)


def _sampled(
    loss: BatchLoss, z: Tensor, labels: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the positives and to the negatives of the loss's triplets, and which of these there are, (B,) each.

    Only these distances get a gradient.
    """
    if loss.triplets == "random":
        positives, negatives, valid = random_triplets(labels, generator)
    else:
        with torch.no_grad():
            found = [hardest_triplets(distance_matrix(loss.distance, z, b), labels, b) for b in anchor_blocks(len(z))]
        positives, negatives, valid = (torch.cat(x) for x in zip(*found))
    return loss.distance.pairs(z, rows(z, positives)), loss.distance.pairs(z, rows(z, negatives)), valid


def _check_margin(loss: BatchLoss, margin: float) -> None:
    largest = getattr(loss.distance, "largest", math.inf)  # a distance of the user's own need not say
    why = f", below {largest:g}, the largest {type(loss.distance).__name__} there is" if largest < math.inf else ""
    require(0 < margin < largest, f"{type(loss).__name__} margin", margin, f"above 0{why}")
