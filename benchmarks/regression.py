"""Softmax regression on CIFAR-10's pixels to the same validation loss: ours against scikit-learn's L-BFGS.

    python -m benchmarks.regression --data-dir data

Ours is `main.py fit --config configs/softmax_regression.yaml --trainer.max_epochs 4`, timed from its first batch to the first validation (one
an epoch, in the time) that reaches the target; scikit-learn's is LogisticRegression with the fewest iterations of
--iterations that reach it, timed as one fit on pixels in [0, 1], float32. The target is the lowest validation loss that
both reach.
"""

import statistics
import tempfile
import time
from pathlib import Path

from pytorch_lightning import Callback
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from main import main as command

CONFIG = Path(__file__).parent.parent / "configs" / "softmax_regression.yaml"


class Losses(Callback):
    """The seconds since the first batch began, and the validation loss, at every validation."""

    def __init__(self) -> None:
        self.curve: list[tuple[float, float]] = []

    def on_train_start(self, *_) -> None:
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.curve.append((time.perf_counter() - self.start, float(trainer.callback_metrics["val/loss"])))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 20, 40, 60, 80, 120])
    parser.add_argument("--epochs", type=int, default=4, help="of our fit (default: %(default)s)")
    options = parser.parse_args()

    def fit():
        with tempfile.TemporaryDirectory() as folder:
            given = [
                f"--data.root={options.data_dir}",
                f"--trainer.logger.save_dir={folder}",
                f"--trainer.max_epochs={options.epochs}",
            ]
            added = ["--trainer.callbacks+=benchmarks.regression.Losses"]
            cli = command(["fit", "--config", str(CONFIG), *given, *added])
        return cli, next(c for c in cli.trainer.callbacks if type(c).__name__ == "Losses").curve

    cli, curve = fit()
    pixels = {}
    for name in ("train", "val"):
        images, labels = cli.datamodule.split(name)
        pixels[name] = images.flatten(1).numpy().astype("float32") / 255, labels.numpy()

    def scikit_learn(iterations: int) -> tuple[float, float, float]:
        start = time.perf_counter()
        model = LogisticRegression(max_iter=iterations).fit(*pixels["train"])
        seconds = time.perf_counter() - start
        x, y = pixels["val"]
        return seconds, log_loss(y, model.predict_proba(x)), model.score(x, y)

    peers = {n: scikit_learn(n)[1] for n in options.iterations}
    target = max(min(peers.values()), min(loss for _, loss in curve))
    iterations = min(n for n, loss in peers.items() if loss <= target)
    name = f"scikit-learn L-BFGS, {iterations} iterations"
    sides = {
        "ours": lambda: next(seconds for seconds, loss in fit()[1] if loss <= target),
        name: lambda: scikit_learn(iterations)[0],
    }
    seconds = in_turn(sides, options.repetitions)
    lowest = {"ours": min(loss for _, loss in curve), name: min(peers.values())}
    rows = [
        {
            "": side,
            "seconds": statistics.median(times),
            "÷ ours": median_ratio(times, seconds["ours"]),
            "lowest val/loss": lowest[side],
        }
        for side, times in seconds.items()
    ]
    print(machine(), f"to a validation loss of {target:.4f}")
    show(rows, options.json)


if __name__ == "__main__":
    main()
