"""Seconds to an accuracy on test images: this project's encoder and linear probe beside cifar10-airbench.

    python -m benchmarks.to_accuracy --airbench ../cifar10-airbench --json runs/to_accuracy.json
    python -m benchmarks.to_accuracy --seeds 1 --ours triplet_encoder:9 triplet_encoder:13

Each line is a whole fit of so many epochs, a mean over seeds, in a process of its own; the fits take turns. The
seconds are those of the fit, with its validations, and of the probe's. The test images are read once, at the end.
Of airbench94_muon.py they are those of its `main`, evaluations included. It runs on the CPU as it is, but for bf16
autocast in place of float16, no compilation, and the number of epochs.
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
from torch import nn

from benchmarks.common import Rows, fit, fresh, in_turn, run
from cli import bf16_is_native
from datamodules.arrays import read_npz
from datamodules.cifar10 import CIFAR10DataModule
from errors import InputError, require
from main import keep_freed_memory
from run_folder import Run

SCRIPT, EPOCHS = "airbench94_muon.py", "ceil(8 * len(train_loader))"
DRY_RUN = {"ours": ["triplet_encoder:2"], "seeds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    fits = "configs and epochs (default: %(default)s)"
    parser.add_argument("--ours", nargs="*", default=["triplet_encoder:9", "triplet_encoder:13"], help=fits)
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="a checkout of KellerJordan/cifar10-airbench")
    parser.add_argument("--epochs", nargs="+", type=int, default=[8], help="of airbench (default: %(default)s)")
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


def rows(options: argparse.Namespace) -> Rows:
    sides = {}
    for given in options.ours:
        config, _, epochs = given.rpartition(":")
        if not epochs.isdigit() or not config:
            raise InputError(f"--ours {given}: must be a config and its epochs, such as triplet_encoder:13")
        sides[f"{config}, {epochs} epochs"] = ours, config, int(epochs)
    if options.airbench:
        require((options.airbench / SCRIPT).is_file(), "--airbench", options.airbench, f"a folder with {SCRIPT}")
        sides |= {f"{SCRIPT}, {epochs} epochs": (airbench, epochs) for epochs in options.epochs}
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
