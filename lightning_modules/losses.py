"""Losses over the triplets of a batch: pure functions, and thin modules that a config selects by `class_path`.

A triplet is an anchor, a positive with the anchor's label (not the anchor itself), and a negative with another label.
A batch without any gives a loss of 0 that still backpropagates (zero gradients).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError


def random_triplets(labels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative drawn uniformly for every anchor that has both.

    `labels` (B,) → indices (anchors, positives, negatives), each (T,), T ≤ B. `generator` is a CPU generator, so that
    the draw does not depend on the device.
    """
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    anchors = (positive.any(1) & ~same.all(1)).nonzero().flatten()
    noise = torch.rand(2, len(labels), len(labels), generator=generator).to(labels.device)[:, anchors]
    chosen = [noise[i].masked_fill(~mask[anchors], -1).argmax(1) for i, mask in enumerate((positive, ~same))]
    return anchors, *chosen


def triplet_margin_loss(z: Tensor, triplets: tuple[Tensor, Tensor, Tensor], margin: float) -> Tensor:
    """Mean over triplets of max(0, d(a, p) − d(a, n) + margin), d the Euclidean distance.

    `z` (B, D) embeddings; three (T,) index tensors. Schroff et al., "FaceNet", 2015, equation 2, with plain instead
    of squared distances, as in torch.nn.TripletMarginLoss and the report.
    """
    anchors, positives, negatives = triplets
    if not len(anchors):
        return z.sum() * 0
    return F.triplet_margin_loss(z[anchors], z[positives], z[negatives], margin=margin)


def multi_negative_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over anchor–positive pairs of log(1 + Σₙ exp((s_an − s_ap) / τ)), s the cosine similarity.

    `z` (B, D), `labels` (B,). Every negative of the batch stands against each pair: the (N+1)-tuplet loss (K. Sohn,
    "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", 2016, equation 5) on cosine similarity
    with a temperature. O(B²) time and memory: the sum over n does not depend on p, so it is taken once per anchor.
    """
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # An anchor without negatives has an empty sum: logsumexp is −∞, softplus 0, and its gradient must not be NaN.
    anchors = (positive.any(1) & ~same.all(1)).nonzero().flatten()
    if not len(anchors):
        return z.sum() * 0
    negatives = similarity[anchors].masked_fill(same[anchors], float("-inf")).logsumexp(1, keepdim=True)
    # The threshold behind which softplus(x) counts as x: far enough for float64, before exp overflows float32.
    pairs = F.softplus(negatives - similarity[anchors], threshold=50)
    return pairs.where(positive[anchors], 0).sum() / positive.sum()


class RandomTripletMarginLoss(nn.Module):
    """The report's loss: for every anchor one random positive and one random negative of the batch, with a margin."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        if not margin > 0:
            raise InputError(f"RandomTripletMarginLoss margin {margin}: must be above 0")
        self.margin = margin

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return triplet_margin_loss(z, random_triplets(labels, generator), self.margin)


class MultiNegativeLoss(nn.Module):
    """Every positive pair against all negatives of the batch at once, see `multi_negative_loss`."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"MultiNegativeLoss temperature {temperature}: must be above 0")
        self.temperature = temperature

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return multi_negative_loss(z, labels, self.temperature)
