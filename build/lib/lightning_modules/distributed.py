"""What makes N processes compute as one: layers that see the whole global batch, every process with an equal slice."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


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


class _GlobalBatchNorm(torch.autograd.Function):
    """x (B, C, H, W) normalised by the mean and variance over all processes' images; their gradient reaches them all.

    Every pass over x is one of PyTorch's own fused kernels, as on one process, of this process's images; what the
    others' add is known from sums per channel alone.
    """

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # In buffers of the weight's precision, as of bfloat16 images the kernel would give rounded statistics without.
        own = torch.stack(torch.batch_norm_update_stats(x, torch.zeros_like(weight), torch.ones_like(weight), 1.0))
        everyones = [torch.empty_like(own) for _ in range(world()[1])]
        distributed.all_gather(everyones, own)
        means, variances = torch.stack(everyones).double().unbind(1)
        mean = means.mean(0)
        # Not from the sum of squares, which loses the digits of a variance that is small beside the mean.
        variance = (variances + (means - mean).square()).mean(0)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        context.save_for_backward(x, weight, mean, variance)
        context.eps = eps
        context.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(context, gradient: Tensor, _mean: None, _variance: None) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = context.saved_tensors
        scale = (variance + context.eps).rsqrt()
        # With normalised = (x - mean) · scale, the gradient of x is
        #     weight · scale · (gradient - mean(gradient) - normalised · mean(gradient · normalised)).
        # The kernel takes these two means over its own images; the difference from all images' is added.
        own, *sums = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, context.eps, [True, True, True]
        )
        along, shift = torch.stack(sums) / (x.numel() // x.shape[1])
        total = torch.stack([along, shift])
        distributed.all_reduce(total)
        along, shift = weight * scale * (torch.stack([along, shift]) - total / world()[1])
        return own.add_(F.batch_norm(x, mean, variance, along, shift, False, 0.0, context.eps)), *sums, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images (B, C, H, W) of all processes, with gradient; on gloo too, which SyncBatchNorm is not.

    One process: plain BatchNorm. Made of an existing layer by `share_batch_norm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        processes = world()[1]
        if not self.training or processes == 1:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if weight is None:
            weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            bias = torch.zeros_like(weight)
        normalised, mean, variance = _GlobalBatchNorm.apply(x, weight, bias, self.eps)
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * processes
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        return normalised


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
        keep = (
            torch.rand(processes * len(x), *x.shape[1:], device=x.device)[rank * len(x) : (rank + 1) * len(x)] >= self.p
        )
        return x * keep / (1 - self.p)
