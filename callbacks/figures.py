"""The figures of a run and of the whole ladder, and the way they take into a run's folder and TensorBoard."""

import warnings

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from files import write
from run_folder import folder_of

# Ten colours that colour-blind readers tell apart (M. A. Petroff, 2021). Each figure names its colours, since a style
# would hold for the whole process.
COLOURS = matplotlib.color_sequences["petroff10"]
# Up to so many classes: numbers in a confusion matrix, entries in a legend; names beside an axis; rows of their own in
# a confusion matrix.
NUMBERED, NAMED, DRAWN = 20, 50, 1000
DRAW_EVERY = 120.0  # seconds between a fit's figures: drawing takes longer than an epoch of a small stage
LONGEST = 20  # characters of a class's name that a figure shows


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers of this process: none but on the first one."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def save(trainer: Trainer, figure: Figure, file: str, tag: str | None = None) -> None:
    """Writes `figure` into the run's folder as the PNG `file`, and gives it as `tag` to loggers that take images."""
    figure.set_dpi(120)
    canvas, folder = FigureCanvasAgg(figure), folder_of(trainer)
    with warnings.catch_warnings():  # the default font has a box for the characters that it lacks, such as Chinese ones
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    if folder is not None:
        write(folder / file, lambda png: imsave(png, pixels, format="png"))
    for logger in trainer.loggers if tag is not None else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels, trainer.global_step, dataformats="HWC")
        elif hasattr(logger, "log_image"):  # WandbLogger and its like
            logger.log_image(tag, [pixels], trainer.global_step)


