"""Which triplets of a batch count: drawn, hardest, or all of them without ever listing them.

A triplet is an anchor, a positive with the anchor's label (not the anchor itself), and a negative with another label.
"""

import torch
from torch import Tensor

MATRIX = 2**26  # elements of the largest matrix of pairs; larger batches are worked on in blocks of anchors
ROW_BLOCK = 2**21  # elements of it that are sorted at once


def anchor_blocks(size: int) -> list[slice]:
    """The rows of a (B, B) matrix of pairs, B = `size`, in runs of at most MATRIX elements: one run up to B = 8192."""
    step = max(1, MATRIX // size)
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def pair_masks(labels: Tensor, anchors: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """`labels` (B,) → masks (A, B) for the A `anchors`: [a, j] whether j is a positive of a, and a negative of a."""
    same = labels[anchors, None] == labels
    negative = ~same
    same.diagonal(anchors.start or 0).fill_(False)
    return same, negative


def random_triplets(labels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative drawn uniformly for every anchor that has both.

    `labels` (B,) → indices (anchors, positives, negatives), each (T,), T ≤ B. `generator` is a CPU generator, so that
    the draw does not depend on the device.
    """
    found = []
    for block in anchor_blocks(len(labels)):
        masks = pair_masks(labels, block)
        valid = (masks[0].any(1) & masks[1].any(1)).nonzero().flatten()
        noise = torch.rand(2, len(masks[0]), len(labels), generator=generator).to(labels.device)[:, valid]
        drawn = (noise[i].masked_fill(~mask[valid], -1).argmax(1) for i, mask in enumerate(masks))
        found.append((valid + block.start, *drawn))
    return tuple(torch.cat(x) for x in zip(*found))


@torch.no_grad()
def hardest_triplets(distances: Tensor, labels: Tensor, block: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """The farthest positive and the nearest negative of every anchor that has both (A. Hermans et al., "In Defense of
    the Triplet Loss for Person Re-Identification", 2017, equation 5).

    `distances` (A, B) of the A anchors in `block`, `labels` (B,) → indices (anchors, positives, negatives), each (T,),
    T ≤ A.
    """
    positive, negative = pair_masks(labels, block)
    valid = (positive.any(1) & negative.any(1)).nonzero().flatten()
    farthest = distances.masked_fill(~positive, float("-inf")).argmax(1)
    nearest = distances.masked_fill(~negative, float("inf")).argmin(1)
    return valid + (block.start or 0), farthest[valid], nearest[valid]


@torch.no_grad()
def active_counts(
    distances: Tensor,
    labels: Tensor,
    margin: float,
    semihard: bool = False,
    neighbours: int | None = None,
    block: slice = slice(None),
) -> Tensor:
    """How many active triplets each pair is part of: (A, B), n for an anchor and its positive, −n for a negative.

    A triplet is active where d(a, p) − d(a, n) + margin > 0, with `semihard` only where also d(a, n) > d(a, p);
    `neighbours` keeps the nearest so many positives of each anchor. `distances` (A, B) of the A anchors in `block`,
    `labels` (B,).

    The hinge summed over the active triplets is piecewise linear in the distances: Σ counts · d + margin · T, with T
    triplets. So the counts are all there is to know, value and gradient, of up to B³ triplets. They follow from the
    ranks of each negative among the anchor's sorted positives: O(B² log B) time, O(B²) memory.
    """
    order, counts = labels.argsort(), torch.zeros_like(distances)
    place = order.argsort()  # of each image among those sorted by class
    anchors = place[block].argsort()
    grouped, own = distances.detach()[anchors][:, order], place[block][anchors]
    ends = labels[order].unique_consecutive(return_counts=True)[1].cumsum(0)
    bounds = [[0, *x.tolist()] for x in (ends, torch.searchsorted(own, ends))]
    for (start, stop), (first_anchor, last_anchor) in zip(*(zip(b, b[1:]) for b in bounds)):
        step = max(1, ROW_BLOCK // len(labels))
        for first in range(first_anchor, last_anchor, step):
            part = slice(first, min(first + step, last_anchor))
            _count(counts[part], grouped[part], own[part], start, stop, margin, semihard, neighbours)
    return counts[anchors.argsort()][:, place]


def _count(
    counts: Tensor,
    rows: Tensor,
    own: Tensor,
    start: int,
    stop: int,
    margin: float,
    semihard: bool,
    neighbours: int | None,
) -> None:
    """Fills `counts` (R, B) for R anchors of the class in columns `start` to `stop` of the distances `rows` (R, B).

    `own` (R,) are the columns of the anchors themselves.
    """
    # The anchor itself comes first in order and is never active.
    positives = rows[:, start:stop].scatter(1, own[:, None] - start, float("-inf"))
    positives, places = positives.sort(1)
    if neighbours is not None:
        positives, places = positives[:, : neighbours + 1], places[:, : neighbours + 1]
    negatives = torch.cat([rows[:, :start], rows[:, stop:]], dim=1)
    # Of the sorted positives, those behind `at` reach over this negative; so do, seen from a positive, the negatives
    # whose `at` is no larger than its place.
    at = torch.searchsorted(positives + margin, negatives, right=True)
    upto = at.new_full((), positives.shape[1])
    by_positive = _negatives_up_to(at, positives.shape[1])
    if semihard:  # without the positives that are farther away than this negative
        upto = torch.searchsorted(positives, negatives)
        by_positive -= _negatives_up_to(upto, positives.shape[1])
    by_negative = (at - upto).to(counts.dtype)
    counts[:, start:stop].scatter_(1, places, by_positive.to(counts.dtype))
    counts[:, :start] = by_negative[:, :start]
    counts[:, stop:] = by_negative[:, start:]


def _negatives_up_to(ranks: Tensor, places: int) -> Tensor:
    """`ranks` (R, N) in 0..places → (R, places): [r, i] how many of row r are ≤ i."""
    rows = torch.arange(len(ranks), device=ranks.device)[:, None] * (places + 1)
    histogram = (ranks + rows).flatten().bincount(minlength=len(ranks) * (places + 1))
    return histogram.view(len(ranks), places + 1).cumsum(1)[:, :-1]
