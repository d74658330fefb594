"""The comparisons of the report this project grew from, with its network and options, beside ours; validation images.

    python -m studies.report --data-dir data          # called again with the same --out: does only the fits missing
    python -m studies.report --only probes            # the grid of probes alone, on the newest finished encoder

Its figures 2 and 3 (logistic regression, two batch sizes), 4 (softmax regression), 8 to 13 (encoders of several batch
sizes × iterations: the report's network and random triplets, and our default, each with our linear probe) and its grids
of linear and NN probes, on our encoder. An iteration is an optimiser step. The row's value is the best validation
accuracy, `report` what it printed. `curves.png` in --out shows the validation accuracy of every run over its steps.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import Rows, fit, run
from callbacks.curves import read_rows
from run_folder import Run
from studies.common import Fits

CLASSIFIERS = {  # figure → config, batch, steps, what the report printed
    "logistic regression, figure 2": ("logistic_regression", 64, 4000, None),
    "logistic regression, figure 3": ("logistic_regression", 256, 4000, 0.8030),
    "softmax regression, figure 4": ("softmax_regression", 32, 4000, 0.3684),
}
ENCODERS = {8: (32, 10), 9: (64, 800), 10: (1024, 1200), 11: (128, 1500), 12: (256, 1500), 13: (256, 1800)}
LINEAR_PROBES = [  # batch, steps, what the report printed
    *[(512, 1000, 0.6553), (1024, 1000, 0.6585), (256, 8000, 0.8310), (512, 8000, 0.8310)],
    *[(1024, 8000, 0.8311), (32, 8000, 0.8315), (32, 10000, 0.8317), (64, 10000, 0.8315)],
]
NN_PROBES = [(32, 100, 0.875), (64, 100, 0.84375), (32, 200, 0.71875)]
# Plain SGD, clipped gradients, ½λ‖W‖², pixels as they are: the report's options.
PIXELS = "--data.flip=false --data.translate=0 --model.schedule=constant"
SGD = f"{PIXELS} --model.optimizer=sgd --model.momentum=0"
THEIR_PROBE = f"{SGD} --model.lr=1e-3 --model.weight_decay=0 --model.l2_lambda=5e-4 --trainer.gradient_clip_val=10"
THEIR_CLASSIFIER = f"{SGD} --model.lr=5e-3 --model.l2_lambda=1e-3 --trainer.gradient_clip_val=4"
THEIR_ENCODER = (
    f"--model.encoder=ReportEncoder --model.z_dim=null --model.loss=TripletMarginLoss {PIXELS} --model.optimizer=adam"
    " --model.lr=1e-3 --model.weight_decay=0 --model.l2_lambda=5e-4 --trainer.gradient_clip_val=10"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--encoder", help="run of the probe grid's encoder (default: newest in runs/triplet_encoder)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="(default: %(default)s)")


class Runs(Fits):
    """Fits of so many steps, with ten validations each."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out)
        self.options = options

    def row(self, name: str, config: str, batch: int, steps: int, more: str, **columns) -> dict:
        """Fits once what has that name; its line in the table."""
        if self.options.dry_run:
            batch, steps = min(batch, 64), min(steps, 20)
        found = self.get(name, lambda runs: self.fitted(runs, config, batch, steps, more))
        return {"name": name, "batch": batch, "iterations": steps, "value": found["val_accuracy"], **columns}

    def fitted(self, runs: Path, config: str, batch: int, steps: int, more: str) -> dict:
        ends = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null"]
        ends += [f"--trainer.val_check_interval={max(1, steps // 10)}", f"--data.batch_size={batch}", "--quiet"]
        run_folder = Path(fit(self.options, config, runs, *ends, *more.split()).trainer.log_dir)
        measured, _ = read_rows((run_folder / "metrics.csv").read_text(encoding="utf-8"))
        curve = [(step, row["val/accuracy"]) for step, row in measured.items() if "val/accuracy" in row]
        return {"run": str(run_folder), "val_accuracy": max(accuracy for _, accuracy in curve), "curve": curve}


def classifiers(runs: Runs) -> Rows:
    return [runs.row(name, *given, THEIR_CLASSIFIER, report=report) for name, (*given, report) in CLASSIFIERS.items()]


def encoders(runs: Runs) -> Rows:
    found = []
    for figure, (batch, steps) in ENCODERS.items():
        rate = f"--model.lr={0.35 * (batch / 256) ** 0.5:.3f}"
        for whose, more in (("report's", THEIR_ENCODER), ("our", rate)):
            name = f"figure {figure}, {whose} encoder"
            row = runs.row(name, "triplet_encoder", batch, steps, more)
            frozen = f"--frozen_encoder.run={runs.found[name]['run']}"
            probe = runs.row(f"{name}: our probe", "linear_probe", 512, 1740, frozen)
            found.append({**row, "value": probe["value"]})
    return found


def probes(runs: Runs) -> Rows:
    ours = "figure 13, our encoder"  # of this study, in a dry run
    run_folder = runs.found[ours]["run"] if runs.options.dry_run else Run.newest(Path("runs/triplet_encoder")).folder
    frozen, found = f"--frozen_encoder.run={runs.options.encoder or run_folder}", []
    for kind, config, options, grid in (
        ("linear", "linear_probe", THEIR_PROBE, LINEAR_PROBES),
        ("NN", "mlp_probe", "--model.schedule=constant --model.lr=1e-3", NN_PROBES),
    ):
        for batch, steps, report in grid:
            name = f"{kind} probe {batch} x {steps}"
            found.append(runs.row(name, config, batch, steps, f"{frozen} {options}", report=report))
    return found


PARTS = {"pixels": classifiers, "encoders": encoders, "probes": probes}


def draw(runs: Runs) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    parts = {"regression": "pixels", "encoder": "encoders (accuracy within a batch)", "probe ": "probes"}
    for axes, (part, title) in zip(figure.subplots(1, 3), parts.items()):
        names = [name for name in runs.found if part in name and "our probe" not in name]
        for i, name in enumerate(names):  # two of a colour: the report's encoder dashed, ours solid
            axes.plot(*zip(*runs.found[name]["curve"]), label=name, lw=1, color=f"C{i // 2}", ls="-" if i % 2 else "--")
        axes.set(xlabel="step", ylabel="validation accuracy", title=title)
        if axes.lines:
            axes.legend(fontsize=6, framealpha=0.3)
    figure.savefig(runs.out / "curves.png", dpi=120)


def rows(options: argparse.Namespace) -> Rows:
    runs = Runs(options)
    found = [row for name, part in PARTS.items() if options.only in (None, name) for row in part(runs)]
    draw(runs)
    return found


if __name__ == "__main__":
    run("studies.report")
