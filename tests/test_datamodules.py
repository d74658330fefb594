"""Data sets: what is read, split, cached and printed, and their options."""

import http.client
import os
import pickle
import socket
import ssl
import tarfile
import urllib.error
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_only
from test_loader import images

from datamodules import CIFAR10DataModule, DigitsDataModule, in_memory, loader
from datamodules.arrays import ImageSet, image_digests, random_split
from datamodules.cifar10 import CIFAR100_CLASSES
from datamodules.in_memory import InMemoryDataModule
from datamodules.loader import BatchLoader
from errors import InputError, local_path
from main import main


@pytest.fixture
def digits():
    """The digits as a fit on one CPU process sees them, not augmented."""
    data = DigitsDataModule(translate=0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, overfit_batches=0)
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
    expected |= {"views": 1, "crop_scale": None, "color_jitter": 0.0, "greyscale": 0.0}
    expected |= {"small_views": 0, "small_size": 16, "small_scale": [0.08, 0.4], "coarse": None}
    expected |= {"labels_per_class": None, "label_noise": 0.0, "label_confusions": None, "label_seed": 0}
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


def test_split_is_disjoint_fixed_and_never_asks_for_labels():
    rest, held = random_split(1000, 105, seed=3)
    assert sorted(torch.cat([rest, held]).tolist()) == list(range(1000)) and len(held) == 105
    assert torch.equal(held, random_split(1000, 105, seed=3)[1])
    assert not torch.equal(held, random_split(1000, 105, seed=4)[1])


@pytest.mark.parametrize("size", [-1, 24, 30])
def test_split_refuses_sizes_that_do_not_fit(size):
    with pytest.raises(InputError, match="val_size"):
        random_split(24, size, 0)


def test_an_image_is_known_again_by_its_digest():
    some = images(50)
    digests = image_digests(some)
    assert len(digests.unique()) == 50 and torch.equal(image_digests(some[7:9].clone()), digests[7:9])


def test_a_class_without_validation_images_is_reported(capsys):
    class Rare(InMemoryDataModule):
        CLASSES = ("common", "rare", "rarest")

        def load(self, split):
            return ImageSet(images(40), torch.tensor([0] * 38 + [1, 2]))

    assert len(Rare(val_size=2, batch_size=4).split("val").labels) == 2
    assert "2 of the classes have no validation image: rare, rarest" in capsys.readouterr().out


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
    monkeypatch.setattr("datamodules.in_memory.free_memory", lambda device: 6.6e6)
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


@pytest.mark.parametrize("names", ["[yes,no,on]", "[1,2,3]", "[1.5,a,b]", "[null,a,b]", "['',a,b]"])
def test_class_names_that_yaml_takes_for_something_else_are_refused(tiny, refused, names):
    own = f"--data.train_npz={tiny / 'cifar10_train.npz'}"
    refused("fit", "softmax_regression", own, f"--data.class_names={names}", words=["data.class_names", "quotes"])


@pytest.mark.parametrize("command", ["test", "predict"])
def test_own_training_images_need_their_own_test_images(tiny, run, refused, command):
    own = f"--data.train_npz={tiny / 'cifar10_train.npz'}"
    run("fit", "softmax_regression", own)
    refused(command, "softmax_regression", own, "--ckpt_path=best", words=["data.test_npz", "data.train_npz"])
    run(command, "softmax_regression", own, f"--data.test_npz={tiny / 'cifar10_test.npz'}", "--ckpt_path=best")


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_model_of_an_own_training_file_is_not_tested_on_cifar10_unasked(tiny, run, refused, command):
    own = [f"--data.train_npz={tiny / 'cifar10_train.npz'}", f"--data.test_npz={tiny / 'cifar10_test.npz'}"]
    run("fit", "softmax_regression", own[0])
    words = ["data.images is your own files (data.train_npz), this command's is cifar10"]
    refused(command, "softmax_regression", "--ckpt_path=best", words=words)
    for options in (own, own[1:]):
        run(command, "softmax_regression", "--ckpt_path=best", *options)
    run("fit", "softmax_regression")  # and one of CIFAR-10 is tested on whatever images it is given
    run("validate", "softmax_regression", "--ckpt_path=best", own[0])  # the same images under another name
    for options in ([], own[1:]):
        run(command, "softmax_regression", "--ckpt_path=best", *options)