def plain(name: str) -> str:
    """A class's name as figures show it: on one line, not longer than LONGEST, and no formula between two dollars."""
    name = " ".join(name.split())
    return (name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…").replace("$", r"\$")


def draw_curves(rows: dict[int, dict[str, float]]) -> Figure:
    """Loss and accuracy over the steps, training and validation; `rows` are those of `metrics.csv` by step."""
    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.13, top=0.97)  # faster than a layout that measures the texts
    seen = {name.split("/")[-1] for row in rows.values() for name in row}
    accuracy = "view_accuracy" if "view_accuracy" in seen else "accuracy"
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", accuracy)):
        for split, label, style, colour in (
            ("train", "training", "o-", COLOURS[0]),
            ("val", "validation", "s--", COLOURS[1]),
        ):
            name = f"{split}/{quantity}"
            points = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
            if points:
                axes.plot(*zip(*points), style, color=colour, markersize=3, label=label)
        axes.set(xlabel="step", ylabel=quantity)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def draw_confusion(predicted: Tensor, labels: Tensor, names: list[str]) -> Figure:
    """How often each class is taken for which, beside each class's accuracy; classes (N,) int64 each.

    Of more than DRAWN classes, several that follow each other share a row and a column."""
    classes, size = len(names), min(len(names), NUMBERED)
    share = -(-classes // DRAWN)
    cells = -(-classes // share)
    matrix = (labels // share * cells + predicted // share).bincount(minlength=cells**2).view(cells, cells)
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    right_ones, images = (x.bincount(minlength=classes) for x in (labels[predicted == labels], labels))
    accuracies = (right_ones / images.clamp_min(1)).numpy()
    figure = Figure(figsize=(3 + 0.75 * size, 2 + 0.5 * size), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    edges = (-0.5, cells * share - 0.5)
    left.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=(*edges, *edges[::-1]))
    for row in range(classes if classes <= NUMBERED else 0):
        for column in range(classes):
            colour = "black" if shares[row, column] > 0.5 else "white"
            left.text(column, row, int(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
    if classes <= NAMED:
        left.set_xticks(range(classes), map(plain, names), rotation=45, ha="right")
        left.set_yticks(range(classes), map(plain, names))
        bars = right.barh(range(classes), accuracies, color=COLOURS[0])
        right.bar_label(bars, fmt="%.3f", padding=2, fontsize=7)
    else:  # as one outline: a thousand bars take seconds
        places = np.arange(classes + 1) - 0.5
        right.stairs(accuracies, places, orientation="horizontal", fill=True, color=COLOURS[0])
    left.set(xlabel="predicted", ylabel="true", title=f"confusion matrix, {len(labels)} images")
    right.set(xlim=(0, 1.2), ylim=(classes - 0.5, -0.5), xlabel="accuracy of the class", yticks=[])
    return figure


def draw_reliability(confidence: Tensor, correct: Tensor, bins: int, error: float) -> Figure:
    """Accuracy and number of images in `bins` equally wide bins of confidence; of each image (N,) its confidence and
    whether it is correct."""
    confidence, figure = confidence.double(), Figure(figsize=(5, 5), layout="constrained")
    place = (confidence * bins).long().clamp_max(bins - 1)
    count = place.bincount(minlength=bins)
    mean, accuracy = (place.bincount(x, minlength=bins) / count.clamp_min(1) for x in (confidence, correct.double()))
    edges, used, bar = torch.arange(bins) / bins, count > 0, {"width": 1 / bins, "align": "edge", "edgecolor": "white"}
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(edges[used].numpy(), accuracy[used].numpy(), color=COLOURS[0], label="accuracy", **bar)
    upper.plot([0, 1], [0, 1], "--", color="0.4", label="perfect calibration")
    upper.plot(mean[used].numpy(), accuracy[used].numpy(), "o", color=COLOURS[1], markersize=4, label="mean confidence")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"reliability, expected calibration error {error:.4f}")
    upper.legend()
    lower.bar(edges.numpy(), count.numpy(), color="0.6", **bar)
    lower.set(xlabel="confidence", ylabel="images")
    return figure


def draw_gallery(rows: list[list[tuple[Tensor, str]]], title: str) -> Figure:
    """Rows of images (S, S, 3) uint8, each with its caption."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.4 * columns + 0.2, 1.7 * len(rows)), layout="constrained")
    axes = figure.subplots()  # a grid of many axes takes seconds
    for i, row in enumerate(rows):
        for k, (image, caption) in enumerate(row):
            left, top = 1.25 * k, 1.5 * i
            axes.imshow(image.numpy(), extent=(left, left + 1, top + 1, top))
            axes.text(left + 0.5, top - 0.04, caption, ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(-0.15, 1.25 * columns - 0.1), ylim=(1.5 * len(rows) - 0.5, -0.45))
    axes.set_axis_off()
    if columns > 1:
        figure.suptitle(title, fontsize=9)
    return figure


def draw_pca(features: Tensor, labels: Tensor, names: list[str]) -> Figure:
    """The two directions of largest variance of `features` (N, D) float64, coloured by `labels` (N,)."""
    centred = features - features.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    shares = (variances.flip(0)[:2] / variances.sum().clamp_min(1e-300)).tolist()
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, centred @ directions[:, -2:].flip(1), labels, names)
    axes.set(xlabel=f"{shares[0]:.0%} of the variance", ylabel=f"{shares[1]:.0%} of the variance")
    axes.set_title(f"{len(features)} validation images' features")
    return figure


def draw_tsne(found: dict[str, Tensor], labels: Tensor, names: list[str]) -> Figure:
    """A panel for each `when` of `found`: points (N, 2), coloured by `labels` (N,)."""
    figure = Figure(figsize=(1.5 + 5.5 * len(found), 5.5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (when, points) in zip(panels, found.items()):
        _scatter(axes, points, labels, names, legend=axes is panels[-1])
        axes.set_title(f"t-SNE of {len(points)} training images' features {when}")
    return figure


def _scatter(axes: Axes, points: Tensor, labels: Tensor, names: list[str], legend: bool = True) -> None:
    """Points (N, 2) with a colour and marker for each class; of very many classes, the last ones are grey."""
    if not names:  # images without labels
        axes.scatter(*points.T.numpy(), s=5, color=COLOURS[0])
    own = names if len(names) <= NUMBERED else names[: NUMBERED - 1]
    for c, name in enumerate(own):
        style = {"color": COLOURS[c % 10], "marker": "o^"[c // 10]}
        # The space, since a legend leaves out what begins with an underscore.
        axes.scatter(*points[labels == c].T.numpy(), s=5, label=f" {plain(name)}", **style)
    if own != names:
        rest = points[labels >= len(own)].T.numpy()
        axes.scatter(*rest, s=5, color="0.8", zorder=0, label=f"{len(names) - len(own)} other classes")
    axes.set(xticks=[], yticks=[])
    if legend and names:
        axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_accuracies(rows: list[dict], title: str) -> Figure:
    """Test accuracy of each stage of the ladder, beside what the report states."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    names, accuracies = [r["stage"].replace("_", " ") for r in rows], [r["test_accuracy"] for r in rows]
    bars = axes.barh(names, accuracies, xerr=[r["test_std"] or 0 for r in rows], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    marked = [(r["report"], i) for i, r in enumerate(rows) if r["report"] is not None]
    if marked:
        axes.plot(*zip(*marked), "D", color=COLOURS[1], label="report (validation)")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above the bars, beside the title
    axes.set(xlabel="test accuracy", xlim=(0, 1.08), title=title)
    axes.invert_yaxis()
    return figure


def draw_costs(rows: list[dict], title: str) -> Figure:
    """Test accuracy of each stage over its `training_seconds`, its encoder's included."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, r in enumerate(rows):
        style = {"color": COLOURS[k % 10], "marker": "osD^vP*X<"[k % 9], "linestyle": "none", "markersize": 8}
        label, spread = r["stage"].replace("_", " "), r["test_std"] or 0
        axes.errorbar(r["training_seconds"], r["test_accuracy"], yerr=spread, label=label, **style)
    axes.set(xscale="log", xlabel="seconds of training, the encoder's included", ylim=(0, 1))
    axes.set(ylabel="test accuracy", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return figure
