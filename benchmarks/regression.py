"""Softmax regression on CIFAR-10's pixels to the same validation loss: ours against scikit-learn's L-BFGS.

    python -m benchmarks.regression --data-dir data

Ours is `main.py fit --config configs/softmax_regression.yaml --trainer.max_epochs 4`, timed from its first batch to the
first validation (one an epoch, in the time) that reaches the target. scikit-learn's is LogisticRegression with the
fewest iterations of --iterations that reach it, timed as one fit on pixels in [0, 1], float32. The target is the lowest
validation loss that both reach.
"""

import argparse
import tempfile
import time

from pytorch_lightning import Callback
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from benchmarks.common import Rows, fit_with, in_turn, run, seconds, summary

DRY_RUN = {"iterations": [10], "epochs": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 20, 40, 60, 80, 120])
    parser.add_argument("--epochs", type=int, default=4, help="of our fit (default: %(default)s)")


class Losses(Callback):
    """The seconds since the first batch began, and the validation loss, at every validation."""

    def on_train_start(self, *args) -> None:
        self.curve: list[tuple[float, float]] = []
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.curve.append((time.perf_counter() - self.start, float(trainer.callback_metrics["val/loss"])))
        self.lowest = min(loss for _, loss in self.curve)


def fitted(options: argparse.Namespace):
    """Our fit's CLI, and its Losses."""
    with tempfile.TemporaryDirectory() as folder:
        return fit_with(Losses, options, "softmax_regression", folder, f"--trainer.max_epochs={options.epochs}")


def scikit_learn(pixels: dict, iterations: int) -> LogisticRegression:
    return LogisticRegression(max_iter=iterations).fit(*pixels["train"])


def rows(options: argparse.Namespace) -> Rows:
    cli, ours = fitted(options)
    pixels = {}
    for name in ("train", "val"):
        images, labels = cli.datamodule.split(name)
        pixels[name] = images.flatten(1).numpy().astype("float32") / 255, labels.numpy()
    (x, y), losses = pixels["val"], {}
    for n in options.iterations:
        losses[n] = float(log_loss(y, scikit_learn(pixels, n).predict_proba(x)))
    target = max(min(losses.values()), ours.lowest)
    iterations = min(n for n, loss in losses.items() if loss <= target)
    peer = f"scikit-learn L-BFGS, {iterations} iterations"
    sides = {
        "ours": lambda: next(reached for reached, loss in fitted(options)[1].curve if loss <= target),
        peer: lambda: seconds(lambda: scikit_learn(pixels, iterations)),
    }
    lowest = {"ours": ours.lowest, peer: min(losses.values())}
    found = summary(in_turn(sides, options.repetitions), "s", dict.fromkeys(sides, "ours"))
    return [{**row, "lowest val/loss": lowest[row["name"]]} for row in found]


if __name__ == "__main__":
    run("benchmarks.regression")
