"""Studies behind the recipes, on validation images alone: one change at a time, same budget, same learning rates.

    python -m benchmarks.recipes losses --data-dir data                 # every loss × mining at 4 epochs, three rates
    python -m benchmarks.recipes temperature batch --seeds 2
    python -m benchmarks.recipes losses --out runs/recipes              # called again: goes on where it stopped

Each setting is a fit of configs/triplet_encoder.yaml with the overrides named, then a linear probe; what several studies
share, as the default, is fitted once (`fits.json`). Prints for each study a Markdown table of the probe's validation
accuracy (best epoch) for each setting and learning rate, with what MiningMonitor said.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

from errors import InputError
from main import main as command

CONFIGS = Path(__file__).parent.parent / "configs"


def loss(name: str, **init_args) -> list[str]:
    return [f"--model.loss={name}", *(f"--model.loss.{key}={value}" for key, value in init_args.items())]


def margin(triplets: str) -> list[str]:
    sphere = {"distance": "EuclideanDistance", "distance.normalize": "true"}
    return loss("TripletMarginLoss", triplets=triplets, margin=0.5, **sphere)


STUDIES = {
    "losses": {
        "prototypical, τ 0.1, smoothing 0.1 (default)": [],
        "multi-negative, τ 0.1": loss("MultiNegativeLoss"),
        "SupCon, τ 0.1": loss("SupConLoss"),
        "pairwise contrastive (the report's equation 2), τ 0.1": loss("PairwiseContrastiveLoss"),
        "margin 0.5 on the sphere, all": margin("all"),
        "margin 0.5 on the sphere, semihard": margin("semihard"),
        "margin 0.5 on the sphere, hard": margin("hard"),
        "margin 0.5 on the sphere, random": margin("random"),
        "margin 1, random (the report's)": loss("TripletMarginLoss"),
        "soft margin, hard": loss("SoftMarginTripletLoss"),
        "soft margin, random": loss("SoftMarginTripletLoss", triplets="random"),
        "LMNN, 3 target neighbours": loss("LMNNLoss"),
    },
    "decay": {
        "weight decay 1e-4": ["--model.weight_decay=1e-4"],
        "5e-4 (default)": [],
        "1.5e-3": ["--model.weight_decay=1.5e-3"],
    },
    "temperature": {
        "τ 0.05": ["--model.loss.temperature=0.05"],
        "0.1 (default)": [],
        "0.2": ["--model.loss.temperature=0.2"],
        "0.4": ["--model.loss.temperature=0.4"],
    },
    "smoothing": {
        "label smoothing 0": ["--model.loss.label_smoothing=0"],
        "0.1 (default)": [],
        "0.2": ["--model.loss.label_smoothing=0.2"],
    },
    "augmentation": {
        "flip, translation by 2 (default)": [],
        "no flip": ["--data.flip=false"],
        "no translation": ["--data.translate=0"],
        "translation by 4": ["--data.translate=4"],
        "cutout of 8": ["--data.cutout=8"],
    },
    "views": {
        "mirror, shifts by 1 (default)": [],
        "mirror": ["--model.shift=0"],
        "the image alone": ["--model.mirror=false", "--model.shift=0"],
    },
    "head": {
        "loss on a linear head of 128 (default)": [],
        "of 64": ["--model.z_dim=64"],
        "of 256": ["--model.z_dim=256"],
        "loss on the features themselves": ["--model.z_dim=null"],
    },
    "averaging": {
        "the last weights (default)": [],
        "mean of the weights, decay 0.99": [
            "--trainer.callbacks+=EMAWeightAveraging",
            "--trainer.callbacks.decay=0.99",
        ],
        "decay 0.998": ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.998"],
    },
    "batch": {  # the rate grows with the batch's square root
        "batch 128": ["--data.batch_size=128", "--model.lr=0.25"],
        "256 (default)": [],
        "512": ["--data.batch_size=512", "--model.lr=0.5"],
        "1024": ["--data.batch_size=1024", "--model.lr=0.71"],
    },
    "width": {
        "32/64/256 (default)": [],
        "24/64/256": ["--model.encoder.widths=[24,64,256]"],
        "32/96/256": ["--model.encoder.widths=[32,96,256]"],
        "32/128/128": ["--model.encoder.widths=[32,128,128]"],
        "64/256/256": ["--model.encoder.widths=[64,256,256]"],
        "32/64/256, residual": ["--model.encoder.residual=true"],
    },
}


def run(out: Path, data_dir: str, overrides: list[str], seed: int, epochs: int) -> dict:
    """Fits encoder and probe in `out`; the probe's best validation accuracy, the fit's seconds, and what was said."""
    common = [f"--data.root={data_dir}", f"--trainer.logger.save_dir={out}", f"--seed_everything={seed}"]
    encoder = ["--config", str(CONFIGS / "triplet_encoder.yaml"), *common, f"--trainer.max_epochs={epochs}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.monotonic()
        try:
            command(["fit", *encoder, *overrides])
        except InputError as error:  # MiningMonitor's, where a learning rate is too high for a loss
            return {"val_accuracy": math.nan, "seconds": time.monotonic() - start, "said": [str(error)]}
        seconds = time.monotonic() - start
    said = [str(w.message) for w in caught if str(w.message).startswith("step ")]
    probe = command(["fit", "--config", str(CONFIGS / "linear_probe.yaml"), *common])
    best = probe.trainer.checkpoint_callback.best_model_score
    return {"val_accuracy": float(best), "seconds": seconds, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", choices=STUDIES, nargs="+")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates (losses: 0.1 0.5 0.02; else the config's)"
    )
    parser.add_argument(
        "--also", nargs="+", default=[], help="more options of every fit, e.g. model.loss=MultiNegativeLoss"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()
    for study in options.studies:
        print(table(study, options), flush=True)


def table(study: str, options: argparse.Namespace) -> str:
    """The study's table and sentences in Markdown, after the fits that `fits.json` in `options.out` does not have yet."""
    rates = options.rates or ([0.1, 0.5, 0.02] if study == "losses" else [None])
    file = options.out / "fits.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    cells, said = {}, []
    for seed in range(options.seeds):
        for rate in rates:
            for name, overrides in STUDIES[study].items():
                given = [
                    *(f"--{o}" for o in options.also),
                    *overrides,
                    *([] if rate is None else [f"--model.lr={rate}"]),
                ]
                key = f"{' '.join(given) or 'default'} | {options.epochs} epochs | seed {seed}"
                if key not in found:
                    found[key] = run(options.out / f"fit_{len(found)}", options.data_dir, given, seed, options.epochs)
                    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
                row = found[key]
                cells.setdefault((name, rate), []).append(
                    f"{row['val_accuracy']:.4f}" + " (warned)" * bool(row["said"])
                )
                said += [f"- {name}, lr {rate or 'as configured'}, seed {seed}: {sentence}" for sentence in row["said"]]
    head = f"\n| {study} | {' | '.join('lr ' + str(r or 'as configured') for r in rates)} |\n|---|{'---|' * len(rates)}"
    body = [f"| {name} | {' | '.join(' / '.join(cells[name, rate]) for rate in rates)} |" for name in STUDIES[study]]
    return "\n".join([head, *body, *said])


if __name__ == "__main__":
    main()
