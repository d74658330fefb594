"""On the real images: sizes, the published statistics, and the pixel stages' accuracies."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS

from datamodules import CIFAR10DataModule
from lightning_modules.encoders.contract import channel_statistics
from main import main


@pytest.fixture(scope="module")
def data(cifar10):
    return CIFAR10DataModule(root=str(cifar10))


def test_sizes(data):
    for split, size in (("train", 45_000), ("val", 5_000), ("test", 10_000)):
        images, labels = data.split(split).images, data.split(split).labels
        assert images.shape[0] == size and images.dtype == torch.uint8
        # At random: a class's share of 5,000 has a standard deviation of 20 images.
        assert (torch.bincount(labels) - size // 10).abs().max() <= (0 if split == "test" else 80)


def test_channel_statistics_are_the_published_ones(data):
    # 0.4914 0.4822 0.4465 and 0.2470 0.2435 0.2616 over all 50,000 (cifar10-airbench's constants); ours are of 45,000.
    mean, std = channel_statistics(data.split("train").images)
    assert mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    assert std.flatten().tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=2e-3)


def test_no_image_is_in_two_splits(data):
    seen = [{image.tobytes() for image in np.asarray(data.split(split).images)} for split in ("train", "val", "test")]
    assert len(seen[0] & seen[1]) <= 10 and not seen[1] & seen[2] and not seen[0] & seen[2]


@pytest.mark.parametrize("config, bar", [("logistic_regression", 0.81), ("softmax_regression", 0.4)])
def test_pixel_stages_reach_their_accuracy(cifar10, tmp_path, config, bar):
    common = ["--config", str(CONFIGS / f"{config}.yaml"), f"--data.root={cifar10}", "--trainer.accelerator=cpu"]
    common.append(f"--trainer.logger.save_dir={tmp_path}")
    main(["fit", *common])
    cli = main(["validate", *common, "--ckpt_path=best"])
    assert cli.trainer.callback_metrics["val/accuracy"] >= bar


def test_encoder_learns_within_forty_steps(data, tmp_path):
    """kNN accuracy on validation features, before and after, by the shipped config, on the first 4,000 images."""
    images, labels = (x[:4000].numpy() for x in data.split("train"))
    np.savez(tmp_path / "cifar10_train.npz", images=images, labels=labels)
    common = ["--config", str(CONFIGS / "triplet_encoder.yaml"), f"--data.root={tmp_path}", "--trainer.accelerator=cpu"]
    common += [f"--trainer.logger.save_dir={tmp_path}", "--data.val_size=500"]
    main(["fit", *common, "--trainer.max_steps=40"])
    run = tmp_path / "triplet_encoder" / "version_0"
    before, after = (
        main(["validate", *common, f"--ckpt_path={path}"]).trainer.callback_metrics["val/knn_accuracy"]
        for path in (run / "checkpoints" / "step0.ckpt", run)
    )
    assert after >= before + 0.1, (before, after)
