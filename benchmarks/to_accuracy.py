"""Seconds to an accuracy on test images: this project's encoder and linear probe beside others.

    pip install -e '.[benchmarks]'
    python -m benchmarks.to_accuracy --airbench ../cifar10-airbench --json runs/to_accuracy.json
    python -m benchmarks.to_accuracy --seeds 1 --ours triplet_encoder:9 triplet_encoder:13 --usual 10

Each line is a whole fit of so many epochs in a process of its own: the median of its seconds and the mean of its
accuracies over the seeds. The fits take turns. The test images are read once, at the end.

- Ours: seconds of the encoder's fit and the probe's, on 45,000 images, with validations on the other 5,000.
- airbench94_muon.py: seconds of its `main`, on 50,000 images, with an evaluation after each epoch. It runs on the CPU
  as it is, but for bf16 autocast in place of float16, no compilation, and the number of epochs.
- ResNet-18: pytorch-metric-learning's SupConLoss in a plain LightningModule, SGD with one cycle of the learning rate,
  batches of 256 out of 50,000 images by torchvision transforms in a DataLoader with two workers; then scikit-learn's
  logistic regression on its features. No validations.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_metric_learning.losses import SupConLoss
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models, transforms

from benchmarks.common import QUIET, Rows, fit, fresh, in_turn, run
from benchmarks.training import Images
from cli import bf16_is_native
from datamodules.arrays import read_npz
from datamodules.cifar10 import CIFAR10DataModule
from errors import InputError, require
from main import keep_freed_memory
from run_folder import Run

SCRIPT, EPOCHS = "airbench94_muon.py", "ceil(8 * len(train_loader))"
DRY_RUN = {"ours": ["triplet_encoder:2"], "usual": [1], "seeds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    fits = "configs and epochs (default: %(default)s)"
    parser.add_argument("--ours", nargs="*", default=["triplet_encoder:9", "triplet_encoder:13"], help=fits)
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="a checkout of KellerJordan/cifar10-airbench")
    parser.add_argument("--epochs", nargs="+", type=int, default=[8], help="of airbench (default: %(default)s)")
    parser.add_argument("--usual", nargs="+", type=int, default=[], metavar="EPOCHS", help="of ResNet-18")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")


def ours(options: argparse.Namespace, config: str, epochs: int, seed: int) -> tuple[float, float]:
    """Seconds of encoder and probe, and the probe's test accuracy."""
    shared = ["--quiet", "--pictures=false", f"--seed_everything={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        encoder = fit(options, config, folder, *shared, f"--trainer.max_epochs={epochs}").run
        probe = fit(options, "linear_probe", folder, *shared, f"--frozen_encoder.run={encoder.folder}").run
        tested = fit(options, "linear_probe", folder, *shared, f"--ckpt_path={probe.folder}", verb="test").trainer
        seconds = sum(Run(run.folder).finished["seconds"] for run in (encoder, probe))
    return seconds, float(tested.callback_metrics["test/accuracy"])


class Clock:
    """Stands for torch.cuda.Event."""

    def __init__(self, **options) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Clock") -> float:
        return 1000 * (other.at - self.at)


def airbench(options: argparse.Namespace, epochs: int, seed: int) -> tuple[float, float]:
    """Seconds of its `main`, and the accuracy with its test-time augmentation."""
    keep_freed_memory()
    source = (options.airbench / SCRIPT).read_text(encoding="utf-8")
    require(source.count(EPOCHS) == 1, "--airbench", options.airbench, f"a checkout whose {SCRIPT} has {EPOCHS} once")
    source = source.replace(EPOCHS, EPOCHS.replace("8", str(epochs)))
    load, before = torch.load, Path.cwd()
    patches = {
        (torch, "load"): lambda path, map_location=None: load(path, weights_only=True),
        (torch, "compile"): lambda function: function,
        (torch.Tensor, "half"): torch.Tensor.float,
        (nn.Module, "half"): nn.Module.float,
        (torch.cuda, "Event"): Clock,
        (torch.cuda, "synchronize"): lambda: None,
        (sys, "argv"): [str((options.airbench / SCRIPT).resolve())],
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            data = read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10)
            content = {"images": data.images, "labels": data.labels, "classes": list(CIFAR10DataModule.CLASSES)}
            torch.save(content, Path(folder) / "cifar10" / f"{split}.pt")
        for (owner, name), replacement in patches.items():
            stack.enter_context(patch.object(owner, name, replacement))
        stack.callback(os.chdir, before)
        os.chdir(folder)
        script = {"__name__": "airbench"}
        exec(compile(source, SCRIPT, "exec"), script)
        torch.manual_seed(seed)
        model = script["CifarNet"]().to(memory_format=torch.channels_last)
        forward = model.forward

        def in_bf16(*args, **more):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_native()):
                return forward(*args, **more).float()

        model.forward = in_bf16
        began = time.perf_counter()
        accuracy = script["main"](seed, model)
    return time.perf_counter() - began, accuracy


