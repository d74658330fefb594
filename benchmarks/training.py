"""Encoder training beside its bare limit, and beside the usual way to write it.

    pip install -e '.[benchmarks]' && python -m benchmarks.training

Images/s of `main.py fit` with configs/triplet_encoder.yaml and all its callbacks, over the steps of an epoch after the
warm-up, beside
- the bare limit: forward, loss, backward and optimiser step of a copy of the network on one batch in place. Both take
  turns of ten steps, since processes a minute apart differ by more than that on a shared machine;
- the usual way around the same network, batch 512: torchvision transforms in a DataLoader with two workers,
  pytorch-metric-learning's semi-hard miner and triplet loss, in a plain LightningModule. Ours then mines those too.
The last rows are bare steps with freed memory kept, as main.py does, and returned to the kernel, as glibc does.
All sides have the same images, precision and options of the config; fresh processes, in turn.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_metric_learning import losses, miners
from torch import Tensor
from torchvision import transforms

from benchmarks.common import Clock, Rows, bare_step, fit_with, fresh, in_turn, random_batch, run, shipped, summary
from cli import bf16_is_native
from datamodules.arrays import read_npz
from main import keep_freed_memory

MARGIN = 0.2
CONSTANT = "--model.schedule=constant"
DRY_RUN = {"steps": 30, "batch": 50}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=60, help="of every fit (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="of semi-hard mining (default: %(default)s)")


def semihard(options: argparse.Namespace) -> list[str]:
    loss = ["--model.loss=TripletMarginLoss", "--model.loss.triplets=semihard", f"--model.loss.margin={MARGIN}"]
    distance = ["--model.loss.distance=EuclideanDistance", "--model.loss.distance.normalize=true"]
    return [f"--data.batch_size={options.batch}", *loss, *distance]


class BesideBareLimit(Callback):
    """Lets the fit and its bare limit take turns, `BLOCK` steps each, and sums up the seconds of both."""

    BLOCK = 10

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.trainer = None  # which would be copied too
        model = copy.deepcopy(pl_module)
        pl_module.trainer = trainer
        model.hparams.schedule = "constant"  # the triangular one needs a trainer
        pixels, labels = (x[: trainer.datamodule.batch_size] for x in trainer.datamodule.split("train"))
        images = (pixels.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
        self._step = bare_step(model, images, labels, trainer.precision == "bf16-mixed")
        self.fit = self.bare = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.BLOCK:
            return
        fitted = time.perf_counter()
        for _ in range(self.BLOCK):
            self._step()
        stepped = time.perf_counter()
        if trainer.global_step > self.BLOCK:  # the first one warms up
            self.fit, self.bare = self.fit + fitted - self._since, self.bare + stepped - fitted
        self._since = stepped


def ours(options: argparse.Namespace, name: str, *more: str) -> dict[str, float]:
    """Images/s of the fit, and of its bare limit."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--trainer.accelerator=cpu", f"--trainer.max_steps={options.steps}", *more]
        cli, found = fit_with(BesideBareLimit, options, "triplet_encoder", folder, *given)
    images = (options.steps // found.BLOCK - 1) * found.BLOCK * cli.datamodule.batch_size
    return {name: images / found.fit, f"bare limit, {name}": images / found.bare}


class Images(torch.utils.data.TensorDataset):
    """Images and labels as torchvision's data sets deliver them, augmented or not; `more` transforms come last."""

    def __init__(self, images: Tensor, labels: Tensor, augmented: bool = True, *more: Callable) -> None:
        super().__init__(images, labels)
        random = [transforms.RandomCrop(32, 2, padding_mode="reflect"), transforms.RandomHorizontalFlip()] * augmented
        self.transform = transforms.Compose([transforms.ToPILImage(), *random, transforms.ToTensor(), *more])

    def __getitem__(self, i: int):
        image, label = super().__getitem__(i)
        return self.transform(image.numpy()), label


class Usual(LightningModule):
    def __init__(self, model: LightningModule) -> None:
        super().__init__()
        self.model, self.loss = model, losses.TripletMarginLoss(MARGIN)
        self.miner = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        z = self.model(images.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast("cpu", enabled=False):
            loss = self.loss(z, labels, self.miner(z, labels))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return self.model.configure_optimizers()["optimizer"]


def usual(options: argparse.Namespace) -> dict[str, float]:
    data, clock = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), Clock()
    module = Usual(shipped(options, "triplet_encoder", CONSTANT, *semihard(options)).model)
    module.model.encoder.initialize(data.images)
    loader = torch.utils.data.DataLoader(Images(*data), options.batch, shuffle=True, drop_last=True, num_workers=2)
    quiet = {"logger": False, "enable_checkpointing": False, "max_steps": options.steps, "callbacks": [clock]}
    precision = "bf16-mixed" if bf16_is_native() else "32-true"
    Trainer(accelerator="cpu", precision=precision, **quiet).fit(module, loader)
    return {"the usual way": clock.rate(options.batch)}


def bare(options: argparse.Namespace, memory: str) -> dict[str, float]:
    """Images/s of bare steps, and their page faults, with freed memory `kept` or `returned`."""
    import resource

    if memory == "kept":
        keep_freed_memory()
    made = shipped(options, "triplet_encoder", CONSTANT)
    step = bare_step(made.model, *random_batch(made.data.batch_size), bf16_is_native())
    for _ in range(5):
        step()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(options.steps):
        step()
    rate = options.steps * made.data.batch_size / (time.perf_counter() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / options.steps
    return {f"bare steps, freed memory {memory}": rate, f"freed memory {memory}": faults}


def rows(options: argparse.Namespace) -> Rows:
    default, mined = "default config", f"semi-hard, batch {options.batch}"
    sides = {
        default: lambda: fresh(ours, options, default),
        mined: lambda: fresh(ours, options, mined, *semihard(options)),
        "usual": lambda: fresh(usual, options),
    }
    if sys.platform == "linux":  # of whose memory it is
        sides |= {"kept": lambda: fresh(bare, options, "kept"), "returned": lambda: fresh(bare, options, "returned")}
    found = in_turn(sides, options.repetitions).values()
    rates = {name: [values[name] for values in side] for side in found for name in side[0]}
    faults = {name: rates.pop(name) for name in list(rates) if name.startswith("freed memory")}
    beside = {name: f"bare limit, {name}" for name in (default, mined)}
    beside |= {"the usual way": mined, "bare steps, freed memory kept": "bare steps, freed memory returned"}
    return summary(rates, "images/s", beside) + summary(faults, "page faults a step", {})


if __name__ == "__main__":
    run("benchmarks.training")
