"""Batches cut from tensors in memory: what is drawn, delivered and shared between processes."""

import gc
import weakref

import numpy as np
import pytest
import torch

from datamodules.loader import BatchLoader


def images(count=64, seed=0):
    return torch.randint(256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference(image, mirrored, dx, dy, width):
    """Crop and flip of one image (32, 32, 3), spelled out with numpy."""
    padded = np.pad(image.numpy(), ((width, width), (width, width), (0, 0)), mode="reflect")
    crop = padded[dy : dy + 32, dx : dx + 32]
    return torch.from_numpy((crop[:, ::-1] if mirrored else crop).copy()).permute(2, 0, 1).float() / 255


def test_evaluation_batches_are_the_images_in_order():
    data, labels = images(10), torch.arange(10)
    batches = list(BatchLoader(data, labels, 4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), data.permute(0, 3, 1, 2).float() / 255)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_every_augmented_image_is_a_crop_or_mirrored_crop_of_its_own():
    data = images(64)
    drawn = set()
    for x, y in BatchLoader(data, torch.arange(64), 32, seed=1, flip=True, translate=2):
        for image, label in zip(x, y.tolist()):
            matches = [
                (m, dx, dy)
                for m in (False, True)
                for dx in range(5)
                for dy in range(5)
                if torch.equal(image, reference(data[label], m, dx, dy, 2))
            ]
            assert len(matches) == 1
            drawn.add(matches[0])
    assert len(drawn) > 25  # of 50 possible ones: drawn per image, not per batch


@pytest.mark.parametrize("side", [1, 6, 32])
def test_cutout_hides_one_square_anywhere_and_nothing_else(side):
    data = images(200).clamp(0, 200)  # no pixel is the mean colour in all three channels by chance
    data[..., 0] = 255
    data[0, ..., 0] = 0
    fill = data.float().mean((0, 1, 2)).round() / 255
    whole = BatchLoader(data, torch.arange(200), 200, seed=1, flip=True, translate=2)
    cut = BatchLoader(data, torch.arange(200), 200, seed=1, flip=True, translate=2, cutout=side)
    ((x, _),), ((y, _),) = whole, cut
    hidden = (y == fill[:, None, None]).all(1)
    assert torch.equal(torch.where(hidden[:, None], x, y), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    heights, widths = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == side and heights.min() >= (side + 1) // 2 and widths.max() == side
    assert len(hidden.flatten(1).int().argmax(1).unique()) > 20  # drawn for each image


def test_flip_mirrors_half_and_the_other_half_in_the_next_epoch():
    data = images(400)
    loader = BatchLoader(data, torch.arange(400), 400, seed=0, flip=True)

    def mirrored(epoch):
        loader.set_epoch(epoch)
        ((x, y),) = loader
        flags = torch.tensor([torch.equal(image, reference(data[i], True, 0, 0, 0)) for image, i in zip(x, y)])
        return flags[y.argsort()]

    first, second = mirrored(0), mirrored(1)
    assert 150 < first.sum() < 250
    assert torch.equal(first, ~second)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        loader = BatchLoader(images(60), torch.arange(60), 20, seed=seed)
        loader.set_epoch(epoch)
        return torch.cat([y for _, y in loader]).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(60))
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_see_together_what_one_would(world_size):
    options = {"seed": 5, "flip": True, "translate": 2}
    data, labels = images(50), torch.arange(50)
    alone = list(BatchLoader(data, labels, 12, **options))
    ranks = [list(BatchLoader(data, labels, 12, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    assert len(alone) == 4
    for batch, *parts in zip(alone, *ranks, strict=True):
        for whole, pieces in zip(batch, zip(*parts)):
            assert torch.equal(whole, torch.cat(pieces))


def test_processes_evaluate_every_image_once():
    ranks = [BatchLoader(images(10), torch.arange(10), 3, rank=r, world_size=3) for r in range(3)]
    assert [y for loader in ranks for _, ys in loader for y in ys.tolist()] == list(range(10))
    assert all(len(loader) == len(list(loader)) for loader in ranks)


def test_a_loader_lets_go_of_its_images_at_once():
    gc.disable()  # a cycle would have to wait for it: of a million images, for gigabytes
    try:
        loader = BatchLoader(images(), torch.arange(64) % 10, 16, seed=0, flip=True, translate=2)
        loader.sampler.set_epoch(3)  # as Lightning does
        assert len(list(loader)) == 4 and loader.epoch == 3
        padded = weakref.ref(loader.inputs)
        del loader
        assert padded() is None
    finally:
        gc.enable()
