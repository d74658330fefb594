"""Studies behind docs/recipes.md, on validation images alone: one change at a time, same budget, same learning rates.

    python -m studies.recipes losses --data-dir data                 # every loss × mining at 4 epochs, three rates
    python -m studies.recipes temperature batch --seeds 2
    python -m studies.recipes label_free_views --epochs 2
    python -m studies.recipes losses --out studies/losses            # fits that its fits.json has are not done again

Each setting of recipes.yaml is a fit of configs/triplet_encoder.yaml with its options, then a linear probe. A study
whose name begins with label_free changes configs/label_free_encoder.yaml, or what that came from. A row has the
probe's best validation accuracy for each seed, the encoder's mean seconds, and what MiningMonitor warned of.
"""

import argparse
import math
import statistics
import time
import warnings
from pathlib import Path

import yaml

from benchmarks.common import Rows, fit, run
from errors import InputError, causes
from lightning_modules.finite_loss import LossNotFinite
from studies.common import Fits

STUDIES = yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text(encoding="utf-8"))
STARTS = STUDIES.pop("starts")
DRY_RUN = {"epochs": 1, "rates": [0.1]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("studies", choices=STUDIES, nargs="+")
    parser.add_argument("--epochs", type=int, default=4, help="of each encoder (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", help="(default: losses 0.1 0.5 0.02, else the config's)")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="(default: %(default)s)")


def fitted(options: argparse.Namespace, config: str, given: list[str], seed: int, runs: Path) -> dict:
    """Fits encoder and probe; the probe's best validation accuracy, the encoder's seconds, and what was warned of."""
    shared, began = ["--quiet", f"--seed_everything={seed}"], time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            encoder = fit(options, config, runs, *shared, f"--trainer.max_epochs={options.epochs}", *given)
        except InputError as error:
            if not any(isinstance(e, LossNotFinite) for e in causes(error)):  # the rate is too high for this loss
                raise
            return {"val_accuracy": math.nan, "seconds": time.monotonic() - began, "said": [str(error)]}
        seconds = time.monotonic() - began
    said = [str(w.message) for w in caught if str(w.message).startswith("step ")]
    given = f"--frozen_encoder.run={encoder.run.folder}"
    best = fit(options, "linear_probe", runs, *shared, given).trainer.checkpoint_callback.best_model_score
    return {"val_accuracy": float(best), "seconds": seconds, "said": said}


def compared(fits: Fits, options: argparse.Namespace, config: str, given: list[str]) -> dict:
    """The columns of a setting, after those of its fits that are missing."""
    name = " ".join(given) or "default"
    key = f"{name if config == 'triplet_encoder' else f'{config}, {name}'} | {options.epochs} epochs | seed"
    seeds = range(options.seeds)
    done = [fits.get(f"{key} {seed}", lambda runs: fitted(options, config, given, seed, runs)) for seed in seeds]
    accuracies = [found["val_accuracy"] for found in done]
    means = {"mean": statistics.fmean(accuracies), "seconds": statistics.fmean(found["seconds"] for found in done)}
    warned = " / ".join(said for found in done for said in found["said"]) or None
    return {f"seed {seed}": accuracy for seed, accuracy in zip(seeds, accuracies)} | means | {"warned": warned}


def rows(options: argparse.Namespace) -> Rows:
    fits, found = Fits(options), []
    for study in options.studies:
        config = "label_free_encoder" if study.startswith("label_free") else "triplet_encoder"
        start = STARTS.get(study, "").split()
        for rate in options.rates or ([0.1, 0.5, 0.02] if study == "losses" else [None]):
            for name, changes in STUDIES[study].items():
                given = [*start, *changes.split(), *([] if rate is None else [f"--model.lr={rate}"])]
                row = {"study": study, "name": name, "lr": rate or "as configured"}
                found.append(row | compared(fits, options, config, given))
    return found


if __name__ == "__main__":
    run("studies.recipes")
