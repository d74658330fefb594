"""Fewer, coarser and noisy labels: `data.labels_per_class`, `coarse`, `label_noise`."""

import numpy as np
import pytest
import torch

from datamodules import CIFAR10DataModule
from datamodules.arrays import ImageSet
from datamodules.labels import Labelling
from errors import InputError

TEN = tuple("abcdefghij")
SMALL = "--model.encoder.init_args.widths=[8,8,16]"
COARSE = "--data.coarse={animal: [2, 3, 4, 5, 6, 7], vehicle: [0, 1, 8, 9]}"


def labelled(count=20_000):
    labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(0))
    return ImageSet(torch.arange(count), labels)  # a number in place of each image


def test_few_labels_are_the_same_for_a_seed_and_nested():
    images = labelled()
    few, more = (Labelling(TEN, labels_per_class=k).of("train", images) for k in (4, 25))
    assert few.labels.bincount().tolist() == [4] * 10 and more.labels.bincount().tolist() == [25] * 10
    assert set(few.images.tolist()) < set(more.images.tolist())
    assert torch.equal(images.labels[more.images], more.labels) and torch.equal(more.images, more.images.sort().values)
    other = Labelling(TEN, labels_per_class=4, label_seed=1).of("train", images)
    assert set(other.images.tolist()) != set(few.images.tolist())


def test_validation_has_at_most_as_many_labels_and_the_test_all():
    images = labelled(200)
    few = Labelling(TEN, labels_per_class=15)
    counts = images.labels.bincount()
    assert few.of("val", images).labels.bincount().tolist() == counts.clamp_max(15).tolist()
    assert len(few.of("test", images).labels) == 200
    with pytest.raises(InputError, match=r"data.labels_per_class 100: must be at most the \d+ images of a"):
        Labelling(TEN, labels_per_class=100).of("train", images)


@pytest.mark.parametrize("split", ["train", "val"])
def test_noise_takes_another_class_at_random(split):
    images, noisy = labelled(), Labelling(TEN, label_noise=0.4)
    found = noisy.of(split, images).labels
    wrong = found != images.labels
    assert abs(float(wrong.float().mean()) - 0.4) < 0.015
    shares = found[wrong & (images.labels == 3)].bincount(minlength=10) / (wrong & (images.labels == 3)).sum()
    assert shares[3] == 0 and all(abs(float(share) - 1 / 9) < 0.04 for i, share in enumerate(shares) if i != 3)
    assert torch.equal(found, noisy.of(split, images).labels)
    assert torch.equal(noisy.of("test", images).labels, images.labels)


def test_noise_of_training_and_validation_is_drawn_apart():
    images, noisy = labelled(), Labelling(TEN, label_noise=0.4)
    assert not torch.equal(noisy.of("train", images).labels, noisy.of("val", images).labels)


def test_confused_classes_alone_are_wrong():
    images = labelled()
    found = Labelling(TEN, label_noise=0.4, label_confusions=[[3, 5], [5, 3], [9, 1]]).of("train", images).labels
    pairs = torch.stack([images.labels, found], dim=1)[found != images.labels].unique(dim=0)
    assert pairs.tolist() == [[3, 5], [5, 3], [9, 1]]
    assert abs(float((found[images.labels == 9] == 1).float().mean()) - 0.4) < 0.04


def test_coarse_classes_hold_in_every_split():
    images, coarse = labelled(), Labelling(TEN, coarse={"low": [4, 0, 1, 2, 3], "high": [5, 6, 7, 8, 9]})
    assert coarse.class_names == ["low", "high"]
    for split in ("train", "val", "test"):
        assert torch.equal(coarse.of(split, images).labels, (images.labels > 4).long())


def test_the_digest_of_the_labels_is_that_of_those_seen(tiny):
    def digest(**options):
        data = CIFAR10DataModule(root=str(tiny), val_size=50, **options)
        data.split("train")
        return data.fingerprint["labels_sha256"]

    found = [digest(), digest(label_noise=0.2), digest(label_noise=0.2, label_seed=1), digest(labels_per_class=3)]
    assert len(set(found)) == 4 and digest(label_noise=0.2) == found[1]


def test_a_probe_of_ten_classes_on_an_encoder_of_two(run, refused, tmp_path):
    cli = run("fit", "triplet_encoder", SMALL, COARSE)
    assert cli.model.class_names == ["animal", "vehicle"] and cli.model.num_classes == 2
    refused("fit", "linear_probe", words=["animal", "other_data true"])
    probe = run("fit", "linear_probe", "--frozen_encoder.other_data=true")
    assert probe.model.num_classes == 10
    run("test", "triplet_encoder", SMALL, COARSE, "--ckpt_path=best")


def test_an_encoder_of_noisy_labels_is_one_of_other_labels(run, refused):
    noisy = "--data.label_noise=0.3"
    run("fit", "triplet_encoder", SMALL, noisy)
    refused("fit", "linear_probe", words=["same images with other labels"])
    run("fit", "linear_probe", noisy)


@pytest.mark.parametrize(
    "option, words",
    [
        ("labels_per_class=0", ["labels_per_class 0", "at least 1"]),
        ("labels_per_class=26", ["labels_per_class 26", "images of"]),
        ("label_noise=1", ["label_noise 1", "below 1"]),
        ("label_confusions=[[3,5]]", ["label_confusions", "beside a data.label_noise"]),
        ("label_seed=-1", ["label_seed -1"]),
        ("coarse={0: [0,1,2,3,4], 1: [5,6,7,8,9]}", ["data.coarse", "named in quotes"]),
        ("coarse={a: [0], b: [1]}", ["data.coarse", "each of the 10 classes once"]),
        ("coarse={a: [0,1,2,3,4,5,6,7,8,9], b: []}", ["data.coarse", "each of the 10 classes once"]),
    ],
)
def test_impossible_labels_are_refused(refused, option, words):
    refused("fit", "softmax_regression", f"--data.{option}", words=words)


@pytest.mark.parametrize("pairs", [[], [[1]], [[3, 3]], [[3, 10]], [[3, 5], [3, 8]], [[-1, 2]]])
def test_impossible_confusions_are_refused(pairs):
    with pytest.raises(InputError, match="data.label_confusions"):
        Labelling(TEN, label_noise=0.4, label_confusions=pairs)


def test_labels_that_are_not_there_cannot_be_changed(tiny, tmp_path, refused):
    with np.load(tiny / "cifar10_train.npz") as file:
        np.savez(tmp_path / "unlabelled.npz", images=file["images"])
    own = f"--data.train_npz={tmp_path / 'unlabelled.npz'}"
    refused("fit", "label_free_encoder", SMALL, own, "--data.label_noise=0.2", words=["label_noise 0.2", "no labels"])
