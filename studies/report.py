"""The comparisons of the report this project grew from, with its network and options, beside ours; validation images.

    python -m benchmarks.report --data-dir data          # called again with the same --out: goes on where it stopped
    python -m benchmarks.report --only probe             # the grid of linear probes alone, on a default encoder

Its figures 2 and 3 (logistic regression, two batch sizes), 4 (softmax regression), 8 to 13 (encoders of several batch
sizes × iterations: the report's network and random triplets, and our default, each with a linear probe) and its grids
of linear and NN probes on one encoder. An iteration is an optimiser step. Prints Markdown tables; `curves.png` in --out
shows the validation accuracy of every run over its steps.
"""

import argparse
import csv
import json
from pathlib import Path

from matplotlib.figure import Figure

from callbacks.checkpoints import newest_finished
from main import main as command

CONFIGS = Path(__file__).parent.parent / "configs"
CLASSIFIERS = {  # figure → config, batch, steps, what the report printed
    "logistic regression, figure 2": ("logistic_regression", 64, 4000, None),
    "logistic regression, figure 3": ("logistic_regression", 256, 4000, 0.8030),
    "softmax regression, figure 4": ("softmax_regression", 32, 4000, 0.3684),
}
ENCODERS = {8: (32, 10), 9: (64, 800), 10: (1024, 1200), 11: (128, 1500), 12: (256, 1500), 13: (256, 1800)}
LINEAR_PROBES = {  # batch, steps → what the report printed
    (512, 1000): 0.6553,
    (1024, 1000): 0.6585,
    (256, 8000): 0.8310,
    (512, 8000): 0.8310,
    (1024, 8000): 0.8311,
    (32, 8000): 0.8315,
    (32, 10000): 0.8317,
    (64, 10000): 0.8315,
}
NN_PROBES = {(32, 100): 0.875, (64, 100): 0.84375, (32, 200): 0.71875}
# Plain SGD, clipped gradients, ½λ‖W‖², pixels as they are: the report's options.
PLAIN = [
    "--model.optimizer=sgd",
    "--model.momentum=0",
    "--model.schedule=constant",
    "--data.flip=false",
    "--data.translate=0",
]
THEIR_PROBE = [
    *PLAIN,
    "--model.lr=1e-3",
    "--model.weight_decay=0",
    "--model.l2_lambda=5e-4",
    "--trainer.gradient_clip_val=10",
]
THEIR_CLASSIFIER = [*PLAIN, "--model.lr=5e-3", "--model.l2_lambda=1e-3", "--trainer.gradient_clip_val=4"]
THEIR_ENCODER = [
    "--model.encoder=ReportEncoder", "--model.z_dim=null", "--model.loss=TripletMarginLoss", "--model.optimizer=adam",
    "--model.lr=1e-3", "--model.weight_decay=0", "--model.l2_lambda=5e-4", "--model.schedule=constant",
    "--trainer.gradient_clip_val=10", "--data.flip=false", "--data.translate=0",
]  # fmt: skip


class Runs:
    """Fits in `out`, each done once: name → (best validation accuracy, its curve)."""

    def __init__(self, out: Path, data_dir: str) -> None:
        self.out, self.data_dir, self.file = out, data_dir, out / "report.json"
        self.found = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def fit(self, name: str, config: str, batch: int, steps: int, *more: str) -> float:
        if name not in self.found:
            folder = self.out / "".join(c if c.isalnum() else "_" for c in name)
            every = max(1, steps // 10)
            options = [
                f"--data.root={self.data_dir}", f"--trainer.logger.save_dir={folder}", f"--data.batch_size={batch}",
                f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", f"--trainer.val_check_interval={every}",
                "--trainer.check_val_every_n_epoch=null",
            ]  # fmt: skip
            cli = command(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *options, *more])
            run = Path(cli.trainer.logger.log_dir)
            with (run / "metrics.csv").open(newline="") as file:
                rows = [
                    (int(r["step"]), float(r["val/accuracy"])) for r in csv.DictReader(file) if r.get("val/accuracy")
                ]
            self.found[name] = {"run": str(run), "accuracy": max(a for _, a in rows), "curve": rows}
            self.file.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
        return self.found[name]["accuracy"]

    def probe(self, encoder: str) -> float:
        """Our linear probe, as shipped, on the encoder of that run."""
        return self.fit(
            f"{encoder}: our probe", "linear_probe", 512, 1740, f"--frozen_encoder.run={self.found[encoder]['run']}"
        )


def classifiers(runs: Runs) -> None:
    print("\n| | batch | iterations | report | its options here |\n|---|---|---|---|---|")
    for name, (config, batch, steps, report) in CLASSIFIERS.items():
        accuracy = runs.fit(name, config, batch, steps, *THEIR_CLASSIFIER)
        print(f"| {name} | {batch} | {steps} | {cell(report)} | {accuracy:.4f} |", flush=True)


def encoders(runs: Runs) -> None:
    print(
        "\n| figure | batch | iterations | report's network, random triplets | our default encoder |\n|---|---|---|---|---|"
    )
    for figure, (batch, steps) in ENCODERS.items():
        theirs, ours = f"figure {figure}, report's encoder", f"figure {figure}, our encoder"
        runs.fit(theirs, "triplet_encoder", batch, steps, *THEIR_ENCODER)
        runs.fit(ours, "triplet_encoder", batch, steps, f"--model.lr={0.35 * (batch / 256) ** 0.5:.3f}")
        print(f"| {figure} | {batch} | {steps} | {runs.probe(theirs):.4f} | {runs.probe(ours):.4f} |", flush=True)


def probes(runs: Runs, encoder: str) -> None:
    print(
        "\n| probe | batch | iterations | report (random features) | its options, our encoder |\n|---|---|---|---|---|"
    )
    frozen = f"--frozen_encoder.run={encoder}"
    for (batch, steps), report in LINEAR_PROBES.items():
        accuracy = runs.fit(f"linear probe {batch} x {steps}", "linear_probe", batch, steps, frozen, *THEIR_PROBE)
        print(f"| linear | {batch} | {steps} | {cell(report)} | {accuracy:.4f} |", flush=True)
    for (batch, steps), report in NN_PROBES.items():
        accuracy = runs.fit(
            f"NN probe {batch} x {steps}",
            "mlp_probe",
            batch,
            steps,
            frozen,
            "--model.schedule=constant",
            "--model.lr=1e-3",
        )
        print(f"| NN | {batch} | {steps} | {cell(report)} | {accuracy:.4f} |", flush=True)


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--only", choices=["pixels", "encoder", "probe"])
    parser.add_argument("--encoder", help="run of the probe grid's encoder (default: newest in runs/triplet_encoder)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"))
    options = parser.parse_args()
    runs = Runs(options.out, options.data_dir)
    if options.only in (None, "pixels"):
        classifiers(runs)
    if options.only in (None, "encoder"):
        encoders(runs)
    if options.only in (None, "probe"):
        probes(runs, options.encoder or str(newest_finished(Path("runs/triplet_encoder"))))
    draw(runs)


if __name__ == "__main__":
    main()
