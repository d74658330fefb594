"""What benchmarks and studies share: their runner, repetitions in turn, tables, and what the shipped configs make.

Each is a module with `rows(options)`, which returns the lines of its table as dicts. It may have `add_options(parser)`,
and `DRY_RUN`: the values of its options in a --dry-run.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from datamodules.in_memory import InMemoryDataModule
from errors import OneLineParser, one_line
from files import write
from lightning_modules import Stage, TripletEncoder
from main import main as command

ROOT = Path(__file__).parent.parent
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
Rows = list[dict[str, Any]]


def arguments(name: str, doc: str) -> argparse.ArgumentParser:
    parser = OneLineParser(prog=f"python -m {name}", description=doc)
    parser.add_argument("--data-dir", default="data", help="folder with cifar10_train.npz (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--dry-run", action="store_true", help="each part once, at its smallest, on made-up images")
    if name.startswith("benchmarks."):
        parser.add_argument("--repetitions", type=int, default=5, help="of each side (default: %(default)s)")
    return parser


def run(name: str) -> None:
    """`python -m <name>`, with one line on stderr where its input is bad."""
    sys.exit(one_line(f"python -m {name}", lambda: measured(name, sys.argv[1:])))


def measured(name: str, given: list[str]) -> Rows:
    """The rows of a module with options as on its command line: prints them as a table, and writes them as JSON."""
    module = import_module(name)
    parser = arguments(name, module.__doc__)
    if hasattr(module, "add_options"):
        module.add_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        if "--dry-run" in given:
            made_up_images(Path(folder))
            small = {"data_dir": folder, "out": Path(folder) / "out", "repetitions": 1}
            parser.set_defaults(**small | getattr(module, "DRY_RUN", {}))
        options = parser.parse_args(given)
        rows = module.rows(options)
    print(f"\n{name}: {machine()}\n\n{table(rows)}\n", flush=True)
    save(options, {name: rows})
    return rows


def save(options: argparse.Namespace, found: dict[str, Rows]) -> None:
    """Writes what --json asks for."""
    if options.json:
        write(options.json, json.dumps({**found, "machine": machine()}, indent=1, ensure_ascii=False) + "\n")


def made_up_images(folder: Path) -> None:
    """1,200 training and 60 test images of ten classes, each with a brightness of its own."""
    for split, count in (("train", 1200), ("test", 60)):
        labels = np.arange(count) % 10
        images = np.random.default_rng(0).integers(0, 50, (count, 32, 32, 3)) + 20 * labels[:, None, None, None]
        np.savez(folder / f"cifar10_{split}.npz", images=images.astype(np.uint8), labels=labels)


def in_turn(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[Any]]:
    """What each side returns, called one after the other, over and over: a slow minute hits all of them."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            found[name].append(side())
    return found


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of the repetitions, each pair measured side by side."""
    return statistics.median(a / b for a, b in zip(over, under))


def summary(found: dict[str, list[float]], unit: str, beside: dict[str, str]) -> Rows:
    """A row for each side: its median, and its median ratio to the side that `beside` names for it."""
    rows = []
    for name, values in found.items():
        row = {"name": name, "value": statistics.median(values), "unit": unit}
        if peer := beside.get(name):
            row |= {"compared with": peer, "ratio": median_ratio(values, found[peer])}
        rows.append(row)
    return rows


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The slope of log cost over log size, by least squares: cost ~ size^slope."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, costs))).slope


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fresh(function: Callable, *args) -> Any:
    """What `function(*args)` returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def machine() -> str:
    """Processor, cores and versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [*(models or [platform.processor()])[:1], f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    packages = ["torch", "scikit-learn", *(["pytorch-metric-learning"] if find_spec("pytorch_metric_learning") else [])]
    versions = [f"{name} {version(name)}" for name in packages]
    return ", ".join([*parts, device, f"Python {platform.python_version()}", *versions])


def table(rows: Rows) -> str:
    """The rows in Markdown, with all their keys as its head."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row.get(key)) for key in head)} |" for row in rows)])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def config_arguments(options: argparse.Namespace, name: str) -> list[str]:
    """The command line of a shipped config; in a dry run, of a small network and small batches."""
    given = ["--config", str(ROOT / "configs" / f"{name}.yaml"), f"--data.root={options.data_dir}"]
    if options.dry_run:
        given += ["--data.val_size=50", "--data.batch_size=50"]
        given += ["--model.encoder.widths=[8,8,8]"] if "encoder" in name else []
    return given


def fit(options: argparse.Namespace, config: str, runs: str | Path, *more: str, verb: str = "fit"):
    """`main.py fit` (or test) of a shipped config with `more` options, in this process; returns its CLI."""
    given = [*config_arguments(options, config), f"--trainer.logger.save_dir={runs}", "--trainer.devices=1"]
    return command([verb, *given, *(["--trainer.max_epochs=2", "--pictures=false"] if options.dry_run else []), *more])


def fit_with(kind: type[Callback], options: argparse.Namespace, config: str, runs: str | Path, *more: str):
    """The same fit with a callback more; returns its CLI and that callback."""
    cli = fit(options, config, runs, f"--trainer.callbacks+={kind.__module__}.{kind.__name__}", *more)
    return cli, next(c for c in cli.trainer.callbacks if isinstance(c, kind))


def shipped(options: argparse.Namespace, config: str, *more: str) -> Namespace:
    """`model`, `data` (objects) and `trainer` (a dict) of a shipped config, without a command line around them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Stage, "model")
    parser.add_subclass_arguments(InMemoryDataModule, "data")
    for name in ("trainer", "best_checkpoint"):
        parser.add_argument(f"--{name}", type=dict)
    return parser.instantiate_classes(parser.parse_args([*config_arguments(options, config), *more]))


def bare_step(model: TripletEncoder, images: Tensor, labels: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward, loss, backward and optimiser step of a batch in place, with nothing around them."""
    optimizer = model.configure_optimizers()["optimizer"]

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            z = model(images)
        optimizer.zero_grad()
        model.loss_function(z.float(), labels, None).backward()
        optimizer.step()

    return step


def random_batch(size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images (size, 3, 32, 32) in channels-last order and their labels (size,), ten classes."""
    images = torch.rand(size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(size, device=device) % 10


def clusters(size: int, width: int, apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (size, width) of ten classes around centres at `apart` × N(0, 1), the same for every seed; labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (size,), generator=generator)
    centres = torch.randn(10, width, generator=torch.Generator().manual_seed(0))
    return apart * centres[labels] + torch.randn(size, width, generator=generator), labels


class Clock(Callback):
    """Notes when each training batch is done; writes the images/s of the whole fit into `file` where one is given."""

    WARMUP = 10  # steps that do not count

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self.times: list[float] = []

    def on_train_batch_end(self, *args) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, *args) -> None:
        if self.file and trainer.is_global_zero:
            Path(self.file).write_text(str(self.rate(trainer.datamodule.batch_size)), encoding="utf-8")

    def rate(self, batch: int) -> float:
        """Images/s over the steps behind the warm-up."""
        return batch * (len(self.times) - self.WARMUP - 1) / (self.times[-1] - self.times[self.WARMUP])
