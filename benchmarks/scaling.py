"""How costs grow: with the number of images, the batch, the embedding's width, and over processes.

    python -m benchmarks.scaling --data-dir data
    python -m benchmarks.scaling --images 10000 30000 --repetitions 1

- data path: seconds of one epoch of augmented batches of 512; softmax regression: seconds of an epoch of `trainer.fit`;
  both on CIFAR-10's training images, tiled, each with its exponent, and the mean of as many epochs as make --total.
- encoder: milliseconds of a step of the default encoder on images in place, over batch and z_dim.
- processes: images/s of `main.py fit` on the default encoder on one and on two processes of one thread each.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from pytorch_lightning import Trainer

from benchmarks.common import (
    ROOT,
    Clock,
    Rows,
    bare_step,
    config_arguments,
    exponent,
    in_turn,
    median_ratio,
    random_batch,
    run,
    seconds,
    shipped,
)
from cli import bf16_is_native
from datamodules.arrays import ImageSet, read_npz
from datamodules.in_memory import InMemoryDataModule
from datamodules.loader import BatchLoader
from main import keep_freed_memory

DRY_RUN = {"images": [1100, 1200], "total": 3000, "batches": [16, 32], "widths": [8, 16], "processes": [1]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--total", type=int, default=1_000_000, help="images timed together (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512], help="of the embedding, z_dim")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])


class Tiled(InMemoryDataModule):
    """The first `count` images of a training file, repeated as often as it takes."""

    CLASSES = tuple(map(str, range(10)))

    def __init__(self, data: ImageSet, count: int) -> None:
        super().__init__(val_size=100, batch_size=512, translate=0)
        times = -(-count // len(data.labels))
        self.tiled = ImageSet(data.images.repeat(times, 1, 1, 1)[:count], data.labels.repeat(times)[:count])

    def load(self, split: str) -> ImageSet:
        return self.tiled


def loading(options: argparse.Namespace, data: ImageSet, count: int) -> float:
    """Seconds of an epoch."""
    loader = BatchLoader(*Tiled(data, count).tiled, 512, seed=0, flip=True, translate=2)
    epochs = max(1, options.total // count)

    def read() -> None:
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for _ in loader:
                pass

    return seconds(read) / epochs


def regression(options: argparse.Namespace, data: ImageSet, count: int) -> float:
    """Seconds of an epoch."""
    gc.collect()  # a trainer and its module hold each other, and with them the images of the fit before
    clock, epochs, module = Clock(), max(1, options.total // count), shipped(options, "softmax_regression").model
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, limit_val_batches=0, callbacks=[clock], **quiet)
    trainer.fit(module, datamodule=Tiled(data, count))
    return (clock.times[-1] - clock.times[0]) * len(clock.times) / (len(clock.times) - 1) / epochs


def step(options: argparse.Namespace, batch: int, z_dim: int) -> float:
    """Median milliseconds."""
    torch.manual_seed(0)
    model = shipped(options, "triplet_encoder", "--model.schedule=constant", f"--model.z_dim={z_dim}").model
    one = bare_step(model, *random_batch(batch), bf16_is_native())
    return 1e3 * statistics.median([seconds(one) for _ in range(7)][2:])


def on_processes(options: argparse.Namespace, devices: int) -> float:
    """Images/s."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*config_arguments(options, "triplet_encoder"), f"--trainer.logger.save_dir={folder}", "--quiet"]
        given += [f"--trainer.devices={devices}", "--trainer.accelerator=cpu", "--trainer.max_steps=40"]
        given += ["--trainer.callbacks+=benchmarks.common.Clock", f"--trainer.callbacks.file={folder}/rate"]
        command = [sys.executable, str(ROOT / "main.py"), "fit", *given]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return float(Path(folder, "rate").read_text(encoding="utf-8"))


def growing(name: str, sizes: dict[str, float], sides: dict, repetitions: int, unit: str) -> Rows:
    """A row for each side, all with the exponent of their medians over `sizes`."""
    costs = {side: statistics.median(found) for side, found in in_turn(sides, repetitions).items()}
    slope = exponent([sizes[side] for side in costs], list(costs.values()))
    return [
        {"name": name, "size": side, "value": cost, "unit": unit, "exponent": slope} for side, cost in costs.items()
    ]


def rows(options: argparse.Namespace) -> Rows:
    keep_freed_memory()
    data, found = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), []
    sizes = {f"{n:,} images": n for n in options.images}
    for name, measure in (("data path", loading), ("softmax regression", regression)):
        sides = {side: (lambda n=n: measure(options, data, n)) for side, n in sizes.items()}
        found += growing(name, sizes, sides, options.repetitions, "s")
    batches = {f"B {b}, z_dim 128": b for b in options.batches}
    sides = {side: (lambda b=b: step(options, b, 128)) for side, b in batches.items()}
    found += growing("encoder step over the batch", batches, sides, options.repetitions, "ms")
    widths = {f"B 256, z_dim {z}": z for z in options.widths}
    sides = {side: (lambda z=z: step(options, 256, z)) for side, z in widths.items()}
    found += growing("encoder step over z_dim", widths, sides, options.repetitions, "ms")
    rates = in_turn({n: (lambda n=n: on_processes(options, n)) for n in options.processes}, options.repetitions)
    for n, rate in rates.items():
        row = {"name": "encoder, a thread each", "size": f"{n} processes", "value": statistics.median(rate)}
        found.append({**row, "unit": "images/s", "ratio": median_ratio(rate, rates[options.processes[0]]) / n})
    return found


if __name__ == "__main__":
    run("benchmarks.scaling")
