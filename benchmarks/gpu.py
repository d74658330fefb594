"""The encoder on one CUDA GPU: seconds to an accuracy, images/s beside a bare loop, and what each choice is worth.

    python -m benchmarks.gpu --data-dir data --json runs/gpu.json     # no GPU has run it yet
    python -m benchmarks.gpu --airbench ../cifar10-airbench           # its times on the same GPU, in the same run
    python -m benchmarks.gpu --dry-run                                # every part, tiny, also without a GPU

1. Recipes: training seconds of `main.py fit`, scaled to all steps from those after the first 20, in which kernels are
   chosen and compiled, and the test accuracy of the linear probe on the encoder; means over seeds. With --airbench: the
   seconds and the accuracy (with its test-time augmentation) that train94, train95 and train96 print after their warm-up.
2. Rates: images/s of the middle recipe as it is and with one thing changed, medians of repetitions in turn, each beside
   the recipe as it is; beside a bare loop of the same compiled network, loss and optimiser on a batch in place; and
   the share of the FLOP/s that this GPU reaches in a large bfloat16 matrix product.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from pytorch_lightning import Callback
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Rows,
    bare_step,
    callback,
    config_arguments,
    fit,
    in_turn,
    random_batch,
    run,
    shipped,
    summary,
)
from datamodules import in_memory
from datamodules.arrays import read_npz
from datamodules.cifar10 import CIFAR10DataModule
from errors import InputError, require
from main import main as command

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = ["--data.batch_size=512", "--model.lr=0.49", "--model.compile_mode=reduce-overhead"]
RECIPES = {  # config and what differs from it
    "94": ("triplet_encoder", [*BATCH, "--model.encoder.widths=[64,256,256]", "--trainer.max_epochs=24"]),
    "95": ("triplet_encoder", [*BATCH, "--model.encoder.widths=[128,384,384]", "--trainer.max_epochs=30"]),
    "96": ("triplet_encoder_gpu", []),
}
VARIANTS = {  # what differs from the recipe
    "as it is": [],
    "float32": ["--trainer.precision=32-true"],
    "channels first": ["--model.channels_last=false"],
    "not compiled": ["--model.compile_mode=null"],
    "compiled without CUDA graphs": ["--model.compile_mode=default"],
    "images in main memory": [],
}
DRY_RUN = {"steps": 24, "seeds": 1}
SMALL = ["--model.encoder.widths=[8,8,8]", "--data.batch_size=16", "--model.compile_mode=default"]
AIRBENCH = """
import sys
sys.path.insert(0, sys.argv[1])
import airbench
getattr(airbench, "warmup" + sys.argv[2])()
for _ in range(int(sys.argv[3])):
    getattr(airbench, "train" + sys.argv[2])(run=None)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=220, help="of each rate's fit (default: %(default)s)")
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="a checkout of KellerJordan/cifar10-airbench")


class Clock(Callback):
    """Seconds of the steps after the first `WARMUP`, with the GPU's work done."""

    WARMUP = 20

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.WARMUP:
            synchronize()
            self.start = time.perf_counter()
        if trainer.global_step == pl_module.total_steps:
            synchronize()
            self.seconds, self.steps = time.perf_counter() - self.start, trainer.global_step - self.WARMUP
            self.rate = self.steps * len(batch[1]) / self.seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def recipe(options: argparse.Namespace, name: str) -> tuple[str, list[str]]:
    config, given = RECIPES[name]
    return config, [*given, *(SMALL if options.dry_run else [])]


def timed_fit(options: argparse.Namespace, name: str, runs: str, *more: str) -> Clock:
    """A fit without validations."""
    config, given = recipe(options, name)
    alone = ["--quiet", "--pictures=false", "--trainer.devices=1", "--trainer.check_val_every_n_epoch=1000"]
    added = "--trainer.callbacks+=benchmarks.gpu.Clock"
    return callback(fit(options, config, runs, *given, *alone, added, *more), Clock)


