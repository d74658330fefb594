"""Data and numbers that are hard on a fit: losses that are not finite, bfloat16, noise, odd classes."""

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from worker import LOSSES

from datamodules.arrays import ImageSet
from datamodules.in_memory import InMemoryDataModule
from errors import InputError
from lightning_modules import FastEncoder, MultiNegativeLoss, SupervisedEncoder, TripletEncoder

SMALL = "--model.encoder.init_args.widths=[8,8,8]"
HUGE = "--model.lr=1e30"


@pytest.mark.parametrize(
    "stage",
    ["softmax_regression", "logistic_regression", "triplet_encoder", "supervised_encoder", "linear_probe", "mlp_probe"],
)
def test_a_loss_that_is_not_finite_ends_the_fit_with_the_last_good_checkpoint(tmp_path, run, stage):
    options = {"logistic_regression": ["--data.classes=[0,1]", "--data.batch_size=10"]}.get(stage, [])
    options += [SMALL] if "encoder" in stage else []
    if "probe" in stage:
        run("fit", "triplet_encoder", SMALL)
    with pytest.raises(
        InputError,
        match=r"the loss is not finite at step \d+ \(learning rate .*\): start anew with a lower model.lr.*step0.ckpt",
    ) as found:
        run("fit", stage, *options, HUGE, "--trainer.precision=32-true")
    folder = tmp_path / "runs" / stage / "version_0" / "checkpoints"
    assert str(folder) in str(found.value) and [p.name for p in folder.iterdir()] == ["step0.ckpt"]


def test_a_later_loss_that_is_not_finite_leaves_the_last_epochs_checkpoint(tmp_path, run):
    run("fit", "softmax_regression", "--model.schedule=constant")
    last = tmp_path / "runs" / "softmax_regression" / "version_0" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = float("inf")
    torch.save(checkpoint, last)
    spoilt = last.read_bytes()
    with pytest.raises(InputError, match="at step .*the last good checkpoint is .*last.ckpt"):
        run("fit", "softmax_regression", "--model.schedule=constant", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert last.read_bytes() == spoilt != before


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_embeddings_give_the_loss_of_float32_ones(name):
    """Losses compute in float32 whatever the network does: the same as on embeddings rounded to bfloat16 and back."""
    torch.manual_seed(0)
    z, labels = torch.randn(48, 8), torch.arange(48) % 5
    loss = LOSSES[name]()
    module = TripletEncoder(FastEncoder([8, 8, 8]), loss, z_dim=8).eval()
    rounded = z.bfloat16().requires_grad_()
    exact = z.bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module.contrastive_loss(rounded, labels, 0)
    reference = module.contrastive_loss(exact, labels, 0)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, reference)
    mixed.backward()
    reference.backward()
    assert (rounded.grad.float() - exact.grad).norm() <= 0.01 * exact.grad.norm()
    # And near that of embeddings that were never rounded.
    assert float(reference.detach()) == pytest.approx(float(module.contrastive_loss(z, labels, 0).detach()), rel=0.03)


class Made(InMemoryDataModule):
    """`count` images for training and 40 tests, each class a colour under noise; `noise`: the share of wrong labels."""

    def __init__(self, classes_made=10, count=600, noise=0.0, single=False, **options):
        self.CLASSES = tuple(f"class {i}" for i in range(classes_made))
        super().__init__(None, options.pop("val_size", count // 5), 0, options.pop("batch_size", 60), True, 2)
        self.count, self.noise, self.single = count, noise, single

    def load(self, split):
        rng = np.random.default_rng(split == "test")
        classes = len(self.CLASSES)
        labels = np.arange(self.count if split == "train" else 4 * classes) % classes
        if self.single and split == "train":  # the last class has one image
            labels[(labels == classes - 1).nonzero()[0][1:]] = 0
        colours = np.random.default_rng(7).integers(40, 216, (classes, 1, 1, 3))
        images = colours[labels] + rng.integers(-40, 40, (len(labels), 32, 32, 3))
        wrong = (rng.random(len(labels)) < self.noise) & (split == "train")
        labels = np.where(wrong, rng.integers(0, classes, len(labels)), labels)
        return ImageSet(torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))


@pytest.mark.parametrize(
    "options, bar",
    [
        (dict(noise=0.4), 0.9),
        (dict(single=True), 0.8),
        (dict(count=24, batch_size=8, val_size=4, classes_made=4), 0.7),
        (dict(classes_made=100, count=2000, batch_size=200), 0.4),
    ],
    ids=["40 % wrong labels", "a class of one image", "20 images", "100 classes"],
)
@pytest.mark.parametrize("kind", ["triplet", "supervised"])
def test_hard_data_trains_without_surprises(options, bar, kind):
    torch.manual_seed(0)
    data = Made(**options)
    args = dict(num_classes=data.num_classes, lr=0.1, weight_decay=1e-4)
    encoder = FastEncoder([16, 32, 32])
    model = (
        TripletEncoder(encoder, MultiNegativeLoss(), **args)
        if kind == "triplet"
        else SupervisedEncoder(encoder, **args)
    )
    trainer = Trainer(
        max_steps=120, max_epochs=-1, precision="32-true", accelerator="cpu", logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    print(found)
    assert all(np.isfinite(value) for value in found.values())
    assert found["test/knn_accuracy" if kind == "triplet" else "test/accuracy"] >= bar
