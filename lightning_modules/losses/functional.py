"""The losses over the pairs and triplets of a batch, as pure functions of embeddings `z` (B, D) and `labels` (B,).

A batch without what a loss needs gives 0 and still backpropagates (zero gradients). A matrix of pairs of more than
`triplets.MATRIX` elements is never held: larger batches are worked on in blocks of anchors, with the same result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.losses.distances import unit
from lightning_modules.losses.triplets import MATRIX, Classes, active_counts, anchor_blocks, pair_masks


def triplet_margin_loss(positive: Tensor, negative: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Mean of max(0, d(a, p) − d(a, n) + margin) over the `valid` triplets; distances and `valid`, (T,) each.

    Schroff et al., "FaceNet", 2015, equation 2.
    """
    return F.relu(positive - negative + margin).where(valid, 0).sum() / valid.sum().clamp_min(1)


def soft_margin_loss(positive: Tensor, negative: Tensor, valid: Tensor) -> Tensor:
    """Mean of log(1 + exp(d(a, p) − d(a, n))) over the `valid` triplets; distances and `valid`, (T,) each.

    Hermans et al., 2017, section 2.
    """
    return F.softplus(positive - negative, threshold=50).where(valid, 0).sum() / valid.sum().clamp_min(1)


def dense_triplet_margin_loss(
    z: Tensor, labels: Tensor, margin: float, distance: nn.Module, semihard: bool = False
) -> Tensor:
    """Mean of max(0, d(a, p) − d(a, n) + margin) over all triplets of the batch where it is above 0.

    The "batch all, ≠ 0" of Hermans et al., 2017, equation 6; `semihard`: over those with d(a, n) > d(a, p) only
    (FaceNet, section 3.2). `z` (B, D), `labels` (B,). Exact, see `active_counts`.
    """

    def terms(z: Tensor, block: slice) -> tuple[Tensor, ...]:
        distances = distance_matrix(distance, z, block)
        counts = active_counts(distances, labels, margin, semihard, block=block)
        return counts.mul(distances).sum(), counts.clamp_min(0).sum()

    total, active = _summed(terms, z)
    return total / active.clamp_min(1) + (active > 0).to(z.dtype) * margin


def lmnn_loss(z: Tensor, labels: Tensor, margin: float, push: float, neighbours: int, distance: nn.Module) -> Tensor:
    """Large margin nearest neighbour: pull the target neighbours, push the impostors inside their margin.

    (1 − μ) Σ_{i,j} d(i, j) + μ Σ_{i,j,l} max(0, margin + d(i, j) − d(i, l)), j over the `neighbours` nearest of
    i's class, l over the images of other classes, both divided by the number of pairs (i, j); μ is `push`. K.
    Weinberger & L. Saul, "Distance Metric Learning for Large Margin Nearest Neighbor Classification", 2009,
    equations 11–13, with the batch's target neighbours. `distance` is the squared Euclidean or Mahalanobis one, `z`
    (B, D), `labels` (B,).
    """

    def terms(z: Tensor, block: slice) -> tuple[Tensor, ...]:
        distances = distance_matrix(distance, z, block)
        positive, negative = pair_masks(labels, block)
        nearest = (
            distances.detach().masked_fill(~positive, float("inf")).topk(min(neighbours, len(labels)), 1, largest=False)
        )
        targets = torch.zeros_like(distances).scatter_(
            1, nearest.indices, nearest.values.isfinite().to(distances.dtype)
        )
        targets = targets * negative.any(1, keepdim=True)
        counts = active_counts(distances, labels, margin, neighbours=neighbours, block=block)
        total = ((1 - push) * targets + push * counts).mul(distances).sum() + push * margin * counts.clamp_min(0).sum()
        return total, targets.sum()

    total, pairs = _summed(terms, z)
    return total / pairs.clamp_min(1)


