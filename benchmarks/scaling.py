"""How costs grow: with the number of images, the batch, the embedding's width, and over processes.

    python -m benchmarks.scaling --data-dir data
    python -m benchmarks.scaling --images 10000 30000 --repetitions 1

- data path: seconds of one epoch of augmented batches of 512; softmax regression: seconds of an epoch of `trainer.fit`;
  both on CIFAR-10's training images, tiled, each with its exponent, and the mean of as many epochs as make a million.
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
import time
from pathlib import Path

import torch
from pytorch_lightning import Trainer

from benchmarks.common import arguments, exponent, in_turn, machine, median_ratio, show
from benchmarks.training import CONFIG, Clock
from datamodules.arrays import ImageSet, read_npz
from datamodules.in_memory import InMemoryDataModule
from datamodules.loader import BatchLoader
from lightning_modules import FastEncoder, PrototypicalLoss, SoftmaxRegression, TripletEncoder
from main import keep_freed_memory
from main import main as command


class Tiled(InMemoryDataModule):
    """The first `images` of a training file, repeated as often as it takes."""

    CLASSES = tuple(map(str, range(10)))

    def __init__(self, data: ImageSet, images: int) -> None:
        super().__init__(None, val_size=1000, split_seed=0, batch_size=512, flip=True, translate=0)
        times = -(-images // len(data.labels))
        self._tiled = ImageSet(data.images.repeat(times, 1, 1, 1)[:images], data.labels.repeat(times)[:images])

    def load(self, split: str) -> ImageSet:
        return self._tiled


def epochs(images: int) -> int:
    """How many of them are timed together: a million images at every size, so that none is shorter than the noise."""
    return max(1, 1_000_000 // images)


def loading(data: ImageSet, images: int) -> float:
    times = -(-images // len(data.labels))
    pixels, labels = data.images.repeat(times, 1, 1, 1)[:images], data.labels.repeat(times)[:images]
    loader = BatchLoader(pixels, labels, 512, seed=0, flip=True, translate=2)
    start = time.perf_counter()
    for epoch in range(epochs(images)):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
    return (time.perf_counter() - start) / epochs(images)


def regression(data: ImageSet, images: int) -> float:
    gc.collect()  # a trainer and its module hold each other, and with them the images of the fit before
    clock, module = Clock(), SoftmaxRegression(lr=0.01)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=epochs(images), limit_val_batches=0, callbacks=[clock], **quiet).fit(
        module, datamodule=Tiled(data, images)
    )
    return (clock.times[-1] - clock.times[0]) * len(clock.times) / (len(clock.times) - 1) / epochs(images)


def step(batch: int, z_dim: int) -> float:
    """Median milliseconds of a float32 step."""
    torch.manual_seed(0)
    model = TripletEncoder(FastEncoder(), PrototypicalLoss(), z_dim=z_dim, lr=0.1)
    images = torch.rand(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels, optimizer, times = torch.arange(batch) % 10, model.configure_optimizers()["optimizer"], []
    for _ in range(7):
        start = time.perf_counter()
        loss = model.triplet_loss(model.head(model.encoder(images)), labels, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def on_processes(devices: int, options: argparse.Namespace) -> float:
    arguments = [sys.executable, "-m", "benchmarks.scaling", "--process", str(devices), "--data-dir", options.data_dir]
    out = subprocess.check_output(arguments, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(out.split("images/s ")[-1].split()[0])


def fit_on_processes(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--data.root={options.data_dir}", f"--trainer.logger.save_dir={folder}", "--trainer.max_steps=40"]
        given += [f"--trainer.devices={options.process}", "--trainer.callbacks+=benchmarks.training.Clock"]
        cli = command(["fit", "--config", str(CONFIG), *given])
        clock = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")
        if cli.trainer.is_global_zero:
            print(f"\nimages/s {clock.rate(cli.datamodule.batch_size, 10)}", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        return fit_on_processes(options)
    keep_freed_memory()
    data, rows = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), []
    for name, measure in (("data path", loading), ("softmax regression", regression)):
        found = in_turn({n: (lambda n=n: measure(data, n)) for n in options.images}, options.repetitions)
        seconds = {n: statistics.median(s) for n, s in found.items()}
        slope = exponent(list(seconds), list(seconds.values()))
        rows += [
            {"": name, "size": f"{n:,} images", "cost": s, "unit": "s", "exponent or ratio": slope}
            for n, s in seconds.items()
        ]
    for name, sizes in (
        ("batch", [(b, 128) for b in (128, 256, 512, 1024)]),
        ("z_dim", [(256, z) for z in (32, 128, 512)]),
    ):
        found = in_turn({size: (lambda size=size: step(*size)) for size in sizes}, options.repetitions)
        cost = {size: statistics.median(ms) for size, ms in found.items()}
        slope = exponent([size[name == "z_dim"] for size in sizes], list(cost.values()))
        rows += [
            {
                "": f"encoder step over {name}",
                "size": f"B {b}, z_dim {z}",
                "cost": ms,
                "unit": "ms",
                "exponent or ratio": slope,
            }
            for (b, z), ms in cost.items()
        ]
    rates = in_turn({n: (lambda n=n: on_processes(n, options)) for n in (1, 2)}, options.repetitions)
    for n, found in rates.items():
        efficiency = median_ratio(found, rates[1]) / n
        size = f"{n} process{'es' * (n > 1)}"
        rows.append(
            {
                "": "encoder, a thread each",
                "size": size,
                "cost": statistics.median(found),
                "unit": "images/s",
                "exponent or ratio": efficiency,
            }
        )
    print(machine())
    show(rows, options.json)


if __name__ == "__main__":
    main()
