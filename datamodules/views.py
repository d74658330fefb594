"""Random views of images, in whole batches: a crop, resized and mirrored in one resampling, then a map of its colours.

What an encoder that learns without labels calls alike is two views of one image (T. Chen et al., "A Simple Framework
for Contrastive Learning of Visual Representations", 2020, SimCLR, section 3).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import require

GREY = (0.299, 0.587, 0.114)  # of red, green and blue in a grey, as torchvision's
RATIO = 4 / 3  # the longest crop's sides, as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Views:
    """`count` views of each image, `size` pixels wide."""

    count: int
    size: int = 32
    scale: tuple[float, float] | None = None  # a crop's least and largest share of the area; None: the whole image
    flip: bool = False  # half of the views are mirrored
    # How much brightness, contrast and saturation vary around 1, and hue around 0 (1: a whole turn), in four of five.
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    greyscale: float = 0.0  # share of the views without colour

    @property
    def varies(self) -> bool:
        """Whether two views of an image differ, most often."""
        return self.scale is not None or any(self.jitter) or self.greyscale > 0

    def draw(self, images: int, generator: torch.Generator) -> Tensor:
        """What is random in the views of so many images, image by image: (images · count, 10) float32.

        The columns are a crop's top, left, height and width in pixels, whether it is mirrored, then factors of
        brightness, contrast and saturation, turns of hue, and how much colour goes. The numbers drawn do not depend on
        the options.
        """
        u = torch.rand(images * self.count, 11, generator=generator).unbind(1)
        box = (
            [torch.full_like(u[0], x) for x in (0, 0, 32, 32)] if self.scale is None else draw_boxes(self.scale, *u[:4])
        )
        varied = (u[5] < 0.8).float()
        centres = (1.0, 1.0, 1.0, 0.0)
        factors = [c + varied * s * (2 * x - 1) for c, s, x in zip(centres, self.jitter, u[6:10])]
        mirrored = (u[4] < 0.5 * self.flip).float()
        return torch.stack([*box, mirrored, *factors, (u[10] < self.greyscale).float()], dim=1)

    def make(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """Images (B, 32, 32, 3) uint8, or each of them `count` times, and what `draw` gave → their views.

        (B · count, 3, size, size) float32 in [0, 1], channels last in memory, image by image.
        """
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        x = resample(x.repeat_interleave(len(drawn) // max(1, len(x)), 0), drawn[:, :4], drawn[:, 4] > 0, self.size)
        if any(self.jitter) or self.greyscale:
            x = recolour(x, drawn[:, 5:])
        return x.contiguous(memory_format=torch.channels_last)


def draw_boxes(scale: tuple[float, float], area: Tensor, ratio: Tensor, top: Tensor, left: Tensor) -> list[Tensor]:
    """Uniform numbers (B,) each → tops, lefts, heights and widths (B,) of crops in whole pixels of 32 × 32.

    As torchvision's RandomResizedCrop: the area's share uniform in `scale`, the logarithm of width / height uniform
    within that of 3/4 and 4/3. A side that would be longer than the image is cut, where torchvision draws anew.
    """
    sides = (32 * 32 * (scale[0] + (scale[1] - scale[0]) * area)).sqrt()
    skew = (math.log(RATIO) * (ratio - 0.5)).exp()  # √(width / height)
    height, width = ((sides * x).round().clamp(1, 32) for x in (1 / skew, skew))
    return [(top * (33 - height)).floor(), (left * (33 - width)).floor(), height, width]


def resample(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """The part of each image (B, C, H, W) inside its box, resized to (B, C, size, size); mirrored where told, (B,).

    `boxes` (B, 4) are top, left, height and width in pixels. Bilinear and, where a box is larger than `size`,
    antialiased; nothing outside the box counts. Two products with matrices of weights: rows, then columns.
    """
    top, left, height, width = boxes.unbind(1)
    across = _weights(left, width, images.shape[3], size)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    columns = torch.bmm(images.flatten(1, 2), across.mT).unflatten(1, images.shape[1:3])
    return _weights(top, height, images.shape[2], size)[:, None] @ columns


def _weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """(B, size, pixels): what each of `pixels` counts for each output, of pieces from `start` on, `length` long."""
    step = (length / size)[:, None, None]
    place = torch.arange(pixels, device=start.device) + 0.5
    centre = start[:, None, None] + step * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weights = F.relu(1 - (place - centre).abs() / step.clamp_min(1))
    inside = (place > start[:, None]) & (place < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with other colours, as one affine map each, cut to [0, 1] at the end.

    `factors` (B, 5), in this order:
    - brightness b: x → b x;
    - contrast c: towards the image's mean grey m, c x + (1 − c) m;
    - saturation s: towards each pixel's grey;
    - hue h: the colours turn by h turns about the axis of greys;
    - the share of colour that goes.
    The first three are torchvision's `adjust_…`, which cuts to [0, 1] after each.
    """
    brightness, contrast, saturation, hue, grey = (x[:, None, None] for x in factors.unbind(1))
    flat, eye = images.flatten(2), torch.eye(3, device=images.device)
    weights = torch.tensor(GREY, device=images.device)
    mean = (flat.mean(2) @ weights)[:, None, None] * brightness
    to_grey = weights.expand(3, 3)
    dull = saturation * eye + (1 - saturation) * to_grey
    pale = (1 - grey) * eye + grey * to_grey
    colours = pale @ hue_rotation(hue) @ dull * (brightness * contrast)
    # Every map after contrast leaves a grey as it is, so the offset stays one.
    offset = ((1 - contrast) * mean).expand(-1, 3, 1)
    return torch.baddbmm(offset, colours, flat).clamp_(0, 1).view_as(images)


