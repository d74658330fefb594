"""What makes N processes compute as one: layers that see the whole global batch, every process with an equal slice."""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_objects(mine: Any) -> list[Any]:
    """What every process gives, in the order of their ranks."""
    everyones = [mine] * world()[1]
    if len(everyones) > 1:
        distributed.all_gather_object(everyones, mine)
    return everyones


def _summed(*values: Tensor) -> Tensor:
    """The stacked vectors' sums over all processes."""
    stacked = torch.stack(values)
    distributed.all_reduce(stacked)
    return stacked


class _GlobalBatchNorm(torch.autograd.Function):
    """x (B, C, H, W) normalised by the mean and variance over all processes' images; their gradient reaches them all.

    Sums are accumulated in float64, as PyTorch's BatchNorm does on the CPU: a channel that hardly varies would blow up
    the rounding errors of float32.
    """

    @staticmethod
    def forward(context, x: Tensor, eps: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
        values = x if x.dtype == torch.float64 else x.float()
        (mean,) = _summed(values.sum((0, 2, 3), dtype=torch.float64)) / count
        centred = values - mean.to(values.dtype)[:, None, None]
        # Not from the sum of squares, which loses the digits of a variance that is small beside the mean.
        (variance,) = _summed(centred.square().sum((0, 2, 3), dtype=torch.float64)) / count
        scale = (variance + eps).rsqrt().to(values.dtype)
        normalised = centred.mul_(scale[:, None, None])
        context.save_for_backward(normalised, scale)
        context.count = count
        context.mark_non_differentiable(mean, variance)
        return normalised.to(x.dtype), mean, variance

    @staticmethod
    def backward(context, gradient: Tensor, _mean: None, _variance: None) -> tuple[Tensor, None, None]:
        normalised, scale = context.saved_tensors
        wide = gradient.to(normalised.dtype)
        along = (wide * normalised).sum((0, 2, 3), dtype=torch.float64)
        sums = _summed(wide.sum((0, 2, 3), dtype=torch.float64), along) / context.count
        shift, along = sums.to(normalised.dtype)[:, :, None, None]
        return ((wide - shift - normalised * along) * scale[:, None, None]).to(gradient.dtype), None, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images (B, C, H, W) of all processes, with gradient; on gloo too, which SyncBatchNorm is not.

    One process: plain BatchNorm. Made of an existing layer by `share_batch_norm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        processes = world()[1]
        if not self.training or processes == 1:
            return super().forward(x)
        count = x.numel() // x.shape[1] * processes
        normalised, mean, variance = _GlobalBatchNorm.apply(x, self.eps, count)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        if self.weight is not None:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)


def share_batch_norm(module: nn.Module) -> None:
    """Turns every BatchNorm2d inside `module` into a SharedBatchNorm2d, in place: same weights, buffers and names."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SharedBatchNorm2d


class SharedDropout(nn.Dropout):
    """Dropout whose mask is drawn for the global batch: the same on N processes as on one if they are seeded alike."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rank, processes = world()
        keep = torch.rand(processes * len(x), *x.shape[1:], device=x.device)[rank * len(x) : (rank + 1) * len(x)] >= self.p
        return x * keep / (1 - self.p)