def test_an_npz_may_hold_other_files_too(tiny, run):
    with zipfile.ZipFile(tiny / "cifar10_train.npz", "a") as archive:
        for name in ("README.txt", "images", "labels"):
            archive.writestr(name, "no array")
    run("fit", "softmax_regression", "--trainer.max_steps=1")


def test_an_npz_with_another_file_in_place_of_its_images_is_refused(tiny, refused):
    with zipfile.ZipFile(tiny / "cifar10_train.npz", "w") as archive:
        archive.writestr("images", "no array")
    refused("fit", "softmax_regression", words=["cifar10_train.npz: no array named 'images' (found: images)"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_name_of_no_file_is_refused(refused, split):
    words = [f"data.{split}_npz '': must be a file's name"]
    refused("fit", "softmax_regression", f"--data.{split}_npz=", words=words)


@pytest.mark.parametrize("place", ["data", "closed.npz"])
def test_a_place_that_may_not_be_looked_at_is_one_line(tmp_path, tiny, refused, monkeypatch, place):
    def denied_in(call):
        def denied(path, *args, **options):
            if str(path).startswith(str(tmp_path / place)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **options)

        return denied

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, denied_in(getattr(os, name)))
    options = [f"--data.train_npz={tmp_path / place}"] if place == "closed.npz" else ["--data.download=false"]
    refused("fit", "softmax_regression", *options, words=[str(tmp_path / place)])


def test_a_link_that_leads_nowhere_is_refused_before_a_download(tiny, refused):
    (tiny / "cifar10_train.npz").unlink()
    (tiny / "cifar10_train.npz").symlink_to(tiny / "gone.npz")
    refused("fit", "softmax_regression", words=["cifar10_train.npz: no such file"])


BROKEN = [
    http.client.IncompleteRead(b""), http.client.BadStatusLine("garbage"), http.client.RemoteDisconnected(),
    urllib.error.URLError("no route"), TimeoutError(), ssl.SSLError("certificate"), zlib.error("incorrect header"),
    EOFError("ended before the marker"), tarfile.ReadError("truncated"), RuntimeError("File not found or corrupted."),
]  # fmt: skip


@pytest.mark.parametrize("error", BROKEN, ids=lambda e: type(e).__name__)
def test_a_download_that_breaks_off_is_one_line_with_what_to_do(tmp_path, tiny, refused, monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr("datamodules.cifar10.CIFAR10", broken)
    words = ["no intact CIFAR-10", "put cifar10_train.npz into"]
    refused("fit", "softmax_regression", f"--data.root={tmp_path / 'empty'}", words=words)


def test_a_home_that_there_is_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="~nobody-here/data: there is no home of a user nobody-here"):
        local_path("~nobody-here/data")
    (tmp_path / "~nobody-here").mkdir()
    assert local_path("~nobody-here").is_dir()


def test_a_path_that_may_not_be_looked_at_is_one_line(monkeypatch):
    def denied(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched, pytest.raises(InputError, match="the variable b is not set"):
        patched.delenv("b", raising=False)
        patched.setattr(os, "stat", denied)
        local_path("/closed/a$b")


def test_a_server_that_goes_silent_is_given_up(tmp_path, tiny, refused, monkeypatch):
    monkeypatch.setattr("datamodules.cifar10.SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes the connection and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        root = f"--data.root={tmp_path / 'empty'}"
        refused("fit", "softmax_regression", root, words=["timed out", "put cifar10_train"])
    assert socket.getdefaulttimeout() is None