def multi_negative_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over anchor–positive pairs of log(1 + Σₙ exp((s_an − s_ap) / τ)), s the cosine similarity.

    `z` (B, D), `labels` (B,). Every negative of the batch stands against each pair: the (N+1)-tuplet loss (K. Sohn,
    "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", 2016, equation 5) on cosine similarity
    with a temperature. O(B²) time and memory: the sum over n does not depend on p, so it is taken once per anchor.
    """

    def terms(z: Tensor, block: slice) -> tuple[Tensor, ...]:
        similarity = z[block] @ z.T / temperature
        positive, negative = pair_masks(labels, block)
        # An anchor without negatives has an empty sum, whose gradient would be NaN: it gets all images for negatives,
        # and its pairs are left out.
        alone = ~negative.any(1, keepdim=True)
        negatives = similarity.masked_fill(~(negative | alone), float("-inf")).logsumexp(1, keepdim=True)
        # The threshold behind which softplus(x) counts as x: far enough for float64, before exp overflows float32.
        pairs = F.softplus(negatives - similarity, threshold=50)
        return pairs.where(positive & ~alone, 0).sum(), positive.sum()

    total, pairs = _summed(terms, unit(z))
    return total / pairs.clamp_min(1)


def supcon_loss(z: Tensor, labels: Tensor, temperature: float, decoupled: bool = False) -> Tensor:
    """Mean over anchors of −1/|P(a)| Σ_p log(exp(s_ap / τ) / Σ_{k ≠ a} exp(s_ak / τ)), s the cosine similarity.

    The paper's L_out, whose mean over the positives stands outside the logarithm (P. Khosla et al., "Supervised
    Contrastive Learning", 2020, equation 2). For labels that number images and two views of each it is NT-Xent (T. Chen
    et al., 2020, equation 1). `decoupled`: the sum is over the anchor's negatives alone (C.-H. Yeh et al., "Decoupled
    Contrastive Learning", 2022, equation 6), which also can be below 0. `z` (B, D), `labels` (B,); anchors without a
    positive are left out, and without a negative where these alone are summed.
    """
    z = unit(z)
    members, one_hot, sizes = _classes(z, labels)
    positives = (sizes - 1)[members]
    anchors = positives > 0
    if decoupled:
        anchors = anchors & (positives < len(z) - 1)
    # The sum over positives of s_ap needs no matrix: it is zₐ · (sum of its class − zₐ).
    attraction = (z * (one_hot.T @ (one_hot @ z) - z)).sum(1) / (positives.clamp_min(1) * temperature)

    def terms(z: Tensor, block: slice) -> tuple[Tensor, ...]:
        logits = z[block] @ z.T / temperature
        there = anchors[block]
        if decoupled:  # an anchor without negatives is left out; an empty sum's gradient would be NaN
            logits = logits.masked_fill((labels[block, None] == labels) & there[:, None], float("-inf"))
        logits.diagonal(block.start).fill_(float("-inf"))
        return ((logits.logsumexp(1) - attraction[block]).where(there, 0).sum(),)

    (total,) = _summed(terms, z)
    return total / anchors.sum().clamp_min(1)


def prototypical_loss(z: Tensor, labels: Tensor, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """Mean over anchors of the cross-entropy of softmax_c(s(a, m_c) / τ), m_c the mean direction of class c.

    The anchor is left out of its own class's mean, s is the cosine similarity: the softmax loss of L. Wan et al.,
    "Generalized End-to-End Loss for Speaker Verification", 2018, equations 6 and 8, with a fixed temperature, after J.
    Snell et al., "Prototypical Networks", 2017. `label_smoothing` is the share of each label that is spread over the
    batch's classes. `z` (B, D), `labels` (B,); anchors without another image of their class are left out. O(B C) for C
    classes (on a GPU O(B²), see `_classes`): a triplet's anchor, with one mean for all positives and one for each
    class of negatives.
    """
    z = unit(z)
    members, one_hot, sizes = _classes(z, labels)
    sums = one_hot @ z
    # A class whose images point everywhere has a sum near 0: below this length its direction fades instead of turning
    # at once, so the gradient stays bounded. The bound multiplies with that of z, hence not as small a length.
    means, others = (unit(x, shortest=0.1) for x in (sums, one_hot.T @ sums - z))
    similarity = (z @ means.T).scatter(1, members[:, None], (z * others).sum(1, keepdim=True)) / temperature
    there = sizes > 0
    log_p = similarity.masked_fill(~there, float("-inf")).log_softmax(1)
    every = log_p.where(there, 0).sum(1) / there.sum()
    terms = (label_smoothing - 1) * log_p.gather(1, members[:, None]).squeeze(1) - label_smoothing * every
    anchors = sizes[members] > 1
    return terms.where(anchors, 0).sum() / anchors.sum().clamp_min(1)


def pairwise_contrastive_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The report's equation 2: mean of −log p_ij over positive pairs, plus of −log(1 − p_ij) over negative ones.

    p_ij = exp(s_ij / τ) / Σ_{k ≠ i} exp(s_ik / τ), s the cosine similarity. `z` (B, D), `labels` (B,).
    """

    def terms(z: Tensor, block: slice) -> tuple[Tensor, ...]:
        positive, negative = pair_masks(labels, block)
        logits = z[block] @ z.T / temperature
        logits.diagonal(block.start).fill_(float("-inf"))
        log_sum = logits.logsumexp(1, keepdim=True)
        log_p = logits - log_sum
        # log(1 − p) loses its digits where p nears 1. In each row only the largest p can exceed one half; there it is
        # taken from the sum of all others, log Σ_{k ≠ i, j} − log Σ_{k ≠ i}.
        top = logits.argmax(1, keepdim=True)
        others = logits.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True) - log_sum
        is_top = torch.zeros_like(negative).scatter_(1, top, True)
        log_rest = torch.where(is_top, others, torch.log1p(-log_p.masked_fill(is_top, float("-inf")).exp()))
        # −∞ on the diagonal, and behind `where` it would still reach the gradient as 0 · ∞.
        attract, repel = log_p.masked_fill(~positive, 0).sum(), log_rest.masked_fill(~negative, 0).sum()
        return attract, repel, positive.sum(), negative.sum()

    if len(z) < 2:
        return z.sum() * 0
    attract, repel, positives, negatives = _summed(terms, unit(z))
    loss = -attract / positives.clamp_min(1) - repel / negatives.clamp_min(1)
    return loss.where((positives > 0) & (negatives > 0), 0)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context, z: Tensor, index: Tensor) -> Tensor:
        context.save_for_backward(index)
        context.size = len(z)
        return z.index_select(0, index)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = context.saved_tensors
        total, images = 0, torch.arange(context.size, device=index.device)[:, None]
        for part, own in zip(*(x.split(max(1, MATRIX // context.size)) for x in (gradient, index))):
            total = total + (own == images).to(part.dtype) @ part
        return total, None


def rows(z: Tensor, index: Tensor) -> Tensor:
    """z[index], (N, D) and (T,) → (T, D), with a gradient that has the same bits every time.

    That of indexing is added up in the order in which a CPU's threads come, and those of indexing and of embeddings in
    that of a GPU's. There it is a product with the matrix of which row was taken where.
    """
    return F.embedding(index, z) if z.device.type == "cpu" else _Rows.apply(z, index)


def _classes(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The number (B,) of each image's class among C, the matrix (C, B) of which image is in which, their sizes (C,).

    C is the number of the batch's classes. On a GPU, where asking for it would mean waiting, it is B, and most classes
    are empty; but for a batch whose matrix would be too large.
    """
    known = z.device.type == "cpu" or len(z) ** 2 > MATRIX
    members, classes = number_classes(labels) if known else numbered_by_place(labels)
    one_hot = (members == torch.arange(classes, device=z.device)[:, None]).to(z.dtype)
    return members, one_hot, one_hot.sum(1)


def number_classes(labels: Tensor) -> tuple[Tensor, int]:
    """The number (B,) of each image's class, from 0 on, and how many classes there are."""
    classes, members = labels.unique(return_inverse=True)
    return members, len(classes)


def numbered_by_place(labels: Tensor) -> tuple[Tensor, int]:
    """The same without asking a GPU: a class's number is its first place among the labels in order."""
    return Classes.of(labels).start, len(labels)


def _summed(terms: Callable[[Tensor, slice], tuple[Tensor, ...]], z: Tensor) -> list[Tensor]:
    """The sums of `terms(z, block)` over all blocks of anchors. Of several, each is computed once more for the gradient
    instead of being kept."""
    blocks = anchor_blocks(len(z))
    if len(blocks) == 1:
        return list(terms(z, blocks[0]))
    found = [checkpoint(terms, z, block, use_reentrant=False) for block in blocks]
    return [torch.stack(x).sum(0) for x in zip(*found)]


def distance_matrix(distance: nn.Module, z: Tensor, block: slice) -> Tensor:
    """Distances (A, B) of the anchors in `block`; a distance that knows whole matrices alone serves up to that size."""
    return distance.matrix(z) if block == slice(0, len(z)) else distance.matrix(z, block)
