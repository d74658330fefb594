"""The whole ladder on one data set, from pixels to the contrastive encoder: one table and one page of what each step buys.

    python reproduce.py --data digits                      # offline, about a minute
    python reproduce.py --data-dir data                    # CIFAR-10: .npz files there, or a download
    python reproduce.py --data-dir data --seeds 3          # mean and standard deviation over three seeds

Every stage runs through main.py with its shipped config. Called again with the same --out, it goes on where it stopped,
within a fit from its last checkpoint, and ends with the same accuracies.
"""

import argparse
import html
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

from callbacks.checkpoints import FINISHED, newest_finished
from matplotlib.figure import Figure

from callbacks.report import document, figure, table
from errors import InputError
from main import main, one_line

CONFIGS = Path(__file__).parent / "configs"
# Validation accuracies the report states; it has no test accuracies (its test images came without labels).
REPORT = {
    "logistic_regression": 0.8030,
    "softmax_regression": 0.3684,
    "random_encoder_linear_probe": None,
    "triplet_encoder_knn": None,
    "triplet_encoder_linear_probe": 0.8315,
    "triplet_encoder_mlp_probe": 0.875,
    "fine_tuned_encoder": None,
    "supervised_encoder": None,
    "supervised_encoder_linear_probe": None,
}
# Whose training the row of `draw_costs` counts besides its own.
ENCODERS = {
    **dict.fromkeys(
        ("triplet_encoder_linear_probe", "triplet_encoder_mlp_probe", "fine_tuned_encoder"), "triplet_encoder_knn"
    ),
    "supervised_encoder_linear_probe": "supervised_encoder",
}
# 1,077 digits are two batches of 512, so that batches shrink and epochs grow in number.
DIGITS = {
    "logistic_regression": ["--data.batch_size=128"],
    "softmax_regression": ["--data.batch_size=128", "--trainer.max_epochs=30"],
    "triplet_encoder": ["--data.batch_size=128"],
    "linear_probe": ["--data.batch_size=128"],
    "mlp_probe": ["--data.batch_size=128"],
    "fine_tune": ["--data.batch_size=128"],
    "supervised_encoder": ["--data.batch_size=128", "--model.lr=0.2"],
}


