"""Studies behind the recipes, on validation images alone: one change at a time, same budget, same learning rates.

    python -m benchmarks.recipes losses --data-dir data                 # every loss × mining at 4 epochs, three rates
    python -m benchmarks.recipes temperature --seeds 2 --epochs 4
    python -m benchmarks.recipes losses --out runs/recipes              # called again: goes on where it stopped

Each setting is a fit of configs/triplet_encoder.yaml with the overrides named, then a linear probe. Prints a Markdown
table of the probe's validation accuracy (best epoch) for each setting and learning rate, with what MiningMonitor said.
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


def batch(size: int) -> list[str]:
    """The rate grows with the square root of the batch."""
    return [f"--data.batch_size={size}", f"--model.lr={0.5 * (size / 512) ** 0.5:.2f}"]


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
    "decay": {f"weight decay {d}": [f"--model.weight_decay={d}"] for d in (1e-4, 5e-4, 1.5e-3)},
    "temperature": {f"τ {t}": [f"--model.loss.temperature={t}"] for t in (0.05, 0.1, 0.2, 0.4)},
    "smoothing": {f"label smoothing {s}": [f"--model.loss.label_smoothing={s}"] for s in (0.0, 0.1, 0.2)},
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
        "mean of the weights, decay 0.99": ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.99"],
        "decay 0.998": ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.998"],
    },
    "batch": {f"batch {size}": batch(size) for size in (128, 256, 512, 1024)},
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
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates (losses: 0.1 0.5 0.02; else the config's)")
    parser.add_argument("--also", nargs="+", default=[], help="more options of every fit, e.g. model.loss=MultiNegativeLoss")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()

    also = [f"--{option}" for option in options.also]
    rates = options.rates or ([0.1, 0.5, 0.02] if options.study == "losses" else [None])
    named = "_".join([options.study, str(options.epochs), *options.also]).replace("/", "_")
    file = options.out / f"{named}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for seed in range(options.seeds):
        for rate in rates:
            for name, overrides in STUDIES[options.study].items():
                key = f"{name} | {rate} | {seed}"
                if key in found:
                    continue
                given = [] if rate is None else [f"--model.lr={rate}"]
                folder = options.out / f"{named}_{len(found)}"
                found[key] = run(folder, options.data_dir, [*also, *overrides, *given], seed, options.epochs)
                file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    print(f"\n| setting | {' | '.join('lr ' + str(r or 'as configured') for r in rates)} |\n|---|{'---|' * len(rates)}")
    for name in STUDIES[options.study]:
        cells = []
        for rate in rates:
            rows = [found[f"{name} | {rate} | {seed}"] for seed in range(options.seeds)]
            warned = " (warned)" if any(row["said"] for row in rows) else ""
            cells.append(" / ".join(f"{row['val_accuracy']:.4f}" for row in rows) + warned)
        print(f"| {name} | {' | '.join(cells)} |")
    for key, row in found.items():
        for sentence in row["said"]:
            print(f"- {key}: {sentence}")


if __name__ == "__main__":
    main()
