"""The whole ladder on one data set, from pixels to the contrastive encoder: a table and a page of what each step buys.

    python reproduce.py --data digits                      # offline, about two minutes
    python reproduce.py --data-dir data                    # CIFAR-10: .npz files there, or a download
    python reproduce.py --data-dir data --seeds 3          # mean and standard deviation over three seeds

Every step runs through main.py with its shipped config. Called again with the same --out, the ladder resumes where it
stopped, within a fit from its last checkpoint, and ends with the same accuracies.
"""

import os

if __name__ == "__main__":  # a notebook's is not installed here; before anything imports matplotlib
    os.environ.pop("MPLBACKEND", None)

import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from callbacks.figures import draw_accuracies, draw_costs
from errors import InputError, OneLineParser, one_line, require
from files import read_json, write
from main import main
from pages import figure, page, table
from run_folder import FINISHED, Run

CONFIGS = Path(__file__).parent / "configs"
PLAIN = "--pictures=false"


@dataclass(frozen=True)
class Step:
    """A step of the ladder: a fit, then the accuracy of its best checkpoint on validation and test images."""

    name: str  # in the results
    config: str  # its file in configs/
    run: str  # the folder of its runs
    metric: str = "accuracy"  # what goes into the results
    on: str | None = None  # the run whose encoder it starts from; None: it has its own, or none
    untrained: bool = False  # take that encoder as it was before its first training step
    report: float | None = None  # validation accuracy in the report, whose test images had no labels
    digits: tuple[str, ...] = (PLAIN,)  # options on digits, where figures are a third of the time


LOGISTIC, SOFTMAX = "logistic_regression", "softmax_regression"
SUPERVISED, LABEL_FREE, PATCHES = "supervised_encoder", "label_free_encoder", "random_patches_linear_probe"
LADDER = (
    Step(LOGISTIC, LOGISTIC, LOGISTIC, report=0.8030, digits=(PLAIN, "--data.classes=[0,1]")),
    Step(SOFTMAX, SOFTMAX, SOFTMAX, report=0.3684, digits=(PLAIN, "--trainer.max_epochs=30")),
    Step("random_encoder_linear_probe", "linear_probe", "random_encoder", on="triplet_encoder", untrained=True),
    Step("random_all_blocks_linear_probe", "linear_probe", "random_all_blocks", on=LABEL_FREE, untrained=True),
    Step(PATCHES, PATCHES, PATCHES, digits=(PLAIN, "--frozen_encoder.encoder.patches=200")),
    Step("triplet_encoder_knn", "triplet_encoder", "triplet_encoder", metric="knn_accuracy", digits=()),
    Step("triplet_encoder_linear_probe", "linear_probe", "linear_probe", on="triplet_encoder", report=0.8315),
    Step("triplet_encoder_mlp_probe", "mlp_probe", "mlp_probe", on="triplet_encoder", report=0.875),
    Step("fine_tuned_encoder", "fine_tune", "fine_tune", on="linear_probe"),
    Step(SUPERVISED, SUPERVISED, SUPERVISED, digits=(PLAIN, "--model.lr=0.2")),
    Step("supervised_encoder_linear_probe", "linear_probe", "supervised_probe", on=SUPERVISED),
    Step("label_free_encoder_knn", LABEL_FREE, LABEL_FREE, metric="knn_accuracy"),
    Step("label_free_encoder_linear_probe", "linear_probe", "label_free_probe", on=LABEL_FREE),
    Step("label_free_encoder_mlp_probe", "mlp_probe", "label_free_mlp_probe", on=LABEL_FREE),
    Step("label_free_encoder_fine_tuned", "fine_tune", "label_free_fine_tuned", on="label_free_probe"),
)


class Ladder:
    """The runs of one seed, in `out/seed_S/`; finished rows are kept in `rows.json` there."""

    def __init__(self, out: Path, seed: int, data: list[str], digits: bool) -> None:
        self.out, self.seed, self.data, self.digits = out / f"seed_{seed}", seed, data, digits

    def climb(self) -> dict[str, dict]:
        """Runs what has not finished yet; a row for each step, by its name."""
        file, head = self.out / "rows.json", f"[seed {self.seed}]"
        rows = read_json(file) if file.is_file() else {}
        for step in sorted(LADDER, key=lambda step: step.on is not None):  # encoders before what starts from them
            if step.name in rows:
                print(f"{head} {step.name}: finished before", flush=True)
                continue
            print(f"{head} {step.name} …", flush=True)
            rows[step.name] = self.row(step)
            found = "val {val:.4f}, test {test:.4f}, {seconds:.0f} s".format(**rows[step.name])
            print(f"{head} {step.name}: {found}", flush=True)
            write(file, json.dumps(rows, indent=1) + "\n")
        return rows

    def row(self, step: Step) -> dict[str, float]:
        start, runs = time.monotonic(), self.out / step.run
        finished_before = any(runs.glob(f"version_*/{FINISHED}"))
        if not finished_before:
            self._fit(step, runs)
        fit_seconds = (run := Run.newest(runs)).finished.get("seconds")
        mend = f"a number; remove {run.folder}, so that it is fitted again"
        require(isinstance(fit_seconds, float), f"{run.folder / FINISHED}: seconds", fit_seconds, mend)
        validated = self._main("validate", step, "--ckpt_path=best", PLAIN)  # the test's report has the same figures
        tested = self._main("test", step, "--ckpt_path=best")
        seconds = time.monotonic() - start + (fit_seconds if finished_before else 0)
        name = f"val/views_{step.metric}"  # measured as in the test, where a fit measures otherwise
        found = validated.get(name, validated[f"val/{step.metric}"])
        accuracies = {"val": found, "test": tested[f"test/{step.metric}"]}
        return {**accuracies, "seconds": seconds, "fit_seconds": fit_seconds}

    def _fit(self, step: Step, runs: Path) -> None:
        more = []
        if step.on is not None:
            encoder = Run.newest(self.out / step.on)
            more.append(f"--frozen_encoder.run={encoder.step0 if step.untrained else encoder.folder}")
        if any(runs.glob("version_*/checkpoints/*.ckpt")):  # of a fit that was interrupted
            more.append("--ckpt_path=last")
        self._main("fit", step, *more)

    def _main(self, command: str, step: Step, *more: str) -> dict[str, float]:
        logger = [f"--trainer.logger.save_dir={self.out}", f"--trainer.logger.name={step.run}"]
        config = ["--config", str(CONFIGS / f"{step.config}.yaml"), *self.data, *(step.digits if self.digits else ())]
        # One device: a second process of the program would fit every stage too.
        cli = main([command, *config, f"--seed_everything={self.seed}", "--trainer.devices=1", *logger, *more])
        return {key: float(value) for key, value in cli.trainer.callback_metrics.items()}