class Ladder:
    """The runs of one seed, in `out/seed_S/`; finished rows are kept in `rows.json` there."""

    def __init__(self, out: Path, seed: int, data: list[str], overrides: dict[str, list[str]]) -> None:
        self.out, self.seed, self.data, self.overrides = out / f"seed_{seed}", seed, data, overrides
        self.rows_file = self.out / "rows.json"

    def run(self) -> dict[str, dict]:
        rows = json.loads(self.rows_file.read_text()) if self.rows_file.is_file() else {}
        for stage, function in {
            "logistic_regression": lambda: self._classifier("logistic_regression"),
            "softmax_regression": lambda: self._classifier("softmax_regression"),
            "triplet_encoder_knn": self._triplet_encoder,
            "random_encoder_linear_probe": lambda: self._probe(
                "linear_probe", "random_encoder", checkpoint="step0.ckpt"
            ),
            "triplet_encoder_linear_probe": lambda: self._probe("linear_probe", "linear_probe"),
            "triplet_encoder_mlp_probe": lambda: self._probe("mlp_probe", "mlp_probe"),
            "fine_tuned_encoder": lambda: self._probe("fine_tune", "fine_tune"),
            "supervised_encoder": lambda: self._classifier("supervised_encoder"),
            "supervised_encoder_linear_probe": lambda: self._probe(
                "linear_probe", "supervised_probe", "supervised_encoder"
            ),
        }.items():
            if stage in rows:
                print(f"[seed {self.seed}] {stage}: finished before", flush=True)
                continue
            print(f"[seed {self.seed}] {stage} …", flush=True)
            self.finished_before, start = 0.0, time.monotonic()
            val, test = function()
            seconds = self.finished_before + time.monotonic() - start
            rows[stage] = {"val": val, "test": test, "seconds": seconds, "fit_seconds": self.fit_seconds}
            print(
                f"[seed {self.seed}] {stage}: val {val:.4f}, test {test:.4f}, {rows[stage]['seconds']:.0f} s",
                flush=True,
            )
            _write(self.rows_file, json.dumps(rows, indent=1))
        return rows

    def _main(self, command: str, config: str, name: str, *more: str):
        classes = ["--data.classes=[0,1]"] if config == "logistic_regression" else []
        logger = [f"--trainer.logger.save_dir={self.out}", f"--trainer.logger.name={name}"]
        fixed = ["--config", str(CONFIGS / f"{config}.yaml"), *self.data, *classes, f"--seed_everything={self.seed}"]
        cli = main([command, *fixed, *logger, *self.overrides.get(config, []), *more])
        return {key: float(value) for key, value in cli.trainer.callback_metrics.items()}

    def _fit(self, config: str, name: str, *more: str) -> None:
        finished = any((self.out / name).glob(f"version_*/{FINISHED}"))
        if not finished:
            interrupted = any((self.out / name).glob("version_*/checkpoints/*.ckpt"))
            self._main("fit", config, name, *more, *(["--ckpt_path=last"] if interrupted else []))
        note = newest_finished(self.out / name) / FINISHED
        self.fit_seconds = json.loads(note.read_text())["seconds"]
        self.finished_before = self.fit_seconds if finished else 0.0

    def _evaluate(self, config: str, name: str, metric: str) -> tuple[float, float]:
        validated = self._main("validate", config, name, "--ckpt_path=best")
        tested = self._main("test", config, name, "--ckpt_path=best")
        return validated[f"val/{metric}"], tested[f"test/{metric}"]

    def _classifier(self, config: str) -> tuple[float, float]:
        self._fit(config, config)
        return self._evaluate(config, config, "accuracy")

    def _triplet_encoder(self) -> tuple[float, float]:
        self._fit("triplet_encoder", "triplet_encoder")
        return self._evaluate("triplet_encoder", "triplet_encoder", "knn_accuracy")

    def _probe(
        self, config: str, name: str, of: str = "triplet_encoder", checkpoint: str | None = None
    ) -> tuple[float, float]:
        run = newest_finished(self.out / of)
        encoder = run / "checkpoints" / checkpoint if checkpoint else run
        self._fit(config, name, f"--frozen_encoder.run={encoder}")
        return self._evaluate(config, name, "accuracy")


def summarise(ladders: list[dict[str, dict]], report: bool) -> list[dict]:
    """One row for each stage: means over the seeds, sample standard deviations where there are several."""
    rows = []
    for stage in REPORT:
        row = {"stage": stage}
        for key in ("val", "test"):
            values = [ladder[stage][key] for ladder in ladders]
            row[f"{key}_accuracy"] = statistics.fmean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        for key in ("seconds", "fit_seconds"):
            row[key] = statistics.fmean(ladder[stage][key] for ladder in ladders)
        row["report"] = REPORT[stage] if report else None
        rows.append(row)
    return rows


