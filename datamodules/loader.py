"""The data path: whole batches cut from tensors that stay on the training device."""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from datamodules.views import Views


def batch_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, epoch, batch): any process can draw the same."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class BatchLoader:
    """Iterates over (inputs, labels) batches; a drop-in for DataLoader where all data fits in memory.

    Images (N, 32, 32, 3) uint8 are delivered as (B, 3, 32, 32) float32 in [0, 1] in channels-last memory format,
    features (N, D) float32 as they are, `labels` (N,) int64 beside them (left out where there are none).

    Training (`seed` given): the order is drawn from (seed, epoch) and the augmentation from (seed, epoch, batch) for
    the global batch of `batch_size`. Each of `world_size` processes cuts its own equal slice of it, so together they
    see what one process would see. The last incomplete global batch is dropped. Without `reshuffle` every epoch has the
    first one's order, so a limited number of batches has the same images each time (`overfit_batches`). A fit that is
    resumed in the middle of an epoch (`load_state_dict`) continues behind the last batch delivered.
    Evaluation (`seed` None): every process gets its own run of whole batches, the same batches as on one process, each
    image exactly once over all of them (and a batch of no images where there are fewer batches than processes).

    `flip` mirrors every image in every other epoch, a random half of them starting in epoch 0 (alternating flip,
    K. Jordan, "94% on CIFAR-10 in 3.29 Seconds", 2024, section 3.6). `translate` shifts each image by up to that many
    pixels in x and y after reflect padding. `cutout` then fills a square of that side, around any pixel of the image,
    with the mean colour (T. DeVries & G. Taylor, "Improved Regularization of CNNs with Cutout", 2017, section 3.2).

    With `views`, training batches hold views of the images in their place, all views of an image behind each other:
    (B · V, 3, S, S) for views of one size, a list of these for several. What they are cut from is translated and cut
    out for each view anew. Evaluation batches then have views as a third part, the same in every epoch.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        batch_size: int,
        *,
        seed: int | None = None,
        flip: bool = False,
        translate: int = 0,
        cutout: int = 0,
        views: Sequence[Views] = (),
        reshuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels, self.batch_size, self.seed, self.flip, self.cutout = labels, batch_size, seed, flip, cutout
        self.rank, self.world_size, self.num_samples, self.epoch = rank, world_size, len(inputs), 0
        self.reshuffle, self.views = reshuffle, views
        self.translate = 0 if seed is None or inputs.ndim == 2 else translate
        self._delivered = self._resumed = (0, 0)  # epoch, batches of it
        # torchvision's arrays are views with another order of their dimensions
        self.inputs = _pad(inputs, translate) if self.translate else inputs.contiguous()
        if cutout:
            # Block by block: the sum makes eight bytes of each.
            sums = sum(block.sum((0, 1, 2), dtype=torch.int64) for block in inputs.split(4096))
            count = inputs[..., 0].numel()
            self._fill = ((2 * sums + count) // (2 * count)).to(torch.uint8)
        if seed is not None:
            # Lightning tells `loader.sampler` of each new epoch. A reference to itself would keep the images in memory
            # until the cycle is collected.
            self.sampler = weakref.proxy(self)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return dict(zip(("epoch", "batch"), self._delivered))

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._delivered = self._resumed = (state["epoch"], state["batch"])

    @property
    def block(self) -> range:
        """The images that this process evaluates."""
        batches = -(-self.num_samples // self.batch_size)
        first, last = (-(-batches * r // self.world_size) * self.batch_size for r in (self.rank, self.rank + 1))
        return range(first, min(last, self.num_samples))

    def numbers(self, batch: int, count: int) -> Tensor:
        """Which images, `count` of them, this process's evaluation batch of that number holds."""
        first = self.block.start + batch * self.batch_size
        return torch.arange(first, first + count)

    def __len__(self) -> int:
        if self.seed is not None:
            return self.num_samples // self.batch_size
        return max(1, -(-len(self.block) // self.batch_size))  # Lightning refuses a loader without a batch

    def __iter__(self) -> Iterator[tuple[Tensor | list[Tensor], ...]]:
        yield from self._evaluation() if self.seed is None else self._training()

    def _evaluation(self) -> Iterator[tuple[Tensor, ...]]:
        device, block = self.inputs.device, self.block
        for first in range(block.start, block.stop, self.batch_size) or [block.start]:
            index = torch.arange(first, max(first, min(first + self.batch_size, block.stop)), device=device)
            labels = () if self.labels is None else (self.labels[index],)
            if self.inputs.ndim == 2:
                yield self.inputs.index_select(0, index), *labels
                continue
            pixels = self._pixels(index)
            drawn = [v.draw(len(index), batch_generator(first)).to(device) for v in self.views]
            yield as_floats(pixels), *labels, *(v.make(pixels, d) for v, d in zip(self.views, drawn))

    def _training(self) -> Iterator[tuple[Tensor | list[Tensor], ...]]:
        device = self.inputs.device
        key = (self.seed, self.epoch if self.reshuffle else 0)
        order = torch.randperm(self.num_samples, generator=batch_generator(*key))
        parity = torch.rand(self.num_samples, generator=batch_generator(self.seed)) < 0.5
        mine = slice(*(self.batch_size * r // self.world_size for r in (self.rank, self.rank + 1)))
        epoch, start = self._resumed
        for batch in range(start if epoch == self.epoch else 0, len(self)):
            self._delivered = (self.epoch, batch + 1)
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size][mine]
            mirrored = parity[index] ^ bool(self.epoch % 2)
            index, mirrored = (move_data_to_device(x, device) for x in (index, mirrored))
            labels = () if self.labels is None else (self.labels[index],)
            if self.inputs.ndim == 2:
                yield self.inputs.index_select(0, index), *labels
                continue
            generator = batch_generator(self.seed, self.epoch, batch)
            chosen = index, mirrored if self.flip else None
            sizes = [self._drawn(view, *chosen, mine, generator) for view in self.views or (None,)]
            yield sizes[0] if len(sizes) == 1 else sizes, *labels

    def _drawn(
        self, view: Views | None, index: Tensor, mirrored: Tensor | None, mine: slice, generator: torch.Generator
    ) -> Tensor:
        """The images `index` (B,), or their views of one size (B · V, 3, S, S): the slice `mine` of what is drawn for
        the global batch."""
        count = view.count if view is not None and (self.translate or self.cutout) else 1
        drawn = [
            torch.randint(places, (2, count * self.batch_size), generator=generator)[:, scaled(mine, count)]
            for places in (2 * self.translate + 1, 32 * bool(self.cutout))
            if places > 1
        ]
        if view is not None:
            drawn.append(view.draw(self.batch_size, generator)[scaled(mine, view.count)])
        drawn = [move_data_to_device(x, index.device) for x in drawn]
        shift = drawn.pop(0) if self.translate else None
        centre = drawn.pop(0) if self.cutout else None
        repeated = (None if x is None else x.repeat_interleave(count) for x in (index, mirrored))
        pixels = self._pixels(*repeated, shift, centre)
        return as_floats(pixels) if view is None else view.make(pixels, *drawn)

    def _pixels(
        self, index: Tensor, mirrored: Tensor | None = None, shift: Tensor | None = None, centre: Tensor | None = None
    ) -> Tensor:
        """(B, 32, 32, 3) uint8."""
        if self.translate:
            pixels = self._crop(index, mirrored, shift)
        else:
            # As rows, which are copied whole: four to eight times as fast as self.inputs[index].
            pixels = self.inputs.flatten(1).index_select(0, index).view(-1, 32, 32, 3)
            if mirrored is not None:
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        if centre is not None:
            offset = torch.arange(32, device=index.device) - centre[..., None] + self.cutout // 2
            x, y = (offset >= 0) & (offset < self.cutout)
            pixels = torch.where((y[:, :, None] & x[:, None])[..., None], self._fill, pixels)
        return pixels

    def _crop(self, index: Tensor, mirrored: Tensor | None, shift: Tensor) -> Tensor:
        """(B, 32, 32, 3) uint8: 32×32 pixels of each padded image, from `shift` (2, B) on, mirrored where told."""
        # One gather does index, crop and flip: the flat position of every wanted pixel.
        size = 32 + 2 * self.translate
        grid = torch.arange(32, device=index.device)
        x = grid if mirrored is None else torch.where(mirrored[:, None], 31 - grid, grid)
        dx, dy = shift[..., None]
        rows = (index[:, None] * size + grid + dy) * size
        places = rows[:, :, None] + (x + dx)[:, None, :]
        # Not `take`, which Apple's GPUs have not.
        pixels = self.inputs.flatten().index_select(0, places.flatten()).view(places.shape)
        return pixels.view(torch.uint8).unflatten(-1, (32, 4))[..., :3]


def scaled(part: slice, by: int) -> slice:
    return slice(part.start * by, part.stop * by)


def as_floats(pixels: Tensor) -> Tensor:
    """(B, 32, 32, 3) uint8 → (B, 3, 32, 32) float32 in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(255)


def bytes_needed(
    inputs: Tensor, labels: Tensor | None, batch_size: int, translate: int, views: Sequence[Views] = ()
) -> int:
    """What a BatchLoader holds at most: the inputs and labels, what it makes of them, and a batch."""
    held = sum(x.nbytes for x in (inputs, labels) if x is not None)
    if inputs.ndim == 2:
        return held + batch_size * inputs[:1].nbytes
    padded = 4 * len(inputs) * (32 + 2 * translate) ** 2 if translate else 0
    # The images as floats, their rows and columns resampled, the colours, and the copy that is delivered.
    viewed = sum(v.count * 3 * 4 * (2 * 32 * 32 + 32 * v.size + 4 * v.size**2) for v in views)
    # Places, pixels, bytes, floats.
    return held + padded + batch_size * (32 * 32 * (2 * 8 + 2 * 4 + 3 * 3 + 3 * 4) + viewed)


def free_memory(device: torch.device) -> float:
    """Bytes free on a GPU, those that PyTorch keeps for reuse among them; elsewhere the images lie in main memory."""
    if device.type != "cuda":
        return float("inf")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _pad(images: Tensor, width: int) -> Tensor:
    """(N, 32, 32, 3) → (N, 32 + 2w, 32 + 2w) int32, reflected at the edges without repeating them.

    A pixel's three bytes and an empty one are a single number, so that moving it takes one index instead of three.
    """
    index = F.pad(torch.arange(32.0)[None], (width, width), mode="reflect")[0].long().to(images.device)
    padded = images.new_zeros(len(images), len(index), len(index), 4)
    for block, part in zip(padded.split(4096), images.split(4096)):  # one by one: all of them may fill half the memory
        block[..., :3] = part[:, index][:, :, index]
    return padded.view(torch.int32)[..., 0]
