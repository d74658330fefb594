"""Ten corruptions of images at five severities, after D. Hendrycks & T. Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", 2019; noise strengths are those of their CIFAR-10-C."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T


def _gaussian_noise(x: Tensor, scale: float, draw: torch.Generator) -> Tensor:
    return x + scale * torch.randn(x.shape, generator=draw)


def _shot_noise(x: Tensor, photons: float, draw: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=draw) / photons


def _impulse_noise(x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    u = torch.rand(x.shape, generator=draw)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def _jpeg(x: Tensor, quality: float, draw: torch.Generator) -> Tensor:
    return torch.stack([T.jpeg(image, int(quality)) for image in (x * 255).round().byte()]).float() / 255


def _pixelated(x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    small = F.interpolate(x, size=round(32 * share), mode="bilinear", antialias=True)
    return F.interpolate(small, size=32, mode="nearest-exact")


def _elastic(x: Tensor, pixels: float, draw: torch.Generator) -> Tensor:
    moved = T.gaussian_blur(2 * torch.rand(len(x), 2, 32, 32, generator=draw) - 1, [9, 9], [2.0, 2.0])
    moved = moved / moved.flatten(1).std(1).view(-1, 1, 1, 1) * pixels / 16
    place = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, place + moved.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


# Of images (N, 3, 32, 32) in [0, 1]: the function, and its strength at each severity.
KINDS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "gaussian noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "blur": (lambda x, s, _: T.gaussian_blur(x, [9, 9], [s, s]), (0.5, 0.7, 0.9, 1.2, 1.5)),
    "brightness": (lambda x, s, _: T.adjust_brightness(x, s), (1.15, 1.3, 1.5, 1.75, 2.0)),
    "contrast": (lambda x, s, _: T.adjust_contrast(x, s), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturation": (lambda x, s, _: T.adjust_saturation(x, s), (0.5, 0.2, 0.0, 2.5, 4.0)),
    "JPEG": (_jpeg, (80, 65, 50, 35, 20)),
    "pixelation": (_pixelated, (0.75, 0.625, 0.5, 0.375, 0.25)),
    "elastic": (_elastic, (0.5, 0.8, 1.1, 1.5, 2.0)),
}


def corrupted(images: Tensor, kind: str, severity: int) -> Tensor:
    """Images (N, 32, 32, 3) uint8, all corrupted in the same way; `severity` 0..4. The same each time."""
    change, strengths = KINDS[kind]
    draw = torch.Generator().manual_seed(severity)
    found = change(images.permute(0, 3, 1, 2).float() / 255, strengths[severity], draw)
    return (found.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def mixed(images: Tensor) -> Tensor:
    """Images (N, 32, 32, 3) uint8, each corrupted in one of all the ways. The same each time."""
    ways, found = [(kind, severity) for kind in KINDS for severity in range(5)], torch.empty_like(images)
    way = torch.randint(len(ways), (len(images),), generator=torch.Generator().manual_seed(0))
    for i, (kind, severity) in ((i, w) for i, w in enumerate(ways) if (way == i).any()):
        found[way == i] = corrupted(images[way == i], kind, severity)
    return found
