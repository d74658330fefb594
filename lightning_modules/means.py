"""Means over the images of all processes: the one way in which every stage and monitor here adds up what it logs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Σ sums / Σ counts over all batches and processes: one quantity (no dimensions), or `quantities` of them, (Q,).

    `update` takes a batch's sums and its number of images; sums that a checkpoint has kept are given back by it too.
    A NaN stays one. The sums are float64 (float32 on Apple's GPUs), and their mean is rounded to float32, so the order
    of the sums does not show.
    """

    full_state_update = False

    def __init__(self, quantities: int | None = None) -> None:
        super().__init__()
        kind = {"dtype": torch.float32 if torch.backends.mps.is_available() else torch.float64}  # MPS has no float64
        self.add_state("sums", torch.zeros(() if quantities is None else (quantities,), **kind), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), **kind), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args) -> "Mean":
        # A stage in bf16-true is cast as a whole, its metrics too, and bfloat16 counts images up to 256 only.
        return super()._apply(lambda x: fn(x).to(x.dtype), *args)

    def update(self, sums: Tensor, count: int | Tensor) -> None:
        self.sums += sums
        self.count += count

    def compute(self) -> Tensor:
        return (self.sums / self.count).float()
