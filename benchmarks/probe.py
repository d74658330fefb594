"""The linear probe: cached features against recomputed ones, scikit-learn, and a grid of settings at once.

    python -m benchmarks.probe
    python -m benchmarks.probe --only optimum                # one of the three questions

- cached: features computed once against anew in every epoch (`--frozen_encoder.cache=false`, what solo-learn and
  SupContrast do). Seconds of the whole fit, 20 epochs, images of three classes, in a running process.
- optimum: our probe as configured against scikit-learn's logistic regression (L-BFGS, its defaults, standardised
  features) on the features of all training images. Seconds of the optimisation, ours with validations and checkpoints.
- grid: `LinearProbeGrid` with 16 settings against 16 fits one after the other, 20 epochs, three classes. Seconds of the
  optimisation.
"""

import argparse
import tempfile
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.common import Clock, Rows, fit, fit_with, in_turn, run, seconds, shipped, summary
from run_folder import Run

FACTORS = [0.1, 0.3, 1.0, 3.0], [0.0, 1.0, 10.0, 100.0]  # of the learning rate, of the weight decay
DRY_RUN = {"epochs": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=QUESTIONS)
    parser.add_argument("--epochs", type=int, default=20, help="of cached and grid (default: %(default)s)")


class Probes:
    """Linear probes on an encoder that was trained for an epoch; `options` are those of both."""

    def __init__(self, arguments: argparse.Namespace, runs: str, *options: str) -> None:
        self.arguments, self.runs, self.options = arguments, runs, ["--quiet", *options]
        alone = ["--model.mirror=false", "--model.shift=0"]  # no views, which other programs do not have
        fit(arguments, "triplet_encoder", runs, *self.options, "--trainer.max_epochs=1", *(alone if options else []))

    def fit(self, *more: str):
        """The CLI, the seconds of the fit and of its steps, and the best accuracy on validation images."""
        cli, clock = fit_with(Clock, self.arguments, "linear_probe", self.runs, *self.options, *more)
        whole, best = Run(Path(cli.trainer.log_dir)).finished["seconds"], cli.trainer.checkpoint_callback
        return cli, whole, clock.times[-1] - clock.times[0], float(best.best_model_score)


def cached(options: argparse.Namespace, runs: str) -> Rows:
    probes = Probes(options, runs, "--data.classes=[0,1,2]", f"--trainer.max_epochs={options.epochs}")
    once, anew = "features computed once", "features computed in every epoch"
    sides = {once: lambda: probes.fit()[1], anew: lambda: probes.fit("--frozen_encoder.cache=false")[1]}
    return summary(in_turn(sides, options.repetitions), "s, whole fit", dict.fromkeys(sides, once))


def optimum(options: argparse.Namespace, runs: str) -> Rows:
    probes, own, peer, accuracy = Probes(options, runs), "our probe", "scikit-learn L-BFGS", {}
    data = probes.fit()[0].datamodule
    # The features that the probe is trained and validated on.
    x, x_val = (loader.inputs.cpu().numpy() for loader in (data.train_dataloader(), data.val_dataloader()))
    y, y_val = (data.split(name).labels.numpy() for name in ("train", "val"))

    def ours() -> float:
        *_, spent, accuracy[own] = probes.fit()
        return spent

    def scikit_learn() -> float:
        scaler, model = StandardScaler(), LogisticRegression(max_iter=1000)
        spent = seconds(lambda: model.fit(scaler.fit_transform(x), y))
        accuracy[peer] = float(model.score(scaler.transform(x_val), y_val))
        return spent

    found = in_turn({own: ours, peer: scikit_learn}, options.repetitions)
    rows = summary(found, "s, optimisation, all images", dict.fromkeys(found, own))
    return [{**row, "validation": accuracy[row["name"]]} for row in rows]


def grid(options: argparse.Namespace, runs: str) -> Rows:
    probes = Probes(options, runs, "--data.classes=[0,1,2]", f"--trainer.max_epochs={options.epochs}")
    config, accuracy = shipped(options, "linear_probe").model.hparams, {}

    def at_once() -> float:
        lists = [f"--model.lr_factors={FACTORS[0]}", f"--model.weight_decay_factors={FACTORS[1]}"]
        *_, spent, accuracy["grid of 16"] = probes.fit("--model=LinearProbeGrid", *lists)
        return spent

    def one_by_one() -> float:
        settings = [(config.lr * lr, config.weight_decay * decay) for lr in FACTORS[0] for decay in FACTORS[1]]
        found = [probes.fit(f"--model.lr={lr}", f"--model.weight_decay={decay}") for lr, decay in settings]
        accuracy["16 fits"] = max(best for *_, best in found)
        return sum(spent for *_, spent, _ in found)

    found = in_turn({"grid of 16": at_once, "16 fits": one_by_one}, options.repetitions)
    rows = summary(found, "s, optimisation", dict.fromkeys(found, "grid of 16"))
    return [{**row, "validation": accuracy[row["name"]]} for row in rows]


QUESTIONS = {"cached": cached, "optimum": optimum, "grid": grid}


def rows(options: argparse.Namespace) -> Rows:
    found = []
    for name in [options.only] if options.only else QUESTIONS:
        with tempfile.TemporaryDirectory() as runs:
            found += QUESTIONS[name](options, runs)
    return found


if __name__ == "__main__":
    run("benchmarks.probe")
