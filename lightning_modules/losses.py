"""Losses over the pairs and triplets of a batch: pure functions, and thin modules that a config selects by `class_path`.

Every module is called as loss(z, labels, generator) with embeddings `z` (B, D), `labels` (B,) and a CPU generator for
those that draw. A batch without what a loss needs gives 0 and still backpropagates (zero gradients).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.distances import CosineDistance, EuclideanDistance
from lightning_modules.triplets import active_counts, hardest_triplets, pair_masks, random_triplets


def triplet_margin_loss(positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Mean of max(0, d(a, p) − d(a, n) + margin); distances (T,) each. Schroff et al., "FaceNet", 2015, equation 2."""
    return F.relu(positive - negative + margin).sum() / max(len(positive), 1)


def soft_margin_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of log(1 + exp(d(a, p) − d(a, n))); distances (T,) each. Hermans et al., 2017, section 2."""
    return F.softplus(positive - negative, threshold=50).sum() / max(len(positive), 1)


def dense_triplet_margin_loss(distances: Tensor, labels: Tensor, margin: float, semihard: bool = False) -> Tensor:
    """Mean of max(0, d(a, p) − d(a, n) + margin) over all triplets of the batch where it is above 0.

    The "batch all, ≠ 0" of Hermans et al., 2017, equation 6; `semihard`: over those with d(a, n) > d(a, p) only
    (FaceNet, section 3.2). `distances` (B, B), `labels` (B,). Exact, see `active_counts`.
    """
    counts = active_counts(distances, labels, margin, semihard)
    active = counts.clamp_min(0).sum()
    mean = (counts / active.clamp_min(1)).mul(distances).sum()
    return mean + (active > 0).to(distances.dtype) * margin


def lmnn_loss(distances: Tensor, labels: Tensor, margin: float, push: float, neighbours: int) -> Tensor:
    """Large margin nearest neighbour: pull the target neighbours, push the impostors inside their margin.

    (1 − μ) Σ_{i,j} d(i, j) + μ Σ_{i,j,l} max(0, margin + d(i, j) − d(i, l)), j over the `neighbours` nearest of i's
    class, l over the images of other classes, both divided by the number of pairs (i, j); μ is `push`. K. Weinberger
    & L. Saul, "Distance Metric Learning for Large Margin Nearest Neighbor Classification", 2009, equations 11–13, with
    the target neighbours of the batch. `distances` (B, B) squared Euclidean or Mahalanobis ones, `labels` (B,).
    """
    positive, negative = pair_masks(labels)
    nearest = distances.detach().masked_fill(~positive, float("inf")).topk(min(neighbours, len(labels)), 1, largest=False)
    targets = torch.zeros_like(distances).scatter_(1, nearest.indices, nearest.values.isfinite().to(distances.dtype))
    targets = targets * negative.any(1, keepdim=True)
    counts = active_counts(distances, labels, margin, neighbours=neighbours)
    total = ((1 - push) * targets + push * counts).mul(distances).sum() + push * margin * counts.clamp_min(0).sum()
    return total / targets.sum().clamp_min(1)


def multi_negative_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over anchor–positive pairs of log(1 + Σₙ exp((s_an − s_ap) / τ)), s the cosine similarity.

    `z` (B, D), `labels` (B,). Every negative of the batch stands against each pair: the (N+1)-tuplet loss (K. Sohn,
    "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", 2016, equation 5) on cosine similarity
    with a temperature. O(B²) time and memory: the sum over n does not depend on p, so it is taken once per anchor.
    """
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    positive, negative = pair_masks(labels)
    # An anchor without negatives has an empty sum: logsumexp is −∞, softplus 0, and its gradient must not be NaN.
    anchors = (positive.any(1) & negative.any(1)).nonzero().flatten()
    if not len(anchors):
        return z.sum() * 0
    negatives = similarity[anchors].masked_fill(~negative[anchors], float("-inf")).logsumexp(1, keepdim=True)
    # The threshold behind which softplus(x) counts as x: far enough for float64, before exp overflows float32.
    pairs = F.softplus(negatives - similarity[anchors], threshold=50)
    return pairs.where(positive[anchors], 0).sum() / positive.sum()


