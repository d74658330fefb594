"""How costs grow with the number of images, and over processes.

    python -m benchmarks.scaling --data-dir data
    python -m benchmarks.scaling --images 10000 30000 --repetitions 1

- data path: seconds of one epoch of augmented batches of 512; softmax regression: seconds of an epoch of `trainer.fit`;
  both on CIFAR-10's training images, tiled, each with its exponent, and the mean of as many epochs as make --total.
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

from jsonargparse import Namespace
from pytorch_lightning import Trainer

import main
from benchmarks.common import QUIET, Clock, Rows, config_arguments, exponent, in_turn, run, seconds, shipped, summary
from datamodules.arrays import ImageSet, read_npz
from datamodules.loader import BatchLoader

DRY_RUN = {"images": [1100, 1200], "total": 3000, "processes": [1]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--total", type=int, default=1_000_000, help="images timed together (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])


def tiled(options: argparse.Namespace, data: ImageSet, count: int) -> Namespace:
    """Model and data of the softmax regression, with `count` of these images, repeated as often as it takes."""
    times = -(-count // len(data.labels))
    images = ImageSet(data.images.repeat(times, 1, 1, 1)[:count], data.labels.repeat(times)[:count])
    made = shipped(options, "softmax_regression", "--data.val_size=100", "--data.batch_size=512")
    made.data.load = lambda split: images
    return made


def loading(options: argparse.Namespace, data: ImageSet, count: int) -> float:
    """Seconds of an epoch."""
    epochs, images = max(1, options.total // count), tiled(options, data, count).data.load("train")
    loader = BatchLoader(*images, 512, seed=0, flip=True, translate=2)

    def read() -> None:
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for _ in loader:
                pass

    return seconds(read) / epochs


def regression(options: argparse.Namespace, data: ImageSet, count: int) -> float:
    """Seconds of an epoch."""
    gc.collect()  # a trainer and its module hold each other, and with them the images of the fit before
    clock, epochs, made = Clock(), max(1, options.total // count), tiled(options, data, count)
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, limit_val_batches=0, callbacks=[clock], **QUIET)
    trainer.fit(made.model, datamodule=made.data)
    return (clock.times[-1] - clock.times[0]) * len(clock.times) / (len(clock.times) - 1) / epochs


def on_processes(options: argparse.Namespace, devices: int) -> float:
    """Images/s of each process."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*config_arguments(options, "triplet_encoder"), f"--trainer.logger.save_dir={folder}", "--quiet"]
        given += [f"--trainer.devices={devices}", "--trainer.accelerator=cpu", "--trainer.max_steps=40"]
        given += ["--trainer.callbacks+=benchmarks.common.Clock", f"--trainer.callbacks.file={folder}/rate"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, main.__file__, "fit", *given], check=True, env=environment)
        return float(Path(folder, "rate").read_text(encoding="utf-8")) / devices


def rows(options: argparse.Namespace) -> Rows:
    main.keep_freed_memory()
    data, found = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), []
    for name, measure in (("data path", loading), ("softmax regression", regression)):
        sides = {count: (lambda count=count: measure(options, data, count)) for count in options.images}
        costs = {n: statistics.median(spent) for n, spent in in_turn(sides, options.repetitions).items()}
        slope = exponent(list(costs), list(costs.values()))
        found += [{"name": f"{name}, {n:,} images", "value": s, "unit": "s", "∝ N^": slope} for n, s in costs.items()]
    sides = {f"{n} processes": (lambda n=n: on_processes(options, n)) for n in options.processes}
    rates = in_turn(sides, options.repetitions)
    return found + summary(rates, "images/s of each", dict.fromkeys(sides, f"{options.processes[0]} processes"))


if __name__ == "__main__":
    run("benchmarks.scaling")
