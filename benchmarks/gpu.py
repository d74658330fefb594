"""The encoder on one CUDA GPU: seconds to an accuracy, images/s beside a bare loop, and what each choice is worth.

    python -m benchmarks.gpu --data-dir data --json runs/gpu.json     # no GPU has run it yet
    python -m benchmarks.gpu --airbench ../cifar10-airbench           # its times on the same GPU, in the same run
    python -m benchmarks.gpu --dry-run                                # every part, tiny, also without a GPU

1. Recipes: training seconds of `main.py fit`, scaled to all steps from those after the first 20, in which kernels are
   chosen and compiled, and the test accuracy of the linear probe on the encoder; means over seeds. With --airbench:
   those of its train94, train95 and train96 after their warm-up, the accuracy with its test-time augmentation.
2. Rates: images/s of the middle recipe as it is, with one thing changed (precision, TF32, cuDNN's timing of kernels,
   memory format, compilation, where the images lie), and of a bare loop of the same compiled
   network, loss and optimiser on a batch in place.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from pytorch_lightning import Callback

from benchmarks.common import Rows, bare_step, fit, fit_with, in_turn, random_batch, run, shipped, summary
from datamodules import in_memory
from datamodules.arrays import read_npz
from datamodules.cifar10 import CIFAR10DataModule
from errors import InputError, require

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = ["--data.batch_size=512", "--model.lr=0.49", "--model.compile_mode=reduce-overhead", "--trainer.benchmark=true"]
RECIPES = {  # config and what differs from it
    "94": ("triplet_encoder", [*BATCH, "--model.encoder.widths=[64,256,256]", "--trainer.max_epochs=24"]),
    "95": ("triplet_encoder", [*BATCH, "--model.encoder.widths=[128,384,384]", "--trainer.max_epochs=30"]),
    "96": ("triplet_encoder_gpu", []),
}
VARIANTS = {  # what differs from the recipe
    "as it is": [],
    "float32, convolutions in TF32": ["--trainer.precision=32-true"],  # as PyTorch does
    "float32 without TF32": ["--trainer.precision=32-true"],
    "kernels not timed": ["--trainer.benchmark=false"],
    "channels first": ["--model.channels_last=false"],
    "not compiled": ["--model.compile_mode=null"],
    "compiled without CUDA graphs": ["--model.compile_mode=default"],
    "images in main memory": [],
}
QUIET = ["--quiet", "--pictures=false"]
DRY_RUN = {"steps": 24, "seeds": 1}
SMALL = ["--model.encoder.widths=[8,8,8]", "--data.batch_size=16", "--model.compile_mode=default"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=220, help="of each rate's fit (default: %(default)s)")
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="a checkout of KellerJordan/cifar10-airbench")


class Clock(Callback):
    """Seconds of the steps after the first `WARMUP`, with the GPU's work done."""

    WARMUP = 20

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.WARMUP:
            self.start = now()
        if trainer.global_step == pl_module.total_steps:
            self.seconds, self.steps = now() - self.start, trainer.global_step - self.WARMUP
            self.rate = self.steps * len(batch[1]) / self.seconds


def now() -> float:
    """Seconds, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def recipe(options: argparse.Namespace, name: str) -> tuple[str, list[str]]:
    config, given = RECIPES[name]
    return config, [*given, *(SMALL if options.dry_run else [])]


def timed_fit(options: argparse.Namespace, name: str, runs: str, *more: str) -> Clock:
    """A fit without validations."""
    config, given = recipe(options, name)
    given = [*given, *QUIET, "--trainer.check_val_every_n_epoch=1000", *more]
    return fit_with(Clock, options, config, runs, *given)[1]


def to_accuracy(options: argparse.Namespace, name: str, seed: int) -> tuple[float, float]:
    """Training seconds of all steps, and the probe's test accuracy."""
    with tempfile.TemporaryDirectory() as runs:
        clock = timed_fit(options, name, runs, f"--seed_everything={seed}")
        fit(options, "linear_probe", runs, *QUIET)
        tested = fit(options, "linear_probe", runs, *QUIET, "--ckpt_path=best", verb="test").trainer
    seconds = clock.seconds * (clock.steps + Clock.WARMUP) / clock.steps
    return seconds, float(tested.callback_metrics["test/accuracy"])


def airbench(options: argparse.Namespace, name: str) -> list[tuple[float, float]]:
    """Seconds and accuracies that its `train94` etc. print, on the images of --data-dir."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            data = read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10)
            content = {"images": data.images, "labels": data.labels, "classes": list(CIFAR10DataModule.CLASSES)}
            torch.save(content, Path(folder) / "cifar10" / f"{split}.pt")
        calls = f"warmup{name}(); [airbench.train{name}(run=None) for _ in range({options.seeds})]"
        given = [sys.executable, "-c", f"import airbench; airbench.{calls}"]
        environment = {**os.environ, "PYTHONPATH": str(options.airbench.resolve())}
        printed = subprocess.check_output(given, cwd=folder, env=environment, text=True)
    cells = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if " eval " in line]
    return [(float(row[-2]), float(row[-3])) for row in cells]


def rate(options: argparse.Namespace, variant: str) -> float:
    """Images/s."""
    short = [f"--trainer.max_steps={options.steps}", "--trainer.max_epochs=-1", *VARIANTS[variant]]
    free = (lambda device: 0.0) if variant == "images in main memory" else in_memory.free_memory
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, variant != "float32 without TF32"
    try:
        with tempfile.TemporaryDirectory() as runs, patch.object(in_memory, "free_memory", free):
            return timed_fit(options, "95", runs, *short).rate
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def bare(options: argparse.Namespace) -> float:
    """Images/s of the middle recipe's network."""
    config, given = recipe(options, "95")
    torch.manual_seed(0)
    made = shipped(options, config, *given, "--model.schedule=constant", "--model.lr=0.01")
    step = bare_step(made.model.to(DEVICE), *random_batch(made.data.batch_size, DEVICE), bf16=True)
    for i in range(options.steps):
        if i == Clock.WARMUP:
            start = now()
        step()
    return made.data.batch_size * (options.steps - Clock.WARMUP) / (now() - start)


def accuracies(options: argparse.Namespace) -> Rows:
    rows = []
    for name in RECIPES:
        sides = {f"ours, recipe {name}": [to_accuracy(options, name, seed) for seed in range(options.seeds)]}
        if options.airbench:
            sides[f"airbench, train{name}"] = airbench(options, name)
        for side, found in sides.items():
            seconds, accuracy = map(statistics.fmean, zip(*found))
            rows.append({"name": side, "value": seconds, "unit": "s", "test accuracy": accuracy, "runs": len(found)})
    return rows


def rows(options: argparse.Namespace) -> Rows:
    if not (options.dry_run or torch.cuda.is_available()):
        raise InputError("no CUDA GPU here; --dry-run rehearses everything without one")
    if options.airbench:
        package = options.airbench / "airbench" / "__init__.py"
        require(package.is_file(), "--airbench", options.airbench, "a checkout of cifar10-airbench, with that package")
    found = accuracies(options)
    sides = {variant: (lambda variant=variant: rate(options, variant)) for variant in VARIANTS}
    sides["bare loop"] = lambda: bare(options)
    return found + summary(in_turn(sides, options.repetitions), "images/s", dict.fromkeys(sides, "as it is"))


if __name__ == "__main__":
    run("benchmarks.gpu")
