import gc
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_only

from datamodules import CIFAR10DataModule, DigitsDataModule, in_memory, loader
from datamodules.arrays import ImageSet, stratified_split
from datamodules.cifar10 import CIFAR100_CLASSES
from datamodules.in_memory import InMemoryDataModule
from datamodules.loader import BatchLoader
from errors import InputError
from main import main


def images(count=64, seed=0):
    return torch.randint(256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference(image, mirrored, dx, dy, width):
    """Crop and flip of one image (32, 32, 3), spelled out with numpy."""
    padded = np.pad(image.numpy(), ((width, width), (width, width), (0, 0)), mode="reflect")
    crop = padded[dy : dy + 32, dx : dx + 32]
    return torch.from_numpy((crop[:, ::-1] if mirrored else crop).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def digits():
    """The digits as a fit on one CPU process sees them, not augmented."""
    data = DigitsDataModule(translate=0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
    data.setup("fit")
    return data


SHARED = {
    "classes": "keep these classes only",
    "val_size": "held out for validation",
    "split_seed": "apart from `seed_everything`",
    "batch_size": "global batch size",
    "flip": "mirror images",
    "translate": "shift images",
    "cutout": "hide a square",
}


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("CIFAR10DataModule", ["null", "5000", "0", "512", "True", "2", "0"]),
        ("DigitsDataModule", ["null", "360", "0", "128", "False", "2", "0"]),
        ("ImageFolderDataModule", ["null", "null", "0", "256", "True", "2", "0"]),
    ],
)
def test_every_data_set_has_the_shared_options_with_help_and_its_own_defaults(name, defaults, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--data.help={name}"])
    usage, *options = capsys.readouterr().out.split("  --data.")
    options = {text.split()[0]: " ".join(text.split()) for text in options}
    for (option, words), default in zip(SHARED.items(), defaults):
        assert words in options[option] and options[option].endswith(f"default: {default})")
    assert "names" not in options  # of all classes: not an option


def test_all_options_are_recorded():
    given = {"classes": [3, 1], "batch_size": 64}
    expected = {"val_size": 360, "split_seed": 0, "flip": False, "translate": 2, "cutout": 0}
    assert dict(DigitsDataModule(**given).hparams) == {**expected, **given}
    assert CIFAR10DataModule().hparams.keys() >= {*SHARED, "root", "dataset"}


def test_a_data_set_of_ones_own_names_its_classes_in_one_place():
    class Mine(InMemoryDataModule):
        CLASSES = ("dark", "bright", "grey")

        def __init__(self):
            super().__init__(classes=[2, 0], val_size=8, split_seed=0, batch_size=4, flip=False, translate=0)

        def load(self, split):
            return ImageSet(images(30), torch.arange(30) % 3)

    data = Mine()
    assert data.class_names == ["grey", "dark"] and data.num_classes == 2 and not data.augments
    assert len(data.split("train").labels) + len(data.split("val").labels) == 20


def test_cached_features_reach_fit_and_validation_and_the_images_stay(digits):
    before = {name: digits.split(name) for name in ("train", "val", "test")}
    features = {name: torch.randn(len(before[name].labels), 7) for name in ("train", "val")}
    assert digits.train_features is None
    digits.cache_features(features)
    assert digits.train_features is features["train"]
    drawn, labels = map(torch.cat, zip(*digits.train_dataloader()))
    assert drawn.shape == (1024, 7) and len(digits.train_dataloader()) == digits.batches_per_epoch
    position = {tuple(row): i for i, row in enumerate(features["train"].tolist())}
    assert torch.equal(labels, before["train"].labels[[position[tuple(row)] for row in drawn.tolist()]])
    delivered, labels = map(torch.cat, zip(*digits.val_dataloader()))
    assert torch.equal(delivered, features["val"]) and torch.equal(labels, before["val"].labels)
    for name, (pixels, _) in before.items():
        assert digits.split(name).images is pixels and pixels.dtype == torch.uint8
        batch, _ = next(iter(digits.evaluation_loader(name)))
        assert batch.shape == (128, 3, 32, 32)


def test_batches_of_an_epoch_are_counted_without_a_loader(monkeypatch):
    """A loader of CIFAR-10's training images pads them: 233 MB."""

    def unwanted(*args, **kwargs):
        raise AssertionError("a loader was made")

    monkeypatch.setattr(loader, "_pad", unwanted)
    monkeypatch.setattr(in_memory, "BatchLoader", unwanted)
    assert DigitsDataModule(batch_size=100).batches_per_epoch == 10  # of 1,077 images


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_speaks_for_all(rank, digits, monkeypatch, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setattr(in_memory, "free_memory", lambda device: 0)
    for _ in range(2):
        digits.train_dataloader()
    assert capsys.readouterr().out.count("stay in main memory") == (1 if rank == 0 else 0)


def test_torchvisions_copy_is_read_and_delivered_channels_last(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)  # these are not its bytes
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10DataModule.CLASSES}))
    batches = [images(count=20, seed=k) for k in range(6)]
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for name, batch in zip(names, batches):
        content = {"data": batch.permute(0, 3, 1, 2).reshape(20, 3072).numpy(), "labels": [k % 10 for k in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    data = CIFAR10DataModule(root=str(tmp_path), val_size=10)
    train, test = data.load("train"), data.load("test")
    assert torch.equal(train.images, torch.cat(batches[:5])) and torch.equal(test.images, batches[5])
    assert train.labels.tolist() == [k % 10 for k in range(20)] * 5
    batch, _ = next(iter(BatchLoader(*data.split("train"), 30)))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_cifar100_is_one_option(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)  # these are not its bytes
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR100_CLASSES}))
    pixels = {name: images(count=300, seed=k) for k, name in enumerate(("train", "test"))}
    for name, batch in pixels.items():
        content = {
            "data": batch.permute(0, 3, 1, 2).reshape(300, 3072).numpy(),
            "fine_labels": [k % 100 for k in range(300)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    data = CIFAR10DataModule(root=str(tmp_path), dataset="cifar100", val_size=100)
    assert data.num_classes == 100 and len(set(data.class_names)) == 100 and data.class_names[99] == "worm"
    assert torch.equal(data.load("test").images, pixels["test"]) and data.load("train").labels.max() == 99
    assert data.split("val").labels.tolist() and CIFAR10DataModule().num_classes == 10


def test_split_is_stratified_disjoint_and_fixed():
    labels = torch.arange(1000) % 7
    rest, held = stratified_split(labels, 105, seed=3)
    assert sorted(torch.cat([rest, held]).tolist()) == list(range(1000))
    assert labels[held].bincount().tolist() == [15] * 7
    assert torch.equal(held, stratified_split(labels, 105, seed=3)[1])
    assert not torch.equal(held, stratified_split(labels, 105, seed=4)[1])


def test_split_of_uneven_classes_has_the_size_asked_for():
    labels = torch.tensor([0] * 10 + [1] * 11 + [2] * 3)
    for size in (1, 5, 23):
        assert len(stratified_split(labels, size, 0)[1]) == size


@pytest.mark.parametrize("size", [0, -1, 24, 30])
def test_split_refuses_sizes_that_do_not_fit(size):
    with pytest.raises(InputError, match="val_size"):
        stratified_split(torch.arange(24) % 3, size, 0)


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


def test_digits_sizes_and_range():
    data = DigitsDataModule()
    sizes = [len(data.split(s).labels) for s in ("train", "val", "test")]
    assert sizes == [1077, 360, 360]
    pixels = data.split("train").images
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (32, 32, 3)
    assert pixels.max() == 255 and pixels.min() == 0
    every = torch.cat([data.split(s).images.flatten(1) for s in ("train", "val", "test")])
    assert len(every.unique(dim=0)) == 1797  # no image twice: the splits are disjoint


def test_classes_are_relabelled_and_share_the_split_of_all_ten(tiny):
    ten = CIFAR10DataModule(root=str(tiny), val_size=50)
    two = CIFAR10DataModule(root=str(tiny), val_size=50, classes=[3, 1])
    assert two.class_names == ["cat", "automobile"]
    for name in ("train", "val", "test"):
        all_images, labels = ten.split(name)
        chosen = (labels == 3) | (labels == 1)
        assert torch.equal(two.split(name).images, all_images[chosen])
        assert torch.equal(two.split(name).labels, (labels[chosen] == 1).long())


def test_test_images_are_not_read_by_fit(tiny, run):
    (tiny / "cifar10_test.npz").write_bytes(b"no archive")
    run("fit", "softmax_regression")


def test_images_that_do_not_fit_beside_the_model_travel_in_batches(run, monkeypatch, capsys):
    resident = run("fit", "softmax_regression", "--trainer.max_epochs=2")
    capsys.readouterr()
    monkeypatch.setattr("datamodules.in_memory.free_memory", lambda device: 1e6)
    travelling = run("fit", "softmax_regression", "--trainer.max_epochs=2")
    said = [line for line in capsys.readouterr().out.splitlines() if "stay in main memory" in line]
    assert len(said) == 1 and said[0].startswith(
        "data: the train images stay in main memory, and each batch travels (with"
    )
    for ours, theirs in zip(resident.model.parameters(), travelling.model.parameters()):
        assert torch.equal(ours, theirs)


def test_own_files_with_classes_of_their_own(tmp_path, run, refused, capsys):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    np.savez(tmp_path / "own.npz", images=rng.integers(0, 255, (100, 32, 32, 3)).astype(np.uint8), labels=labels)
    own = [f"--data.train_npz={tmp_path / 'own.npz'}", "--data.class_names=[cat,dog,owl]", "--data.val_size=20"]
    cli = run("fit", "softmax_regression", *own)
    assert cli.model.class_names == ["cat", "dog", "owl"] and cli.model.linear.out_features == 3
    assert "100 images of 3 classes" in (out := capsys.readouterr().out) and "fewest 10 owl, most 60 cat" in out
    refused(
        "fit",
        "softmax_regression",
        *own[:1],
        "--data.class_names=[cat,dog]",
        words=["own.npz", "label 2", "outside 0..1"],
    )
    refused("fit", "softmax_regression", *own[:1], "--data.class_names=[cat,cat]", words=["class_names", "different"])
    refused("fit", "softmax_regression", own[1], words=["class_names", "--data.train_npz"])
