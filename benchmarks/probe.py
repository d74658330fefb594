"""The linear probe: cached features against recomputed ones, scikit-learn, and a grid of settings at once.

    python -m benchmarks.probe                               # default encoders of one epoch are trained first
    python -m benchmarks.probe --encoder RUN                 # on that encoder's features
    python -m benchmarks.probe --only optimum                # one of the three questions: cached, optimum, grid

- cached: features computed once against anew in every epoch (`--frozen_encoder.cache=false`, what solo-learn and
  SupContrast do, of each image alone as there). Seconds of the whole fit of `main.py fit --config
  configs/linear_probe.yaml`, 20 epochs, in a running process.
- optimum: our probe as configured against scikit-learn's logistic regression (L-BFGS, its defaults, standardised
  features) on the features of all training images. Seconds of the optimisation, ours with validations and checkpoints.
- grid: `LinearProbeGrid` with 16 settings against 16 fits one after the other, 20 epochs. Seconds of the optimisation.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.common import Clock, Rows, callback, fit, in_turn, run, seconds, shipped, summary
from datamodules.arrays import read_npz
from run_folder import Run

FACTORS = [0.1, 0.3, 1.0, 3.0], [0.0, 1.0, 10.0, 100.0]  # of the learning rate, of the weight decay
DRY_RUN = {"images": 1000, "epochs": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", help="run folder or checkpoint (default: one trained here for an epoch)")
    images = "of the training file for cached and grid, 5,000 of them for validation (default: %(default)s)"
    parser.add_argument("--images", type=int, default=15_000, help=images)
    parser.add_argument("--only", choices=QUESTIONS)
    parser.add_argument("--epochs", type=int, default=20, help="of cached and grid (default: %(default)s)")


class Fitted(NamedTuple):
    cli: Any
    whole: float  # seconds of the fit
    optimisation: float  # seconds from the first step to the last
    accuracy: float  # the best on validation images


class Probes:
    """Linear probes on one encoder."""

    def __init__(self, options: argparse.Namespace, runs: Path, encoder: list[str], probe: list[str]) -> None:
        short = ["--quiet", "--trainer.max_epochs=1", *encoder]
        run = options.encoder or fit(options, "triplet_encoder", runs, *short).trainer.log_dir
        self.options, self.runs, self.given = options, runs, [f"--frozen_encoder.run={run}", *probe]

    def fit(self, *more: str) -> Fitted:
        added = ["--quiet", "--trainer.callbacks+=benchmarks.common.Clock", *self.given, *more]
        cli = fit(self.options, "linear_probe", self.runs, *added)
        whole, times = Run(Path(cli.trainer.log_dir)).finished["seconds"], callback(cli, Clock).times
        return Fitted(cli, whole, times[-1] - times[0], float(cli.trainer.checkpoint_callback.best_model_score))


def of_all_images(options: argparse.Namespace, folder: Path) -> Probes:
    return Probes(options, folder / "all", [], [])


def of_some_images(options: argparse.Namespace, folder: Path) -> Probes:
    """On the features of each image alone, of the first --images."""
    data = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10)
    first = {name: x[: options.images].numpy() for name, x in zip(("images", "labels"), data)}
    np.savez(folder / "cifar10_train.npz", **first)
    some = argparse.Namespace(**{**vars(options), "data_dir": str(folder)})
    alone, epochs = ["--model.mirror=false", "--model.shift=0"], f"--trainer.max_epochs={options.epochs}"
    return Probes(some, folder / "some", alone, [epochs])


def cached(options: argparse.Namespace, folder: Path) -> Rows:
    probes, once = of_some_images(options, folder), "features computed once"
    anew = "features computed in every epoch"
    sides = {once: lambda: probes.fit().whole, anew: lambda: probes.fit("--frozen_encoder.cache=false").whole}
    return summary(in_turn(sides, options.repetitions), "s, whole fit", dict.fromkeys(sides, once))


def optimum(options: argparse.Namespace, folder: Path) -> Rows:
    probes, accuracy = of_all_images(options, folder), {}
    data, own = probes.fit().cli.datamodule, "our probe"
    # The features that the probe is trained and validated on.
    splits = [loader.inputs.cpu().numpy() for loader in (data.train_dataloader(), data.val_dataloader())]
    (x, validation), (y, labels) = splits, (data.split(name).labels.numpy() for name in ("train", "val"))

    def ours() -> float:
        found = probes.fit()
        accuracy[own] = found.accuracy
        return found.optimisation

    def scikit_learn() -> float:
        scaler, model = StandardScaler(), LogisticRegression(max_iter=1000)
        spent = seconds(lambda: model.fit(scaler.fit_transform(x), y))
        accuracy["scikit-learn L-BFGS"] = float(model.score(scaler.transform(validation), labels))
        return spent

    found = in_turn({own: ours, "scikit-learn L-BFGS": scikit_learn}, options.repetitions)
    rows = summary(found, "s, optimisation, all images", dict.fromkeys(found, own))
    return [{**row, "validation": accuracy[row["name"]]} for row in rows]


def grid(options: argparse.Namespace, folder: Path) -> Rows:
    probes, accuracy = of_some_images(options, folder), {}
    config = shipped(options, "linear_probe").model.hparams

    def at_once() -> float:
        lists = [f"--model.lr_factors={FACTORS[0]}", f"--model.weight_decay_factors={FACTORS[1]}"]
        found = probes.fit("--model=LinearProbeGrid", *lists)
        accuracy["grid of 16"] = found.accuracy
        return found.optimisation

    def one_by_one() -> float:
        settings = [(config.lr * lr, config.weight_decay * decay) for lr in FACTORS[0] for decay in FACTORS[1]]
        found = [probes.fit(f"--model.lr={lr}", f"--model.weight_decay={decay}") for lr, decay in settings]
        accuracy["16 fits"] = max(fitted.accuracy for fitted in found)
        return sum(fitted.optimisation for fitted in found)

    found = in_turn({"grid of 16": at_once, "16 fits": one_by_one}, options.repetitions)
    rows = summary(found, "s, optimisation", dict.fromkeys(found, "grid of 16"))
    return [{**row, "validation": accuracy[row["name"]]} for row in rows]


QUESTIONS = {"cached": cached, "optimum": optimum, "grid": grid}


def rows(options: argparse.Namespace) -> Rows:
    found = []
    for name in [options.only] if options.only else QUESTIONS:
        with tempfile.TemporaryDirectory() as folder:
            found += QUESTIONS[name](options, Path(folder))
    return found


if __name__ == "__main__":
    run("benchmarks.probe")
