"""The linear probe: cached features against recomputed ones, scikit-learn, and a grid of settings at once.

    python -m benchmarks.probe                               # a default encoder of one epoch is trained first
    python -m benchmarks.probe --encoder RUN --images 45000  # on that encoder's features, of all training images

- Features computed once against anew in every epoch (`--frozen_encoder.cache=false`, what solo-learn and SupContrast
  do): seconds of the whole fit of `main.py fit --config configs/linear_probe.yaml`, 20 epochs, in a running process.
- Our probe against scikit-learn's logistic regression (L-BFGS, its defaults, standardised features) on the same
  features: seconds of the optimisation alone and accuracy on validation images.
- `LinearProbeGrid` with 16 settings against 16 fits one after the other: seconds of the optimisation alone.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from callbacks.checkpoints import FINISHED
from datamodules.arrays import read_npz
from main import main as command

CONFIGS = Path(__file__).parent.parent / "configs"
FACTORS = [0.1, 0.3, 1.0, 3.0], [0.0, 1.0, 10.0, 100.0]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--encoder", help="run folder or checkpoint (default: one epoch of the default encoder, here)")
    parser.add_argument("--images", type=int, default=15_000, help="of the training file, 5,000 of them for validation")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10)
        np.savez(f"{folder}/cifar10_train.npz", images=data.images[: options.images].numpy(), labels=data.labels[: options.images].numpy())
        common = [f"--data.root={folder}", f"--trainer.logger.save_dir={folder}"]
        if options.images < 10_000:
            common.append("--data.val_size=1000")
        encoder = options.encoder
        if not encoder:
            one = ["--trainer.max_epochs=1", "--model.encoder.widths=[32,128,128]"]
            encoder = command(["fit", "--config", str(CONFIGS / "triplet_encoder.yaml"), *common, *one]).trainer.logger.log_dir
        given = ["--config", str(CONFIGS / "linear_probe.yaml"), *common, f"--frozen_encoder.run={encoder}"]
        given += [f"--trainer.max_epochs={options.epochs}", "--trainer.callbacks+=benchmarks.training.Clock"]
        last = {}

        def fit(*more: str):
            last["cli"] = cli = command(["fit", *given, *more])
            clock = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")
            whole = json.loads((Path(cli.trainer.logger.log_dir) / FINISHED).read_text())["seconds"]
            return whole, clock.times[-1] - clock.times[0], float(cli.trainer.checkpoint_callback.best_model_score)

        cached, recomputed = "features computed once", "features computed in every epoch"
        sides = {cached: lambda: fit()[0], recomputed: lambda: fit("--frozen_encoder.cache=false")[0]}
        whole = in_turn(sides, options.repetitions)
        fit()
        splits = {name: last["cli"].datamodule.split(name) for name in ("train", "val")}
        accuracy = {}

        def ours() -> float:
            _, seconds, accuracy["our probe"] = fit()
            return seconds

        def scikit_learn() -> float:
            start = time.perf_counter()
            scaler = StandardScaler()
            model = LogisticRegression(max_iter=1000).fit(scaler.fit_transform(splits["train"].images.numpy()), splits["train"].labels)
            seconds = time.perf_counter() - start
            accuracy["scikit-learn L-BFGS"] = float(model.score(scaler.transform(splits["val"].images.numpy()), splits["val"].labels))
            return seconds

        alone = in_turn({"our probe": ours, "scikit-learn L-BFGS": scikit_learn}, options.repetitions)

        def grid() -> float:
            lists = [f"--model.lr_factors={FACTORS[0]}", f"--model.weight_decay_factors={FACTORS[1]}"]
            _, seconds, accuracy["grid of 16"] = fit("--model=LinearProbeGrid", *lists)
            return seconds

        def one_by_one() -> float:
            found = [
                fit(f"--model.lr={0.01 * lr}", f"--model.weight_decay={1e-4 * decay}")[1:] for lr in FACTORS[0] for decay in FACTORS[1]
            ]
            accuracy["16 fits"] = max(a for _, a in found)
            return sum(seconds for seconds, _ in found)

        grids = in_turn({"grid of 16": grid, "16 fits": one_by_one}, options.repetitions)

    rows = []
    for times, what, under in ((whole, "whole fit", cached), (alone, "optimisation", "our probe"), (grids, "optimisation", "grid of 16")):
        for name, seconds in times.items():
            ratio = median_ratio(seconds, times[under])
            rows.append({"": name, "of": what, "seconds": statistics.median(seconds), "÷ ours": ratio, "validation": accuracy.get(name)})
    print(machine(), f"{options.images:,} images, {options.epochs} epochs")
    show(rows, options.json)


if __name__ == "__main__":
    main()
