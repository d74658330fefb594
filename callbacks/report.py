"""`report.html`: what a `test` found, on one page without other files."""

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer

from callbacks.checkpoints import FINISHED

# Metrics that count images, so that they have a binomial interval.
SHARES = ("accuracy", "knn_accuracy", "precision_at_1")
FIGURES = {
    "curves.png": "Loss and accuracy over the steps of the fit, training and validation",
    "tsne.png": "t-SNE of training images' features before and after training, a colour for each class",
    "confusion_matrix.png": "Confusion matrix: a row for each true class, a column for each predicted one; accuracy of each class",
    "reliability.png": "Reliability diagram: accuracy over confidence, and how many images have which confidence",
    "errors.png": "The errors made with the highest confidence, each beside the nearest training images",
}
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: left }
img { max-width: 100% } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto } figure { margin: 2rem 0 }"""


class Report(Callback):
    """Writes `report.html` into a test's folder: metrics with 95 % intervals, data, figures, config and command."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and trainer.logger):
            return
        folder = Path(trainer.logger.log_dir)
        run = folder.parent if (folder.parent / "checkpoints").is_dir() else folder
        images = len(trainer.datamodule.split("test").labels)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        config = (folder / "config.yaml").read_text()
        # Lightning notes by a leading underscore how it made the object.
        options = {k: v for k, v in trainer.datamodule.hparams.items() if v is not None and k[0] != "_"}
        facts = {
            "images": f"{images:,} of {len(pl_module.class_names)} classes: {', '.join(pl_module.class_names)}",
            "data": f"{type(trainer.datamodule).__name__}: {', '.join(f'{k} {v}' for k, v in options.items())}",
            "checkpoint": str(trainer.ckpt_path),
        }
        if (run / FINISHED).is_file():
            note = json.loads((run / FINISHED).read_text())
            facts["fit"] = f"{note['seconds']:.0f} s, {note['steps']:,} steps"
        command = f"python main.py test --config {folder}/config.yaml --ckpt_path {trainer.ckpt_path}"
        found = {name: path for name in FIGURES for path in (folder / name, run / name) if path.is_file()}
        title = f"{type(pl_module).__name__}, {run.parent.name}/{run.name}"
        (folder / "report.html").write_text(
            page(title, metrics, images, facts, found, config, command), encoding="utf-8"
        )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images (E. B. Wilson, 1927)."""
    z = 1.959964
    centre, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return tuple((centre + sign * spread) / (1 + z**2 / count) for sign in (-1, 1))


def page(
    title: str, metrics: dict, images: int, facts: dict, figures: dict[str, Path], config: str, command: str
) -> str:
    rows = []
    for name, value in sorted(metrics.items()):
        interval = "–"
        if name.split("/")[-1] in SHARES:
            interval = "{:.4f} … {:.4f}".format(*wilson_interval(value, images))
        rows.append((name, f"{value:.4f}", interval))
    parts = [table(["metric", "value", "95 % interval"], rows), "<h2>Data and run</h2>", table([], facts.items())]
    parts += [figure(path, FIGURES[name]) for name, path in figures.items()]
    parts += [f"<h2>Made by</h2><pre>{html.escape(command)}</pre>", f"<h2>Config</h2><pre>{html.escape(config)}</pre>"]
    return document(title, parts)


def table(head: list[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def figure(path: Path, text: str) -> str:
    """A PNG inside the page, `text` its caption and alternative text."""
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(text)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def document(title: str, parts: list[str]) -> str:
    """A page of parts made by `table`, `figure` or by hand, which needs no other file."""
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{title}</h1>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
