"""Which triplets of a batch count: drawn, hardest, or all of them without ever listing them.

A triplet is an anchor, a positive with the anchor's label (not the anchor itself), and a negative with another label.
"""

import torch
from torch import Tensor

ROW_BLOCK = 2**21  # elements of the distance matrix worked on at once


def pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """`labels` (B,) → masks (B, B): [a, j] whether j is a positive of a, and whether j is a negative of a."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def random_triplets(labels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative drawn uniformly for every anchor that has both.

    `labels` (B,) → indices (anchors, positives, negatives), each (T,), T ≤ B. `generator` is a CPU generator, so that
    the draw does not depend on the device.
    """
    masks = pair_masks(labels)
    anchors = (masks[0].any(1) & masks[1].any(1)).nonzero().flatten()
    noise = torch.rand(2, len(labels), len(labels), generator=generator).to(labels.device)[:, anchors]
    positives, negatives = (noise[i].masked_fill(~mask[anchors], -1).argmax(1) for i, mask in enumerate(masks))
    return anchors, positives, negatives


@torch.no_grad()
def hardest_triplets(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The farthest positive and the nearest negative of every anchor that has both (A. Hermans et al., "In Defense of
    the Triplet Loss for Person Re-Identification", 2017, equation 5).

    `distances` (B, B), `labels` (B,) → indices (anchors, positives, negatives), each (T,), T ≤ B.
    """
    positive, negative = pair_masks(labels)
    anchors = (positive.any(1) & negative.any(1)).nonzero().flatten()
    farthest = distances.masked_fill(~positive, float("-inf")).argmax(1)
    nearest = distances.masked_fill(~negative, float("inf")).argmin(1)
    return anchors, farthest[anchors], nearest[anchors]


@torch.no_grad()
def active_counts(
    distances: Tensor, labels: Tensor, margin: float, semihard: bool = False, neighbours: int | None = None
) -> Tensor:
    """How many active triplets each pair is part of: (B, B), n for an anchor and its positive, −n for a negative.

    A triplet is active where d(a, p) − d(a, n) + margin > 0, with `semihard` only where also d(a, n) > d(a, p);
    `neighbours` keeps the nearest so many positives of each anchor. `distances` (B, B), `labels` (B,).

    The hinge summed over the active triplets is piecewise linear in the distances: Σ counts · d + margin · T, with T
    triplets. So the counts are all there is to know, value and gradient, of up to B³ triplets. They follow from the
    ranks of each negative among the anchor's sorted positives: O(B² log B) time, O(B²) memory.
    """
    size, order = len(labels), labels.argsort()
    grouped, counts = distances.detach()[order][:, order], torch.zeros_like(distances)
    stop = 0
    for members in labels[order].unique_consecutive(return_counts=True)[1].tolist():
        start, stop = stop, stop + members
        step = max(1, ROW_BLOCK // size)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = grouped[first:last]
            positives = rows[:, start:stop].clone()
            positives.diagonal(first - start).fill_(float("-inf"))  # the anchor itself: first in order, never active
            positives, places = positives.sort(1)
            if neighbours is not None:
                positives, places = positives[:, : neighbours + 1], places[:, : neighbours + 1]
            negatives = torch.cat([rows[:, :start], rows[:, stop:]], dim=1)
            # Of the sorted positives, those behind `at` reach over this negative; so do, seen from a positive,
            # the negatives whose `at` is no larger than its place.
            at = torch.searchsorted(positives + margin, negatives, right=True)
            upto = at.new_full((), positives.shape[1])
            by_positive = _negatives_up_to(at, positives.shape[1])
            if semihard:
                upto = torch.searchsorted(positives, negatives)
                by_positive -= _negatives_up_to(upto, positives.shape[1])
            by_negative = (at - upto).to(counts.dtype)
            counts[first:last, start:stop].scatter_(1, places, by_positive.to(counts.dtype))
            counts[first:last, :start] = by_negative[:, :start]
            counts[first:last, stop:] = by_negative[:, start:]
    back = order.argsort()
    return counts[back][:, back]


def _negatives_up_to(ranks: Tensor, places: int) -> Tensor:
    """`ranks` (R, N) in 0..places → (R, places): [r, i] how many of row r are ≤ i."""
    rows = torch.arange(len(ranks), device=ranks.device)[:, None] * (places + 1)
    histogram = (ranks + rows).flatten().bincount(minlength=len(ranks) * (places + 1))
    return histogram.view(len(ranks), places + 1).cumsum(1)[:, :-1]
