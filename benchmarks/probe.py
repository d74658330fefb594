"""The linear probe: cached features against recomputed ones, scikit-learn, and a grid of settings at once.

    python -m benchmarks.probe                               # default encoders of one epoch are trained first
    python -m benchmarks.probe --encoder RUN                 # on that encoder's features
    python -m benchmarks.probe --only optimum                # one of the three questions: cached, optimum, grid

- Features computed once against anew in every epoch (`--frozen_encoder.cache=false`, what solo-learn and SupContrast
  do, of each image alone as there): seconds of the whole fit of `main.py fit --config configs/linear_probe.yaml`, 20
  epochs, in a running process.
- Our probe as configured against scikit-learn's logistic regression (L-BFGS, its defaults, standardised features) on the
  features of all training images: seconds of the optimisation, ours with validations and checkpoints, and validation
  accuracy.
- `LinearProbeGrid` with 16 settings against 16 fits one after the other, 20 epochs: seconds of the optimisation alone.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from callbacks.checkpoints import FINISHED
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from datamodules.arrays import read_npz
from main import main as command

CONFIGS = Path(__file__).parent.parent / "configs"
FACTORS = [0.1, 0.3, 1.0, 3.0], [0.0, 1.0, 10.0, 100.0]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--encoder", help="run folder or checkpoint (default: of the default encoder, trained here for an epoch)"
    )
    images = "of the training file for cached and grid, 5,000 of them for validation (default: %(default)s)"
    parser.add_argument("--images", type=int, default=15_000, help=images)
    parser.add_argument("--only", choices=["cached", "optimum", "grid"])
    parser.add_argument("--epochs", type=int, default=20, help="of cached and grid (default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10)
        np.savez(
            f"{folder}/cifar10_train.npz",
            images=data.images[: options.images].numpy(),
            labels=data.labels[: options.images].numpy(),
        )
        small = [f"--data.root={folder}", f"--trainer.logger.save_dir={folder}/part"]
        if options.images < 10_000:
            small.append("--data.val_size=1000")
        every = [f"--data.root={options.data_dir}", f"--trainer.logger.save_dir={folder}/all"]
        last, accuracy, whole, alone, grids = {}, {}, {}, {}, {}

        def encoder(common: list[str]) -> str:
            if options.encoder:
                return options.encoder
            views = [] if common is every else ["--model.mirror=false", "--model.shift=0"]
            one = ["--config", str(CONFIGS / "triplet_encoder.yaml"), *common, *views, "--trainer.max_epochs=1"]
            return command(["fit", *one]).trainer.logger.log_dir

        def fit(*more: str):
            given = [
                "--config",
                str(CONFIGS / "linear_probe.yaml"),
                "--trainer.callbacks+=benchmarks.training.Clock",
                *more,
            ]
            last["cli"] = cli = command(["fit", *given])
            clock = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")
            seconds = json.loads((Path(cli.trainer.logger.log_dir) / FINISHED).read_text())["seconds"]
            return seconds, clock.times[-1] - clock.times[0], float(cli.trainer.checkpoint_callback.best_model_score)

        if options.only in ("optimum", None):
            given = [*every, f"--frozen_encoder.run={encoder(every)}"]
            fit(*given)
            splits = {name: last["cli"].datamodule.split(name) for name in ("train", "val")}

            def ours() -> float:
                _, seconds, accuracy["our probe"] = fit(*given)
                return seconds

            def scikit_learn() -> float:
                (x, y), (validation, labels) = ((s.images.numpy(), s.labels.numpy()) for s in splits.values())
                start = time.perf_counter()
                scaler = StandardScaler()
                model = LogisticRegression(max_iter=1000).fit(scaler.fit_transform(x), y)
                seconds = time.perf_counter() - start
                accuracy["scikit-learn L-BFGS"] = float(model.score(scaler.transform(validation), labels))
                return seconds

            alone = in_turn({"our probe": ours, "scikit-learn L-BFGS": scikit_learn}, options.repetitions)

        cached, recomputed = "features computed once", "features computed in every epoch"
        if options.only != "optimum":
            given = [*small, f"--frozen_encoder.run={encoder(small)}", f"--trainer.max_epochs={options.epochs}"]
        if options.only in ("cached", None):
            sides = {cached: lambda: fit(*given)[0], recomputed: lambda: fit(*given, "--frozen_encoder.cache=false")[0]}
            whole = in_turn(sides, options.repetitions)

        def grid() -> float:
            lists = [f"--model.lr_factors={FACTORS[0]}", f"--model.weight_decay_factors={FACTORS[1]}"]
            _, seconds, accuracy["grid of 16"] = fit(*given, "--model=LinearProbeGrid", *lists)
            return seconds

        def one_by_one() -> float:
            each = [
                (f"--model.lr={0.01 * lr}", f"--model.weight_decay={1e-4 * decay}")
                for lr in FACTORS[0]
                for decay in FACTORS[1]
            ]
            found = [fit(*given, *options)[1:] for options in each]
            accuracy["16 fits"] = max(a for _, a in found)
            return sum(seconds for seconds, _ in found)

        if options.only in ("grid", None):
            grids = in_turn({"grid of 16": grid, "16 fits": one_by_one}, options.repetitions)

    rows = []
    for times, what, under in (
        (whole, "whole fit", cached),
        (alone, "optimisation, all images", "our probe"),
        (grids, "optimisation", "grid of 16"),
    ):
        for name, seconds in times.items():
            ratio = median_ratio(seconds, times[under])
            rows.append(
                {
                    "": name,
                    "of": what,
                    "seconds": statistics.median(seconds),
                    "÷ ours": ratio,
                    "validation": accuracy.get(name),
                }
            )
    print(machine(), f"{options.images:,} images, {options.epochs} epochs (optimisation, all images: as configured)")
    show(rows, options.json)


if __name__ == "__main__":
    main()