def to_accuracy(options: argparse.Namespace, name: str, seed: int) -> tuple[float, float]:
    """Training seconds of all steps, and the probe's test accuracy."""
    with tempfile.TemporaryDirectory() as runs:
        clock = timed_fit(options, name, runs, f"--seed_everything={seed}")
        alone = ["--quiet", "--pictures=false", "--trainer.devices=1"]
        fit(options, "linear_probe", runs, *alone)
        save = f"--trainer.logger.save_dir={runs}"
        tested = command(["test", *config_arguments(options, "linear_probe"), save, *alone, "--ckpt_path=best"])
    seconds = clock.seconds * (clock.steps + Clock.WARMUP) / clock.steps
    return seconds, float(tested.trainer.callback_metrics["test/accuracy"])


def airbench(options: argparse.Namespace, name: str) -> list[tuple[float, float]]:
    """Seconds and accuracies that its `train94` etc. print, on the images of --data-dir."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            data = read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10)
            content = {"images": data.images, "labels": data.labels, "classes": list(CIFAR10DataModule.CLASSES)}
            torch.save(content, Path(folder) / "cifar10" / f"{split}.pt")
        given = [sys.executable, "-c", AIRBENCH, str(options.airbench.resolve()), name, str(options.seeds)]
        printed = subprocess.check_output(given, cwd=folder, text=True)
    cells = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if " eval " in line]
    return [(float(row[-2]), float(row[-3])) for row in cells]


def rate(options: argparse.Namespace, variant: str) -> float:
    """Images/s."""
    short = [f"--trainer.max_steps={options.steps}", "--trainer.max_epochs=-1", *VARIANTS[variant]]
    free = (lambda device: 0.0) if variant == "images in main memory" else in_memory.free_memory
    with tempfile.TemporaryDirectory() as runs, patch.object(in_memory, "free_memory", free):
        return timed_fit(options, "95", runs, *short).rate


def network(options: argparse.Namespace):
    """The middle recipe's module, and a batch with labels, on the device."""
    config, given = recipe(options, "95")
    torch.manual_seed(0)
    made = shipped(options, config, *given, "--model.schedule=constant", "--model.lr=0.01")
    return made.model.to(DEVICE), *random_batch(made.data.batch_size, DEVICE)


def bare(options: argparse.Namespace) -> float:
    """Images/s."""
    model, images, labels = network(options)
    step = bare_step(model, images, labels, bf16=True)
    for i in range(options.steps):
        if i == Clock.WARMUP:
            synchronize()
            start = time.perf_counter()
        step()
    synchronize()
    return len(images) * (options.steps - Clock.WARMUP) / (time.perf_counter() - start)


def flops_per_image(options: argparse.Namespace) -> float:
    """Of a training step, forward and backward, as torch counts them (a multiplication and an addition are two)."""
    model, images, labels = network(options)
    model.encoder.run_as()  # not compiled
    with FlopCounterMode(display=False) as counter:
        model.loss_function(model(images), labels, None).backward()
    return counter.get_total_flops() / len(images)


def matmul_flops(size: int, repetitions: int = 30) -> float:
    """FLOP/s of a bfloat16 matrix product."""
    x = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    for repetition in range(repetitions):
        if repetition == repetitions // 3:
            synchronize()
            start = time.perf_counter()
        x @ x
    synchronize()
    return 2 * size**3 * (repetitions - repetitions // 3) / (time.perf_counter() - start)


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
        there = (options.airbench / "airbench" / "__init__.py").is_file()
        require(there, "--airbench", options.airbench, "a checkout of cifar10-airbench, with airbench/__init__.py")
    found = accuracies(options)
    sides = {variant: (lambda variant=variant: rate(options, variant)) for variant in VARIANTS}
    sides["bare loop"] = lambda: bare(options)
    rates = summary(in_turn(sides, options.repetitions), "images/s", dict.fromkeys(sides, "as it is"))
    share = flops_per_image(options) / matmul_flops(256 if options.dry_run else 8192)
    return found + [{**row, "of the matmul's FLOP/s": row["value"] * share} for row in rates]


if __name__ == "__main__":
    run("benchmarks.gpu")
