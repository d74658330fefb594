"""Which triplets of a batch count: drawn, hardest, or all of them without ever listing them.

A triplet is an anchor, a positive with the anchor's label (not the anchor itself), and a negative with another label.
No function here asks a GPU for a number, so the host never waits: shapes depend on the batch's size alone.
"""

from typing import NamedTuple

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


class Classes(NamedTuple):
    """A batch sorted by class: `order` (B,) are its images, class by class; each image's class begins at the place
    `start` (B,) there and has `size` (B,) images; `place` (B,) is each image's own."""

    order: Tensor
    place: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Classes":
        ordered, order = labels.sort(stable=True)
        start = torch.searchsorted(ordered, labels)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(order, place, start, torch.searchsorted(ordered, labels, right=True) - start)

    @property
    def valid(self) -> Tensor:
        """Whether an image (B,) has both a positive and a negative."""
        return (self.size > 1) & (self.size < len(self.size))

    def largest(self) -> int:
        """The images of the largest class, or a bound: on a GPU, the batch's size, since asking would mean waiting."""
        return int(self.size.max()) if self.size.device.type == "cpu" else len(self.size)


def random_triplets(labels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One positive and one negative drawn uniformly for every anchor.

    `labels` (B,) → indices of positives and negatives, and whether the anchor has both, (B,) each; where it has not,
    both are the anchor itself. `generator` is a CPU generator, so that the draw does not depend on the device. O(B).
    """
    classes, batch = Classes.of(labels), len(labels)
    # Apple's GPUs read the memory of a copy that does not block after it was freed.
    at_once = labels.device.type not in ("cpu", "mps")
    share = torch.rand(2, batch, generator=generator).to(labels.device, non_blocking=at_once)
    positives, negatives = classes.size - 1, batch - classes.size
    # The ⌊share · n⌋-th of the n candidates in the order of classes; rounding may give n.
    nth = [torch.minimum((u * n).long(), n - 1).clamp_min(0) for u, n in zip(share, (positives, negatives))]
    positive = classes.start + nth[0]
    positive = positive + (positive >= classes.place)  # leaves the anchor out
    negative = nth[1] + (nth[1] >= classes.start) * classes.size  # leaves its class out
    own = torch.arange(batch, device=labels.device)
    drawn = (classes.order[place.clamp_max(batch - 1)].where(classes.valid, own) for place in (positive, negative))
    return *drawn, classes.valid


@torch.no_grad()
def hardest_triplets(distances: Tensor, labels: Tensor, block: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """The farthest positive and the nearest negative of every anchor (A. Hermans et al., "In Defense of the Triplet
    Loss for Person Re-Identification", 2017, equation 5).

    `distances` (A, B) of the A anchors in `block`, `labels` (B,) → indices of positives and negatives, and whether
    the anchor has both, (A,) each; where it has not, they are any.
    """
    positive, negative = pair_masks(labels, block)
    farthest = distances.masked_fill(~positive, float("-inf")).argmax(1)
    nearest = distances.masked_fill(~negative, float("inf")).argmin(1)
    return farthest, nearest, positive.any(1) & negative.any(1)


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
    ranks of each negative among the anchor's sorted positives: O(B² log B) time, O(B²) memory, all classes at once.
    """
    classes, counts = Classes.of(labels), torch.empty_like(distances)
    places = torch.arange(classes.largest(), device=labels.device)
    own, start, size = (x[block, None] for x in (classes.place, classes.start, classes.size))
    step = max(1, ROW_BLOCK // len(labels))
    for part in (slice(first, first + step) for first in range(0, len(distances), step)):
        # The columns of the anchor's class, itself among them; what is behind the class's end stands for no image.
        there = (places < size[part]) & (start[part] + places != own[part])
        columns = classes.order[(start[part] + places).where(there, own[part])]
        rows, negative = distances.detach()[part], labels != labels[block][part, None]
        _count(counts[part], rows, columns, there, negative, margin, semihard, neighbours)
    return counts


def _count(
    counts: Tensor,
    rows: Tensor,
    columns: Tensor,
    there: Tensor,
    negative: Tensor,
    margin: float,
    semihard: bool,
    neighbours: int | None,
) -> None:
    """Fills `counts` (R, B) for R anchors with distances `rows` (R, B).

    `columns` (R, K) are their positives where `there` (R, K), and elsewhere the anchor; `negative` (R, B): the others.
    """
    positives, order = rows.gather(1, columns).masked_fill(~there, float("inf")).sort(1)
    columns, upto = columns.gather(1, order), there.sum(1, keepdim=True)
    if neighbours is not None:
        positives, columns, upto = positives[:, :neighbours], columns[:, :neighbours], upto.clamp_max(neighbours)
    # Of the sorted positives, those from `at` on reach over this negative; so do, seen from a positive, the negatives
    # whose `at` is no larger than its place.
    at = torch.minimum(torch.searchsorted(positives + margin, rows, right=True), upto)
    by_positive = _up_to(at, negative, positives.shape[1])
    if semihard:  # without the positives that are farther away than this negative
        upto = torch.minimum(torch.searchsorted(positives, rows), upto)
        by_positive -= _up_to(upto, negative, positives.shape[1])
    torch.mul(at - upto, negative, out=counts)
    # Behind the positives, `columns` are the anchor itself, which is given 0 again and again.
    counts.scatter_(1, columns, by_positive.where(positives < float("inf"), 0).to(counts.dtype))


def _up_to(ranks: Tensor, counted: Tensor, places: int) -> Tensor:
    """`ranks` (R, N) in 0..places → (R, places): [r, i] how many of row r are ≤ i, of those that are `counted`."""
    histogram = ranks.new_zeros(len(ranks), places + 1)
    return histogram.scatter_add_(1, ranks, counted.to(ranks.dtype)).cumsum(1)[:, :-1]