class Usual(LightningModule):
    """ResNet-18 for small images: 3×3 pixels in its first filters, no first pooling, and a linear head of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.resnet18(num_classes=128)
        self.network.conv1, self.network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.head, self.network.fc = self.network.fc, nn.Identity()
        self.loss = SupConLoss(temperature=0.1)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        z = self.head(self.network(images.contiguous(memory_format=torch.channels_last)))
        with torch.autocast("cpu", enabled=False):
            return self.loss(z.float(), labels)

    def predict_step(self, batch, batch_idx):
        return self.network(batch[0].contiguous(memory_format=torch.channels_last)).float()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = {"total_steps": self.trainer.estimated_stepping_batches, "cycle_momentum": False}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, **steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def usual(options: argparse.Namespace, epochs: int, seed: int) -> tuple[float, float]:
    """Seconds of encoder, features and logistic regression, and its test accuracy."""
    keep_freed_memory()
    torch.manual_seed(seed)
    train, test = (read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10) for split in ("train", "test"))
    precision = "bf16-mixed" if bf16_is_native() else "32-true"
    trainer = Trainer(accelerator="cpu", devices=1, precision=precision, max_epochs=epochs, **QUIET)
    module = Usual().to(memory_format=torch.channels_last)
    normalise = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    def features(data) -> Tensor:
        return torch.cat(trainer.predict(module, DataLoader(Images(*data, False, normalise), 256, num_workers=2)))

    began = time.perf_counter()
    images = Images(*train, True, normalise)
    trainer.fit(module, DataLoader(images, 256, shuffle=True, drop_last=True, num_workers=2))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(features(train), train.labels)
    seconds = time.perf_counter() - began
    return seconds, float(probe.score(features(test), test.labels))


def rows(options: argparse.Namespace) -> Rows:
    sides: dict[str, tuple] = {}
    for given in options.ours:
        config, _, epochs = given.rpartition(":")
        if not epochs.isdigit() or not config:
            raise InputError(f"--ours {given}: must be a config and its epochs, such as triplet_encoder:13")
        sides[f"{config}, {epochs} epochs"] = ours, config, int(epochs)
    if options.airbench:
        require((options.airbench / SCRIPT).is_file(), "--airbench", options.airbench, f"a folder with {SCRIPT}")
        sides |= {f"{SCRIPT}, {epochs} epochs": (airbench, epochs) for epochs in options.epochs}
    sides |= {f"ResNet-18, SupConLoss, {epochs} epochs": (usual, epochs) for epochs in options.usual}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for seed in range(options.seeds):
        turn = {name: (lambda side=side: fresh(side[0], options, *side[1:], seed)) for name, side in sides.items()}
        for name, (value,) in in_turn(turn, 1).items():
            found[name].append(value)
            print(f"[seed {seed}] {name}: {value[0]:.0f} s, {value[1]:.4f}", flush=True)
    rows = []
    for name, values in found.items():
        seconds, accuracies = zip(*values)
        row = {"name": name, "value": statistics.median(seconds), "unit": "s"}
        rows.append(row | {"test accuracy": statistics.fmean(accuracies), "runs": len(values)})
    return rows


if __name__ == "__main__":
    run("benchmarks.to_accuracy")