def supcon_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over anchors of −1/|P(a)| Σ_p log(exp(s_ap / τ) / Σ_{k ≠ a} exp(s_ak / τ)), s the cosine similarity.

    The paper's L_out, whose mean over the positives stands outside the logarithm (P. Khosla et al., "Supervised
    Contrastive Learning", 2020, equation 2). `z` (B, D), `labels` (B,); anchors without a positive are left out.
    """
    z = F.normalize(z, dim=1)
    classes, members = labels.unique(return_inverse=True)
    sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, members, z)
    positives = (members.bincount(minlength=len(classes)) - 1).to(z.dtype)[members]
    # The sum over positives of s_ap needs no matrix: it is zₐ · (sum of its class − zₐ).
    attraction = (z * (sums[members] - z)).sum(1) / (positives.clamp_min(1) * temperature)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    terms = (logits.logsumexp(1) - attraction).where(positives > 0, 0)
    return terms.sum() / (positives > 0).sum().clamp_min(1)


def prototypical_loss(z: Tensor, labels: Tensor, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """Mean over anchors of the cross-entropy of softmax_c(s(a, m_c) / τ), m_c the mean direction of class c in the batch.

    The anchor itself is left out of its own class's mean, s is the cosine similarity: the softmax loss of L. Wan et al.,
    "Generalized End-to-End Loss for Speaker Verification", 2018, equations 6 and 8, with a fixed temperature, after J.
    Snell et al., "Prototypical Networks", 2017. `label_smoothing` is the share of each label that is spread over the
    batch's classes. `z` (B, D), `labels` (B,); anchors without another image of their class are left out. O(B C) for C
    classes: a triplet's anchor, with one mean for all positives and one for each class of negatives.
    """
    z = F.normalize(z, dim=1)
    classes, members = labels.unique(return_inverse=True)
    sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, members, z)
    # A class whose images point everywhere has a sum near 0: below this length its direction fades instead of turning
    # at once, so that the gradient stays bounded.
    means, others = (F.normalize(x, dim=1, eps=1e-3) for x in (sums, sums[members] - z))
    similarity = (z @ means.T).scatter(1, members[:, None], (z * others).sum(1, keepdim=True))
    terms = F.cross_entropy(similarity / temperature, members, reduction="none", label_smoothing=label_smoothing)
    anchors = members.bincount()[members] > 1
    return terms.where(anchors, 0).sum() / anchors.sum().clamp_min(1)


def pairwise_contrastive_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The report's equation 2: mean of −log p_ij over positive pairs plus mean of −log(1 − p_ij) over negative pairs.

    p_ij = exp(s_ij / τ) / Σ_{k ≠ i} exp(s_ik / τ), s the cosine similarity. `z` (B, D), `labels` (B,).
    """
    positive, negative = pair_masks(labels)
    if not (positive.any() and negative.any()):
        return z.sum() * 0
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    log_sum = logits.logsumexp(1, keepdim=True)
    log_p = logits - log_sum
    # log(1 − p) loses its digits where p nears 1. In each row only the largest p can exceed one half; there it is
    # taken from the sum of all others, log Σ_{k ≠ i, j} − log Σ_{k ≠ i}.
    top = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True) - log_sum
    is_top = torch.zeros_like(negative).scatter_(1, top, True)
    log_rest = torch.where(is_top, others, torch.log1p(-log_p.masked_fill(is_top, float("-inf")).exp()))
    # −∞ on the diagonal, and behind `where` it would still reach the gradient as 0 · ∞.
    attract = log_p.masked_fill(~positive, 0).sum() / positive.sum()
    return -attract - log_rest.masked_fill(~negative, 0).sum() / negative.sum()


