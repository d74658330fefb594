"""The default encoder: a small network that trains in minutes, and how it starts."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import require
from lightning_modules.encoders.contract import Encoder


class FastEncoder(Encoder):
    """A small network that trains in minutes: frozen whitening, then three blocks of conv-pool-BN-GELU-conv-BN-GELU.

    The layers follow airbench94 (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024): 2×2 patch
    whitening (section 3.2, after T. Page's ResNet-on-CIFAR-10 studies), convolutions started as partial identities
    (3.3), BatchNorm without scale. A last pooling over the remaining 3×3 positions gives `widths[-1]` features.

    Args:
        widths: output channels of the three blocks.
        whitening_eps: added to the variance of each patch direction (images in units of standard deviations), so that
            whitening does not blow up directions that hardly vary.
        residual: a third conv-BN in every block, the last two bridged by a shortcut before the last GELU (airbench96,
            section 4 of the same paper).
        pooling: max or mean: what the last pooling takes.
        all_blocks: append what the first two blocks give, averaged over 3×3 parts of the image, to the features.
            Probes read it. Contrastive training compares the last block's features alone, so it does not change.
    """

    def __init__(
        self,
        widths: list[int] = [32, 64, 256],
        whitening_eps: float = 1e-2,
        residual: bool = False,
        pooling: Literal["max", "mean"] = "max",
        all_blocks: bool = False,
    ) -> None:
        super().__init__()
        require(len(widths) == 3, "FastEncoder widths", widths, "the widths of three blocks, e.g. [32, 64, 256]")
        require(min(widths) >= 1, "encoder widths", widths, "at least 1 each")
        require(whitening_eps > 0, "FastEncoder whitening_eps", whitening_eps, "above 0")
        require(pooling in ("max", "mean"), "FastEncoder pooling", pooling, "max or mean")
        self.feature_dim = widths[-1] + (9 * sum(widths[:-1]) if all_blocks else 0)
        self.widths, self.whitening_eps, self.pooling, self.all_blocks = widths, whitening_eps, pooling, all_blocks
        self.whiten = nn.Conv2d(3, 24, kernel_size=2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        block = _residual_block if residual else _block
        self.blocks = nn.Sequential(*map(block, [24, *widths[:-1]], widths))
        self.gelu = GELU()

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        super().initialize(images)
        weight = whitening_filters(
            images[:5000].permute(0, 3, 1, 2).float() / 255, self.mean, self.std, self.whitening_eps
        )
        # Each direction in both signs, since the GELU behind it keeps one side (airbench94).
        self.whiten.weight.copy_(torch.cat([weight, -weight]))

    @property
    def contrast_dim(self) -> int:
        return self.widths[-1]

    def features(self, images: Tensor) -> Tensor:
        found, x = [], self.gelu(self.whiten(images))
        for block in self.blocks:
            x = block(x)
            found.append(x)
        # No adaptive poolings, whose gradients no GPU computes deterministically.
        places = x.flatten(2)
        last = places.mean(2) if self.pooling == "mean" else places.max(2).values
        return torch.cat([last, *map(nine_parts, found[:-1])], dim=1) if self.all_blocks else last


def nine_parts(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) → (B, 9 C): the means over 3×3 parts, which overlap where 3 does not divide H = W."""
    while maps.shape[-1] < 3:
        maps = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    stride = maps.shape[-1] // 3
    return F.avg_pool2d(maps, maps.shape[-1] - 2 * stride, stride).flatten(1)


class GELU(nn.Module):
    """x Φ(x); in evaluation in float32, the same bits for the same x wherever it lies in the tensor.

    On CPUs `F.gelu` computes the elements left over at the end of each thread's share by other instructions than the
    rest, so that an image's features would depend on its place in the batch. `torch.erf` does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.dtype != torch.float32:
            return F.gelu(x)
        return (torch.erf(x * 0.5**0.5).add_(1) * x).mul_(0.5)


class Shortcut(nn.Module):
    """x + layers(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    first, second = _conv(inputs, outputs), _conv(outputs, outputs)
    return nn.Sequential(first, nn.MaxPool2d(2), _norm(outputs), GELU(), second, _norm(outputs), GELU())


def _residual_block(inputs: int, outputs: int) -> nn.Sequential:
    bridged = _conv(outputs, outputs), _norm(outputs), GELU(), _conv(outputs, outputs), _norm(outputs)
    return nn.Sequential(_conv(inputs, outputs), nn.MaxPool2d(2), _norm(outputs), GELU(), Shortcut(*bridged), GELU())


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:inputs].data)
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def whitening_filters(images: Tensor, mean: Tensor, std: Tensor, eps: float) -> Tensor:
    """Filters (12, 3, 2, 2) whose responses to normalised patches are uncorrelated with variance v / (v + eps) ≤ 1.

    `images` (N, 3, 32, 32) in [0, 1]; `mean` and `std` (3, 1, 1); v is a direction's variance. Sorted by falling v.
    Grey or few images do not vary at all in some directions; the filters of those that vary take their places in turn.
    """
    patches = ((images - mean) / std).unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    covariance = patches.double().T @ patches.double() / len(patches)
    variance, directions = torch.linalg.eigh(covariance.cpu())
    filters = (directions / (variance.clamp_min(0) + eps).sqrt()).T.flip(0)
    # A channel without variance would reach every BatchNorm through the partial identities, and each would multiply
    # its gradient by 1/√eps ≈ 316: in bfloat16, rounding errors then grow until the weights explode.
    alive = int((variance > 1e-6 * variance.max()).sum()) or 12
    return filters[torch.arange(12) % alive].reshape(12, 3, 2, 2).float().to(images.device)
