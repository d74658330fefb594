"""`report.html`: what a `test` found, on one page without other files."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from scipy.stats import binomtest

from callbacks.figures import NAMED
from files import write
from pages import figure, page, table
from run_folder import Run, folder_of

FIGURES = {
    "curves.png": "Loss and accuracy over the steps of the fit, training and validation",
    "tsne.png": "t-SNE of training images' features before and after training, a colour for each class",
    "confusion_matrix.png": "Confusion matrix: a row for each true class, a column for each predicted class",
    "reliability.png": "Reliability diagram: accuracy over confidence, and how many images have which confidence",
    "errors.png": "The errors made with the highest confidence, each beside the nearest training images",
}


class Report(Callback):
    """Writes `report.html` into a test's folder: metrics with 95 % intervals, data, figures, config and command."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (folder := folder_of(trainer)) is None:
            return
        checkpoint, data, classes = trainer.ckpt_path, trainer.datamodule, pl_module.class_names
        run = (Run.of(Path(checkpoint)) if checkpoint else None) or Run(folder)
        tested = trainer.num_test_batches[0] * data.batch_size * trainer.world_size
        images = min(tested, len(data.split("test").labels))
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        rows = [(name, f"{value:.4f}", interval(name, value, images)) for name, value in metrics.items()]
        # Lightning notes by a leading underscore how it made the object.
        given = {k: v for k, v in data.hparams.items() if v is not None and k[0] != "_"}
        options = [f"{k} {listed(v) if isinstance(v, list | tuple) else v}" for k, v in given.items()]
        facts = {
            "images": f"{images:,} of {len(classes)} classes: {listed(classes)}",
            "data": f"{type(data).__name__}: {', '.join(options)}",
            "checkpoint": str(checkpoint),
        }
        if not data.val_size:
            facts["validation"] = "none: the fit had all training images, and its last checkpoint counts as the best"
        if {"seconds", "steps"} <= (fit := run.finished or {}).keys():
            facts["fit"] = f"{fit['seconds']:.0f} s, {fit['steps']:,} steps"
        shown = {name: path for name in FIGURES for path in (folder / name, run.folder / name) if path.is_file()}
        config = Run(folder).config
        parts = [
            table(["metric", "value", "95 % interval"], rows),
            ("h2", "Data and run"),
            table([], facts.items()),
            *(figure(path, FIGURES[name]) for name, path in shown.items()),
            ("h2", "Made by"),
            ("pre", shlex.join(["python", "main.py", "test", "--config", str(config), "--ckpt_path", str(checkpoint)])),
            ("h2", "Config"),
            ("pre", config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "none was saved"),
        ]
        title = f"{type(pl_module).__name__}, {run.folder.parent.name}/{run.folder.name}"
        write(folder / "report.html", page(title, parts))


def listed(values: Sequence[object]) -> str:
    """The first NAMED of the values, and how many there are besides."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(map(str, values[:NAMED])) + more


def interval(metric: str, value: float, images: int) -> str:
    """The 95 % interval (E. B. Wilson, 1927) of a metric that is a share of `images`; a dash for others."""
    if metric.split("/")[-1] not in ("accuracy", "knn_accuracy", "precision_at_1"):
        return "–"
    low, high = binomtest(round(value * images), images).proportion_ci(method="wilson")
    return f"{low:.4f} … {high:.4f}"