def hue_rotation(turns: Tensor) -> Tensor:
    """(B, 1, 1) → the rotation (B, 3, 3) of red, green and blue about the axis of greys, by O. Rodrigues's formula.

    A third of a turn makes red green.
    """
    angle = 2 * math.pi * turns
    third, across = torch.full((3, 3), 1 / 3), torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    third, across, eye = (x.to(turns.device) for x in (third, across, torch.eye(3)))
    return angle.cos() * eye + (1 - angle.cos()) * third + angle.sin() * across


def views_of(
    views: int,
    crop_scale: list[float] | None,
    color_jitter: float | list[float],
    greyscale: float,
    small_views: int,
    small_size: int,
    small_scale: list[float],
    flip: bool,
) -> list[Views]:
    """The sizes of views that the options of InMemoryDataModule ask for; none where they leave an image as it is."""
    require(views >= 1, "data.views", views, "at least 1")
    require(small_views >= 0, "data.small_views", small_views, "0 or more")
    require(8 <= small_size <= 32, "data.small_size", small_size, "8..32 pixels")
    for name, scale in (("crop_scale", crop_scale), ("small_scale", small_scale)):
        two = scale is None or len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        require(two, f"data.{name}", scale, "two shares of an image, the smaller one first, such as [0.2, 1]")
    s = color_jitter
    jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s) if isinstance(s, int | float) else tuple(s)
    within = len(jitter) == 4 and all(0 <= x <= 1 for x in jitter[:3]) and 0 <= jitter[-1] <= 0.5
    require(within, "data.color_jitter", s, "a number from 0 to 1.25, or four: three up to 1, and hue up to 0.5")
    require(0 <= greyscale <= 1, "data.greyscale", greyscale, "a share, 0..1")
    if (views, small_views, crop_scale, greyscale, any(jitter)) == (1, 0, None, 0, False):
        return []
    colours = {"jitter": jitter, "greyscale": greyscale}
    drawn = [Views(views, 32, crop_scale and tuple(crop_scale), flip and views > 1, **colours)]
    if small_views:
        drawn.append(Views(small_views, small_size, tuple(small_scale), flip, **colours))
    return drawn