def write_results(rows: list[dict], out: Path, title: str, command: str) -> None:
    """Writes `results.json`, `results.md`, `results.png`, `cost.png` and `report.html` into `out`."""
    _write(out / "results.json", json.dumps(rows, indent=1))

    def cell(value: float | None, std: float | None = None) -> str:
        return "–" if value is None else f"{value:.4f}" + (f" ± {std:.4f}" if std is not None else "")

    head = ["stage", "validation", "test", "seconds", "of which fit", "report (validation)"]
    cells = []
    for r in rows:
        accuracies = cell(r["val_accuracy"], r["val_std"]), cell(r["test_accuracy"], r["test_std"])
        cells.append([r["stage"], *accuracies, f"{r['seconds']:.0f}", f"{r['fit_seconds']:.0f}", cell(r["report"])])
    lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    _write(out / "results.md", "\n".join([f"# {title}", "", lines[0], "|---" * len(head) + "|", *lines[1:]]))

    draw_accuracies(rows, title).savefig(out / "results.png", dpi=120)
    draw_costs(rows, title).savefig(out / "cost.png", dpi=120)
    tsne = newest_finished(out / "seed_0" / "triplet_encoder") / "tsne.png"
    features = "t-SNE of training images' features before and after the encoder's training, a colour for each class"
    parts = [
        table(head, cells),
        figure(out / "results.png", "Test accuracy of every stage, a bar each; diamonds: what the report states"),
        figure(
            out / "cost.png",
            "Test accuracy over the seconds it took, a point for each stage, the encoder's fit included",
        ),
        *([figure(tsne, features)] if tsne.is_file() else []),
        "<h2>Stages</h2>",
        *(f"<h3>{config}</h3><pre>{html.escape((CONFIGS / f'{config}.yaml').read_text())}</pre>" for config in DIGITS),
        f"<h2>Made by</h2><pre>{html.escape(command)}</pre>",
    ]
    _write(out / "report.html", document(f"What a contrastive encoder buys: {title}", parts))


def draw_accuracies(rows: list[dict], title: str) -> Figure:
    drawn = Figure(figsize=(9, 4), layout="constrained")
    axes = drawn.subplots()
    names = [r["stage"].replace("_", " ") for r in rows]
    bars = axes.barh(names, [r["test_accuracy"] for r in rows], xerr=[r["test_std"] or 0 for r in rows], color="C0")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    marked = [(r["report"], i) for i, r in enumerate(rows) if r["report"] is not None]
    if marked:
        axes.plot(*zip(*marked), "D", color="C1", label="report (validation)")
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.72))  # beside the short bars of the pixels' stages
    axes.set(xlabel="test accuracy", xlim=(0, 1.08), title=title)
    axes.invert_yaxis()
    return drawn


def draw_costs(rows: list[dict], title: str) -> Figure:
    fits = {r["stage"]: r["fit_seconds"] for r in rows}
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes = drawn.subplots()
    for k, r in enumerate(rows):
        seconds = r["fit_seconds"] + fits.get(ENCODERS.get(r["stage"]), 0)
        style = {"color": f"C{k}", "marker": "osD^vP*X<"[k % 9], "linestyle": "none", "markersize": 8}
        axes.errorbar(seconds, r["test_accuracy"], yerr=r["test_std"] or 0, label=r["stage"].replace("_", " "), **style)
    axes.set(
        xscale="log",
        xlabel="seconds of training, the encoder's included",
        ylabel="test accuracy",
        ylim=(0, 1),
        title=title,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return drawn


def _write(path: Path, text: str) -> None:
    # Whole or not at all: a kill in the middle must not leave half a file for the next call to read.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(text + "\n")
    path.with_suffix(".part").replace(path)


def reproduce(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(InputError(message))
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10")
    parser.add_argument("--data-dir", default="data", help="folder of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, 0, 1, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of runs and results")
    options = parser.parse_args(args)
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: must be at least 1")

    digits = options.data == "digits"
    data = ["--data=DigitsDataModule"] if digits else [f"--data.root={options.data_dir}"]
    settings = options.out / "settings.json"
    wanted = {"data": options.data, "data_dir": None if digits else options.data_dir}
    if settings.is_file() and json.loads(settings.read_text()) != wanted:
        raise InputError(f"{options.out} holds results of {settings.read_text().strip()}; give another --out")
    _write(settings, json.dumps(wanted))

    ladders = [Ladder(options.out, seed, data, DIGITS if digits else {}).run() for seed in range(options.seeds)]
    rows = summarise(ladders, report=not digits)
    title = ("scikit-learn's digits" if digits else "CIFAR-10") + f", {options.seeds} seed{'s' * (options.seeds > 1)}"
    command = shlex.join(["python", "reproduce.py", *(sys.argv[1:] if args is None else args)])
    write_results(rows, options.out, title, command)
    print((options.out / "results.md").read_text())
    print(f"{options.out}: report.html, results.json, results.md. Look: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    sys.exit(one_line("reproduce.py", reproduce))