def summarise(ladders: list[dict[str, dict]], report: bool) -> list[dict]:
    """One row for each step: means over the seeds, sample standard deviations where there are several."""
    by_run = {step.run: step for step in LADDER}
    rows = []

    def mean(step: Step, key: str) -> float:
        return statistics.fmean(ladder[step.name][key] for ladder in ladders)

    def training_seconds(step: Step | None) -> float:
        if step is None:
            return 0.0
        return mean(step, "fit_seconds") + training_seconds(None if step.untrained else by_run.get(step.on))

    for step in LADDER:
        row = {"stage": step.name}
        for key in ("val", "test"):
            values = [ladder[step.name][key] for ladder in ladders]
            row[f"{key}_accuracy"] = mean(step, key)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        row |= {key: mean(step, key) for key in ("seconds", "fit_seconds")}
        rows.append({**row, "training_seconds": training_seconds(step), "report": step.report if report else None})
    return rows


def write_results(rows: list[dict], out: Path, title: str, command: str) -> None:
    """Writes `results.json`, `results.md`, `results.png`, `cost.png` and `report.html` into `out`."""
    write(out / "results.json", json.dumps(rows, indent=1) + "\n")

    def cell(value: float | None, std: float | None = None) -> str:
        return "–" if value is None else f"{value:.4f}" + (f" ± {std:.4f}" if std is not None else "")

    head = ["stage", "validation", "test", "seconds", "of which fit", "report (validation)"]
    cells = []
    for r in rows:
        accuracies = cell(r["val_accuracy"], r["val_std"]), cell(r["test_accuracy"], r["test_std"])
        cells.append([r["stage"], *accuracies, f"{r['seconds']:.0f}", f"{r['fit_seconds']:.0f}", cell(r["report"])])
    lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    write(out / "results.md", "\n".join([f"# {title}", "", lines[0], "|---" * len(head) + "|", *lines[1:], ""]))

    tsne = Run.newest(out / "seed_0" / "triplet_encoder").folder / "tsne.png"
    figures = {
        out / "results.png": "Test accuracy of every stage; diamonds: what the report states",
        out / "cost.png": "Test accuracy over the seconds of training, those of the encoder below it included",
        tsne: "t-SNE of training images' features before and after the encoder's training, a colour for each class",
    }
    for path, draw in zip(figures, (draw_accuracies, draw_costs)):
        write(path, lambda file: draw(rows, title).savefig(file, dpi=120))
    configs = dict.fromkeys(step.config for step in LADDER)
    parts = [
        table(head, cells),
        *(figure(path, text) for path, text in figures.items() if path.is_file()),
        ("h2", "Stages"),
        *(part for name in configs for part in (("h3", name), ("pre", (CONFIGS / f"{name}.yaml").read_text("utf-8")))),
        ("h2", "Made by"),
        ("pre", command),
    ]
    write(out / "report.html", page(f"What a contrastive encoder buys: {title}", parts))


def reproduce(args: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10")
    parser.add_argument("--data-dir", default="data", help="folder of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, 0, 1, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of runs and results")
    options = parser.parse_args(args)
    require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")

    digits = options.data == "digits"
    settings = options.out / "settings.json"
    wanted = {"data": options.data, "data_dir": None if digits else options.data_dir}
    if settings.is_file() and (found := read_json(settings)) != wanted:
        raise InputError(f"{options.out} holds results of {json.dumps(found)}; give another --out")
    write(settings, json.dumps(wanted) + "\n")

    # 1,077 digits are few large batches.
    data = ["--data=DigitsDataModule", "--data.batch_size=128"] if digits else [f"--data.root={options.data_dir}"]
    ladders = [Ladder(options.out, seed, data, digits).climb() for seed in range(options.seeds)]
    rows = summarise(ladders, report=not digits)
    title = ("scikit-learn's digits" if digits else "CIFAR-10") + f", {options.seeds} seed{'s' * (options.seeds > 1)}"
    command = shlex.join(["python", "reproduce.py", *(sys.argv[1:] if args is None else args)])
    write_results(rows, options.out, title, command)
    print((options.out / "results.md").read_text("utf-8"))
    print(f"{options.out}: report.html, results.json, results.md. Look: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    sys.exit(one_line("reproduce.py", reproduce))
