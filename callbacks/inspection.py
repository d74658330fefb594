"""Where a classifier errs and how sure it is of itself: figures of a `validate` or `test`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from errors import InputError
from lightning_modules.distributed import gather_objects


class Inspection(Callback):
    """Draws `confusion_matrix.png`, `reliability.png` and `errors.png` when a classifier is validated or tested.

    The confusion matrix beside each class's accuracy; the reliability diagram with the expected calibration error, which
    is logged as `<split>/ece`; the errors made with the highest confidence, each with the training images nearest to it
    in the encoder's features (cosine; for a regression on pixels, in pixels). All go to TensorBoard too.

    Args:
        bins: of confidence, equally wide.
        errors: how many are shown.
        neighbours: nearest training images beside each error.
        bank: training images they are sought among, the first of the split.
    """

    def __init__(self, bins: int = 15, errors: int = 8, neighbours: int = 4, bank: int = 10_000) -> None:
        for name, value in (("bins", bins), ("errors", errors), ("neighbours", neighbours), ("bank", bank)):
            if value < 1:
                raise InputError(f"Inspection {name} {value}: must be at least 1")
        self.bins, self.errors, self.neighbours, self.bank = bins, errors, neighbours, bank
        self._found: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(pl_module, "triplet_loss"):
            raise InputError("Inspection looks at classifiers; a triplet encoder has no classes to err in")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.state.fn == "validate":
            self._found.append((pl_module.probabilities(outputs).cpu(), batch[1].cpu()))

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._found.append((pl_module.probabilities(outputs).cpu(), batch[1].cpu()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._inspect(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inspect(trainer, pl_module, "test")

    def _inspect(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        # Each process has a contiguous block of the images, so their order is the order of the ranks.
        blocks = [block for rank in gather_objects(self._found) for block in rank]
        self._found = []
        probabilities, labels = (torch.cat(parts) for parts in zip(*blocks))
        reliability = reliability_diagram(probabilities, labels, self.bins)
        ece = expected_calibration_error(*reliability)
        pl_module.log(f"{split}/ece", ece, sync_dist=True)
        if not (trainer.is_global_zero and trainer.logger):
            return
        figures = {
            "confusion_matrix": draw_confusion(probabilities.argmax(1), labels, pl_module.class_names),
            "reliability": draw_reliability(*reliability, ece),
        }
        errors = (probabilities.argmax(1) != labels).nonzero().flatten()
        errors = errors[probabilities[errors].amax(1).argsort(descending=True)][: self.errors]
        if len(errors):
            figures["errors"] = self._draw_errors(trainer, pl_module, split, errors, probabilities)
        folder = Path(trainer.logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=120)
            trainer.logger.experiment.add_figure(f"{split}/{name}", figure, trainer.global_step)

    def _draw_errors(self, trainer, pl_module, split: str, errors: Tensor, probabilities: Tensor) -> Figure:
        data, names = trainer.datamodule, pl_module.class_names
        images, labels = data.split(split)
        shown = [
            [
                (
                    images[i],
                    f"{names[labels[i]]}\ntaken for {names[probabilities[i].argmax()]}\n({probabilities[i].max():.2f})",
                )
            ]
            for i in errors
        ]
        try:
            bank, bank_labels = data.split("train")
        except InputError as error:  # a test needs no training file
            rank_zero_warn(f"errors.png has no nearest training images: {error}")
        else:
            index = torch.arange(min(self.bank, len(bank_labels)))
            with trainer.precision_plugin.forward_context():
                queries = _features(pl_module, data.evaluation_loader(split, errors))
                similarity = queries @ _features(pl_module, data.evaluation_loader("train", index)).T
            nearest = similarity.topk(min(self.neighbours, len(index))).indices.tolist()
            for row, columns in zip(shown, nearest):
                row += [(bank[i], names[bank_labels[i]]) for i in columns]
        return draw_gallery(shown)


@torch.no_grad()
def _features(pl_module: LightningModule, loader) -> Tensor:
    """Unit vectors (N, D): the encoder's features, or pixels around their mean."""
    if hasattr(pl_module, "encoder"):
        return F.normalize(pl_module.encoder.embed_all(loader, shifted=False).cpu(), dim=1)
    pixels = torch.cat([images.flatten(1).cpu() for images, *_ in loader])
    return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)


def reliability_diagram(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, mean confidence and accuracy in each of `bins` equally wide bins of confidence: (bins,) each, float64."""
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    count = place.bincount(minlength=bins).double()
    sums = (place.bincount(x, minlength=bins) for x in (confidence, (predicted == labels).double()))
    return count, *(total / count.clamp_min(1) for total in sums)


def expected_calibration_error(count: Tensor, confidence: Tensor, accuracy: Tensor) -> float:
    """Mean over images of |accuracy − confidence| of their bin (C. Guo et al., "On Calibration of Modern Neural
    Networks", 2017, equation 3)."""
    return float((count * (accuracy - confidence).abs()).sum() / count.sum())


def draw_confusion(predicted: Tensor, labels: Tensor, names: list[str]) -> Figure:
    classes = len(names)
    matrix = (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    figure = Figure(figsize=(3 + 0.75 * classes, 2 + 0.5 * classes), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row in range(classes if classes <= 20 else 0):
        for column in range(classes):
            colour = "black" if shares[row, column] > 0.5 else "white"
            left.text(column, row, int(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
    left.set_xticks(range(classes), names, rotation=45, ha="right")
    left.set_yticks(range(classes), names)
    left.set(xlabel="predicted", ylabel="true", title=f"confusion matrix, {len(labels)} images")
    bars = right.barh(range(classes), shares.diagonal().numpy(), color="C0")
    right.bar_label(bars, fmt="%.3f", padding=2, fontsize=7)
    right.set(xlim=(0, 1.2), ylim=(classes - 0.5, -0.5), xlabel="accuracy of the class", yticks=[])
    return figure


def draw_reliability(count: Tensor, confidence: Tensor, accuracy: Tensor, ece: float) -> Figure:
    figure, bins = Figure(figsize=(5, 5), layout="constrained"), len(count)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges, used = (torch.arange(bins) / bins).numpy(), (count > 0).numpy()
    count, confidence, accuracy = count.numpy(), confidence.numpy(), accuracy.numpy()
    upper.bar(
        edges[used], accuracy[used], width=1 / bins, align="edge", color="C0", edgecolor="white", label="accuracy"
    )
    upper.plot([0, 1], [0, 1], "--", color="0.4", label="as sure as right")
    upper.plot(confidence[used], accuracy[used], "o", color="C1", markersize=4, label="mean confidence")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"reliability, expected calibration error {ece:.4f}")
    upper.legend()
    lower.bar(edges, count, width=1 / bins, align="edge", color="0.6", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images")
    return figure


def draw_gallery(rows: list[list[tuple[Tensor, str]]]) -> Figure:
    """One image (32, 32, 3) uint8 and its caption for each place; each row's first is the error, then its neighbours."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.5 * columns + 0.5, 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for places, row in zip(grid, rows):
        for axes, (image, caption) in zip(places, row):
            axes.imshow(image.numpy())
            axes.set_title(caption, fontsize=7)
            axes.set(xticks=[], yticks=[])
    if columns > 1:
        figure.suptitle("most confident errors, each with the nearest training images", fontsize=9)
    return figure
