"""The comparisons of the report this project grew from, with its network and options, beside ours; validation images.

    python -m studies.report --data-dir data          # called again with the same --out: does only the fits missing
    python -m studies.report --only probes            # the grid of probes alone, on the newest finished encoder

report.yaml lists them: its figures 2 and 3 (logistic regression, two batch sizes), 4 (softmax regression), 8 to 13
(encoders of several batch sizes × iterations: its network and random triplets, and our default, each under our linear
probe), and its grids of linear and NN probes, put on our encoder. A row's value is the best validation accuracy,
`report` what it printed. `curves.png` in --out shows the validation accuracy of every run over its steps.
"""

import argparse
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from benchmarks.common import Rows, fit, run, shipped
from callbacks.curves import read_rows
from studies.common import Fits, encoder_run

REPORT = yaml.safe_load((Path(__file__).parent / "report.yaml").read_text(encoding="utf-8"))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--encoder", help="run of the probe grid's encoder (default: newest in runs/triplet_encoder)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="(default: %(default)s)")


class Runs(Fits):
    """Fits of so many steps, with ten validations each."""

    def row(self, name: str, config: str, batch: int, steps: int, more: str, report: float | None = None) -> dict:
        """Fits what has no result under that name yet; its line in the table."""
        if self.options.dry_run:
            batch, steps = min(batch, 64), min(steps, 20)
        found = self.get(name, lambda runs: self.fitted(runs, config, batch, steps, more))
        return {"name": name, "batch": batch, "iterations": steps, "report": report, "value": found["val_accuracy"]}

    def fitted(self, runs: Path, config: str, batch: int, steps: int, more: str) -> dict:
        ends = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null"]
        ends += [f"--trainer.val_check_interval={max(1, steps // 10)}", f"--data.batch_size={batch}", "--quiet"]
        run_folder = Path(fit(self.options, config, runs, *ends, *more.split()).trainer.log_dir)
        measured, _ = read_rows((run_folder / "metrics.csv").read_text(encoding="utf-8"))
        curve = [(step, row["val/accuracy"]) for step, row in measured.items() if "val/accuracy" in row]
        return {"run": str(run_folder), "val_accuracy": max(accuracy for _, accuracy in curve), "curve": curve}


def classifiers(runs: Runs) -> Rows:
    return [runs.row(more=REPORT["options"]["classifier"], **given) for given in REPORT["classifiers"]]


def encoders(runs: Runs) -> Rows:
    found, default = [], shipped(runs.options, "triplet_encoder")
    for given in REPORT["encoders"]:
        batch, steps = given["batch"], given["steps"]
        rate = default.model.lr * (batch / default.data.batch_size) ** 0.5
        for whose, more in (("report's", REPORT["options"]["encoder"]), ("our", f"--model.lr={rate:.3f}")):
            name = f"figure {given['figure']}, {whose} encoder"
            row = runs.row(name, "triplet_encoder", batch, steps, more)
            frozen = f"--frozen_encoder.run={runs.found[name]['run']}"
            found.append({**row, "value": runs.row(f"{name}: our probe", "linear_probe", 512, 1740, frozen)["value"]})
    return found


def probes(runs: Runs) -> Rows:
    frozen, found = f"--frozen_encoder.run={encoder_run(runs.options)}", []
    for given in REPORT["probes"]:
        name = f"{given['config'].replace('_', ' ')} {given['batch']} x {given['steps']}"
        found.append(runs.row(name, more=f"{frozen} {REPORT['options'][given['config']]}", **given))
    return found


PARTS = {"classifiers": classifiers, "encoders": encoders, "probes": probes}


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
