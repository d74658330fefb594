"""No label reaches a weight or a choice of an encoder that learns from views, and what a probe on it may be given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint_file import load_checkpoint
from datamodules.arrays import random_split
from main import main

SMALL = "--model.encoder.init_args.widths=[8,8,8]"


def fitted(tmp_path, name, *data):
    runs = tmp_path / name
    config = ["--config", "configs/label_free_encoder.yaml", SMALL, "--data.val_size=50", "--data.batch_size=60"]
    config += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", f"--trainer.logger.save_dir={runs}"]
    return main(["fit", *config, *data]), runs / "label_free_encoder/version_0"


@pytest.fixture
def forms(tiny):
    """The options of the same pictures labelled, with shuffled labels, as a file without labels, and as a folder."""
    with np.load(tiny / "cifar10_train.npz") as file:
        images, labels = file["images"], file["labels"]
    np.savez(tiny / "shuffled.npz", images=images, labels=np.random.default_rng(0).permutation(labels))
    np.savez(tiny / "unlabelled.npz", images=images)
    (tiny / "folder/train").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tiny / f"folder/train/{i:04}.png")
    files = {name: [f"--data.train_npz={tiny / f'{name}.npz'}"] for name in ("shuffled", "unlabelled")}
    folder = ["--data=ImageFolderDataModule", f"--data.root={tiny / 'folder'}"]
    return {"labelled": [f"--data.root={tiny}"], **files, "folder": folder}


def test_four_forms_of_the_data_give_the_same_bits(tmp_path, forms, capsys):
    views = ["--data.translate=0", "--data.views=2", "--data.crop_scale=[0.2,1]", "--data.color_jitter=0.5"]
    views += ["--data.greyscale=0.2", "--data.small_views=2"]
    found = {}
    for name, data in forms.items():
        cli, folder = fitted(tmp_path, name, *data, *views)
        printed = capsys.readouterr().out
        assert ("main.py validate" in printed) == (name in ("unlabelled", "folder"))
        assert (folder / "tsne.png").stat().st_size and (folder / "pca.png").stat().st_size
        metrics = {k: float(v) for k, v in cli.trainer.callback_metrics.items() if "view" in k or "loss" in k}
        assert ("val_sample/knn_accuracy" in cli.trainer.callback_metrics) == (name in ("labelled", "shuffled"))
        best = cli.trainer.checkpoint_callback.best_model_path.rsplit("/", 1)[-1]
        found[name] = cli.model.state_dict(), metrics, best
    weights, metrics, best = found.pop("labelled")
    for name, (others, other_metrics, other_best) in found.items():
        assert (other_metrics, other_best) == (metrics, best), name
        assert all(torch.equal(others[k], v) for k, v in weights.items()), name


def test_the_first_blocks_are_read_by_probes_alone(tmp_path, forms, run):
    one, other = (
        fitted(tmp_path, name, *forms["labelled"], f"--model.encoder.init_args.all_blocks={read}")
        for name, read in (("runs", "true"), ("last", "false"))
    )
    assert all(torch.equal(other[0].model.state_dict()[k], v) for k, v in one[0].model.state_dict().items())
    assert one[0].trainer.callback_metrics == other[0].trainer.callback_metrics  # nearest neighbours too
    for (_, folder), width in ((one, 8 + 9 * 16), (other, 8)):
        assert run("fit", "linear_probe", f"--frozen_encoder.run={folder}").model.head.in_features == width


def test_an_encoder_of_unlabelled_images_is_validated_and_probed_on_the_same_labelled(tmp_path, forms, run, refused):
    _, folder = fitted(tmp_path, "runs", *forms["unlabelled"])
    assert load_checkpoint(folder / "checkpoints/last.ckpt")["stage"]["class_names"] == []
    config = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder)]
    validated = main(["validate", *config]).trainer.callback_metrics
    assert "val/view_accuracy" in validated and "val/knn_accuracy" not in validated
    run("fit", "linear_probe", f"--frozen_encoder.run={folder}")
    run("fit", "linear_probe", f"--frozen_encoder.run={folder}", "--data.classes=[0,1]", "--data.batch_size=20")
    data = [*forms["unlabelled"], f"--data.test_npz={tmp_path / 'data/cifar10_test.npz'}"]
    refused("predict", "label_free_encoder", SMALL, *data, f"--ckpt_path={folder}", words=["no labels"])


@pytest.mark.parametrize("config", ["softmax_regression", "triplet_encoder", "supervised_encoder"])
def test_what_needs_labels_says_so(forms, refused, config):
    refused("fit", config, *forms["unlabelled"], words=["no labels", "model.positives view"])


def test_classes_of_unlabelled_images_are_refused(forms, refused):
    refused("fit", "label_free_encoder", SMALL, *forms["unlabelled"], "--data.classes=[0,1]", words=["data.classes"])


def test_other_data_is_refused_unless_allowed_and_then_reported_and_recorded(
    tmp_path, tiny, forms, run, refused, capsys
):
    _, folder = fitted(tmp_path, "runs", *forms["labelled"])
    with np.load(tiny / "cifar10_train.npz") as file:
        images, labels = file["images"], file["labels"]
    np.savez(tiny / "other.npz", images=255 - images, labels=labels)
    probe = "linear_probe", f"--frozen_encoder.run={folder}", f"--data.train_npz={tiny / 'other.npz'}"
    refused("fit", *probe, words=["trained on other images", "--frozen_encoder.other_data true"])
    capsys.readouterr()
    cli = run("fit", *probe, "--frozen_encoder.other_data=true")
    assert "other_data: " in capsys.readouterr().out
    probed = load_checkpoint(Path(cli.trainer.checkpoint_callback.best_model_path))
    encoder = load_checkpoint(folder / "checkpoints/last.ckpt")
    assert probed["encoder_data"] == encoder["data"] != probed["data"]
    assert set(encoder["seen_images"].tolist()) < set(probed["seen_images"].tolist())
    tuned = run("fit", "fine_tune", f"--data.train_npz={tiny / 'other.npz'}")
    saved = load_checkpoint(Path(tuned.trainer.checkpoint_callback.best_model_path))
    assert saved["encoder_data"] == encoder["data"] and torch.equal(saved["seen_images"], probed["seen_images"])


def test_test_images_that_the_encoder_has_seen_are_reported(tmp_path, tiny, forms, run):
    with np.load(tiny / "cifar10_train.npz") as file, np.load(tiny / "cifar10_test.npz") as test:
        np.savez(tiny / "everything.npz", images=np.concatenate([255 - file["images"], test["images"]]))
    _, folder = fitted(tmp_path, "runs", f"--data.train_npz={tiny / 'everything.npz'}")
    run("fit", "linear_probe", f"--frozen_encoder.run={folder}", "--frozen_encoder.other_data=true")
    with pytest.warns(UserWarning, match="of the test images are among those that the encoder was trained on"):
        run("test", "linear_probe", "--ckpt_path=best")


@pytest.mark.parametrize("part", ["pixels_sha256", "seen_images"])
def test_an_encoder_that_does_not_say_what_it_has_seen_is_refused(tmp_path, forms, refused, part):
    _, folder = fitted(tmp_path, "runs", *forms["labelled"])
    checkpoint = load_checkpoint(folder / "checkpoints/last.ckpt")
    checkpoint["data"].pop(part, None)
    checkpoint.pop(part, None)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    probe = [f"--frozen_encoder.run={tmp_path / 'old.ckpt'}", "--data.split_seed=1"]
    refused("fit", "linear_probe", *probe, words=["does not say which images", "fit it again"])


def test_images_without_class_folders_are_refused_by_what_needs_classes(forms, refused):
    for config in ("logistic_regression", "supervised_encoder"):
        options = ["--data.classes=null"] if config.startswith("logistic") else []
        refused("fit", config, *forms["folder"], *options, words=["num_classes 0", "model.positives view"])


def test_validation_images_that_were_seen_are_refused_always(tmp_path, tiny, forms, run, refused):
    """In another file, in another order, without labels there."""
    _, folder = fitted(tmp_path, "runs", *forms["unlabelled"])
    with np.load(tiny / "cifar10_train.npz") as file:
        images, labels = file["images"], file["labels"]
    np.savez(tiny / "turned.npz", images=images[::-1], labels=labels[::-1])
    probe = "linear_probe", f"--frozen_encoder.run={folder}", f"--data.train_npz={tiny / 'turned.npz'}"
    refused("fit", *probe, "--frozen_encoder.other_data=true", words=["has seen", "validation images"])
    # Images that only the probe has, and one that the encoder has seen, in every split of the probe's.
    seen = images[random_split(300, 50, 0)[0][0]]
    unseen = np.concatenate([255 - images[:200], np.repeat(seen[None], 100, 0)])
    np.savez(tiny / "apart.npz", images=unseen, labels=labels)
    given = [f"--frozen_encoder.run={folder}", f"--data.train_npz={tiny / 'apart.npz'}"]
    run("fit", "linear_probe", *given, "--frozen_encoder.other_data=true")


def test_other_labels_matter_to_an_encoder_that_has_used_them_alone(tmp_path, forms, run, refused):
    run("fit", "triplet_encoder", SMALL)
    refused("fit", "linear_probe", *forms["shuffled"], words=["the same images with other labels"])
    _, folder = fitted(tmp_path, "free", *forms["shuffled"])
    run("fit", "linear_probe", f"--frozen_encoder.run={folder}")