class BatchLoss(nn.Module):
    """What a config can name as `model.loss`. A subclass implements forward(z, labels, generator) → loss, no dimensions.

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

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError


class TripletMarginLoss(BatchLoss):
    """max(0, d(a, p) − d(a, n) + margin) over the triplets of a batch.

    Args:
        triplets: `random`: one positive and one negative drawn for every anchor (the report); `hard`: every anchor's
            farthest positive and nearest negative (batch-hard); `all`: mean over every triplet of the batch where the
            loss is above 0; `semihard`: those of them with d(a, n) > d(a, p).
        margin: by how much a negative shall be farther away than a positive, in units of `distance`.
        distance: EuclideanDistance (also for null), CosineDistance or MahalanobisDistance.
    """

    def __init__(
        self,
        triplets: Literal["random", "hard", "semihard", "all"] = "random",
        margin: float = 1.0,
        distance: nn.Module | None = None,
    ) -> None:
        super().__init__(EuclideanDistance() if distance is None else distance)
        self.margin, self.triplets = _margin(self, margin), triplets
        self.pinned_at = self.margin  # the loss where all embeddings are alike

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.triplets in ("all", "semihard"):
            return dense_triplet_margin_loss(self.distance.matrix(z), labels, self.margin, self.triplets == "semihard")
        return triplet_margin_loss(*_sampled(self, z, labels, generator), self.margin)


class SoftMarginTripletLoss(BatchLoss):
    """log(1 + exp(d(a, p) − d(a, n))): a margin without a parameter, which never lets go of a triplet.

    Args:
        triplets: `random` or `hard`, as in TripletMarginLoss.
        distance: EuclideanDistance (also for null), CosineDistance or MahalanobisDistance.
    """

    def __init__(self, triplets: Literal["random", "hard"] = "hard", distance: nn.Module | None = None) -> None:
        super().__init__(EuclideanDistance() if distance is None else distance)
        self.triplets = triplets
        self.pinned_at = math.log(2)

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return soft_margin_loss(*_sampled(self, z, labels, generator))


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
        if not 0 < push < 1:
            raise InputError(f"LMNNLoss push {push}: must be between 0 and 1")
        if neighbours < 1:
            raise InputError(f"LMNNLoss neighbours {neighbours}: must be at least 1")
        self.margin, self.push, self.neighbours = _margin(self, margin), push, neighbours

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return lmnn_loss(self.distance.matrix(z), labels, self.margin, self.push, self.neighbours)


class MultiNegativeLoss(BatchLoss):
    """Every positive pair against all negatives of the batch at once, see `multi_negative_loss`."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _temperature(self, temperature)

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return multi_negative_loss(z, labels, self.temperature)


class SupConLoss(BatchLoss):
    """Supervised contrastive loss, see `supcon_loss`."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _temperature(self, temperature)

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return supcon_loss(z, labels, self.temperature)


class PrototypicalLoss(BatchLoss):
    """Each image against the mean of its class and those of all others in the batch, see `prototypical_loss`."""

    def __init__(self, temperature: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise InputError(f"PrototypicalLoss label_smoothing {label_smoothing}: must be in [0, 1)")
        self.temperature, self.label_smoothing = _temperature(self, temperature), label_smoothing

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return prototypical_loss(z, labels, self.temperature, self.label_smoothing)


class PairwiseContrastiveLoss(BatchLoss):
    """The report's equation 2, see `pairwise_contrastive_loss`."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _temperature(self, temperature)

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return pairwise_contrastive_loss(z, labels, self.temperature)


def _sampled(loss: BatchLoss, z: Tensor, labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Distances (T,) to the positives and to the negatives of the loss's triplets. Only these get a gradient."""
    if loss.triplets == "random":
        anchors, positives, negatives = random_triplets(labels, generator)
    else:
        with torch.no_grad():
            matrix = loss.distance.matrix(z)
        anchors, positives, negatives = hardest_triplets(matrix, labels)
    return loss.distance.pairs(z[anchors], z[positives]), loss.distance.pairs(z[anchors], z[negatives])


def _margin(loss: BatchLoss, margin: float) -> float:
    largest = getattr(loss.distance, "largest", math.inf)  # a distance of the user's own need not say
    if not 0 < margin < largest:
        why = f", below {largest:g}, the largest {type(loss.distance).__name__} there is" if largest < math.inf else ""
        raise InputError(f"{type(loss).__name__} margin {margin}: must be above 0{why}")
    return margin


def _temperature(loss: BatchLoss, temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise InputError(f"{type(loss).__name__} temperature {temperature}: must be above 0")
    return temperature
