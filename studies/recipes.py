"""Studies behind docs/recipes.md, on validation images alone: one change at a time, same budget, same learning rates.

    python -m studies.recipes losses --data-dir data                 # every loss × mining at 4 epochs, three rates
    python -m studies.recipes temperature batch --seeds 2
    python -m studies.recipes losses --out studies/losses            # fits that its fits.json has are not done again

Each setting of recipes.yaml is a fit of configs/triplet_encoder.yaml with the options named, then a linear probe. What
several studies share, as the default, is fitted once. A row has the probe's validation accuracy (its best epoch) for
each seed, the encoder's mean seconds, and what MiningMonitor warned of.
"""

import argparse
import math
import statistics
import time
import warnings
from pathlib import Path

import yaml

from benchmarks.common import Rows, fit, run
from errors import InputError
from studies.common import Fits

STUDIES = yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text(encoding="utf-8"))
DRY_RUN = {"epochs": 1, "rates": [0.1]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("studies", choices=STUDIES, nargs="+")
    parser.add_argument("--epochs", type=int, default=4, help="of each encoder (default: %(default)s)")
    rates = "learning rates (losses: 0.1 0.5 0.02; else the config's)"
    parser.add_argument("--rates", type=float, nargs="+", help=rates)
    more = "more options of every fit, e.g. model.loss=MultiNegativeLoss"
    parser.add_argument("--also", nargs="+", default=[], help=more)
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="(default: %(default)s)")


def fitted(options: argparse.Namespace, given: list[str], seed: int, runs: Path) -> dict:
    """Fits encoder and probe; the probe's best validation accuracy, the encoder's seconds, and what was warned of."""
    shared, start = ["--quiet", f"--seed_everything={seed}"], time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(options, "triplet_encoder", runs, *shared, f"--trainer.max_epochs={options.epochs}", *given)
        except InputError as error:  # where the learning rate is too high for a loss
            return {"val_accuracy": math.nan, "seconds": time.monotonic() - start, "said": [str(error)]}
        seconds = time.monotonic() - start
    said = [str(w.message) for w in caught if str(w.message).startswith("step ")]
    best = fit(options, "linear_probe", runs, *shared).trainer.checkpoint_callback.best_model_score
    return {"val_accuracy": float(best), "seconds": seconds, "said": said}


def rows(options: argparse.Namespace) -> Rows:
    fits, found = Fits(options.out), []
    for study in options.studies:
        for rate in options.rates or ([0.1, 0.5, 0.02] if study == "losses" else [None]):
            for name, changes in STUDIES[study].items():
                given = [f"--{option}" for option in options.also] + changes.split()
                given += [] if rate is None else [f"--model.lr={rate}"]
                key, seeds = f"{' '.join(given) or 'default'} | {options.epochs} epochs", []
                for seed in range(options.seeds):
                    done = fits.get(f"{key} | seed {seed}", lambda runs: fitted(options, given, seed, runs))
                    seeds.append(done)
                accuracies = {f"seed {seed}": done["val_accuracy"] for seed, done in enumerate(seeds)}
                row = {"study": study, "name": name, "lr": rate or "as configured", **accuracies}
                row["mean"] = statistics.fmean(accuracies.values())
                row["seconds"] = statistics.fmean(done["seconds"] for done in seeds)
                found.append({**row, "warned": " / ".join(said for done in seeds for said in done["said"]) or None})
    return found


if __name__ == "__main__":
    run("studies.recipes")
