"""Where a classifier errs and how sure it is of itself: the figures of a `validate` or `test`."""

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from callbacks.figures import draw_confusion, draw_gallery, draw_reliability, plain, save
from errors import InputError, require
from lightning_modules import TripletEncoder
from lightning_modules.distributed import gather_objects


class Inspection(Callback):
    """Draws `confusion_matrix.png`, `reliability.png` and `errors.png` when a classifier is validated or tested.

    Logs the expected calibration error as `<split>/ece`. `errors.png` shows the errors of the highest confidence, each
    with the nearest training images: by cosine in the encoder's features, or in pixels for a regression on pixels. All
    go to TensorBoard too. Does nothing for a triplet encoder, which has no classes to err in.

    Args:
        bins: of confidence, equally wide.
        errors: how many are shown.
        neighbours: nearest training images beside each error.
        bank: training images they are sought among, the first of the split.
        pictures: false: no figures, only the calibration error.
    """

    def __init__(
        self, bins: int = 15, errors: int = 8, neighbours: int = 4, bank: int = 10_000, pictures: bool = True
    ) -> None:
        require(bins >= 1, "inspection.bins", bins, "at least 1")
        require(1 <= errors <= 100, "inspection.errors", errors, "1..100")
        require(1 <= neighbours <= 20, "inspection.neighbours", neighbours, "1..20")
        require(bank >= 1, "inspection.bank", bank, "at least 1")
        self.bins, self.errors, self.neighbours, self.bank = bins, errors, neighbours, bank
        self.pictures = pictures
        self._seen: list[tuple[Tensor, ...]] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.state.fn != "fit" and not isinstance(pl_module, TripletEncoder):
            # Not all probabilities, which may be a thousand for each image.
            confidence, predicted = pl_module.probabilities(outputs["output"]).max(1)
            loader = trainer.test_dataloaders if trainer.state.fn == "test" else trainer.val_dataloaders
            index = loader.numbers(batch_idx, len(predicted))
            self._seen.append((index, confidence.cpu(), predicted.cpu(), batch[1].cpu()))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" or isinstance(pl_module, TripletEncoder):
            return
        split = "val" if trainer.state.fn == "validate" else "test"
        blocks = [block for rank in gather_objects(self._seen) for block in rank]
        self._seen = []
        index, confidence, predicted, labels = (torch.cat(parts) for parts in zip(*blocks))
        error = calibration_error(confidence, predicted == labels, self.bins)
        pl_module.log(f"{split}/ece", error, sync_dist=True)  # the same on every process
        if not self.pictures or not trainer.loggers or not trainer.is_global_zero:
            return
        names = pl_module.class_names
        drawn = {
            "confusion_matrix": draw_confusion(predicted, labels, names),
            "reliability": draw_reliability(confidence, predicted == labels, self.bins, error),
        }
        wrong = (predicted != labels).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][: self.errors]
        if len(wrong):
            shown = [(plain(names[labels[i]]), plain(names[predicted[i]]), float(confidence[i])) for i in wrong]
            captions = [f"{true}\ntaken for {other}\n({sure:.2f})" for true, other, sure in shown]
            gallery = self._gallery(trainer, pl_module, split, index[wrong], captions)
            drawn["errors"] = draw_gallery(gallery, "most confident errors, each with the nearest training images")
        for name, figure in drawn.items():
            save(trainer, figure, f"{name}.png", f"{split}/{name}")

    on_test_epoch_end = on_validation_epoch_end

    def _gallery(self, trainer, pl_module, split: str, wrong: Tensor, captions: list[str]) -> list[list]:
        """A row for each image number in `wrong` (M,): the image and its caption, its neighbours and their classes."""
        data, names = trainer.datamodule, pl_module.class_names
        rows = [[(image, caption)] for image, caption in zip(data.split(split).images[wrong], captions)]
        try:
            images, labels = data.split("train")
        except InputError as error:  # a test needs no training file
            rank_zero_warn(f"errors.png has no nearest training images: {error}")
            return rows
        index = torch.arange(min(self.bank, len(labels)))
        with trainer.precision_plugin.forward_context():
            queries = unit_features(pl_module, data.evaluation_loader(split, wrong))
            similarity = queries @ unit_features(pl_module, data.evaluation_loader("train", index)).T
        nearest = similarity.topk(min(self.neighbours, len(index))).indices.tolist()
        return [row + [(images[i], plain(names[labels[i]])) for i in columns] for row, columns in zip(rows, nearest)]


@torch.no_grad()
def unit_features(pl_module: LightningModule, loader) -> Tensor:
    """Unit vectors (N, D): the encoder's features, or pixels around their mean."""
    if hasattr(pl_module, "encoder"):
        return F.normalize(pl_module.encoder.embed_all(loader, shifted=False).cpu(), dim=1)
    pixels = torch.cat([images.flatten(1).cpu() for images, *_ in loader])
    return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Expected calibration error of the confidences (N,) of predictions, `correct` (N,) or not: the mean over images of
    |accuracy − confidence| of their bin (C. Guo et al., "On Calibration of Modern Neural Networks", 2017, eq. 3).
    """
    below_one = confidence.clamp_max(1 - 1e-7)  # torchmetrics puts a confidence of 1 into a bin of its own
    return float(binary_calibration_error(below_one, correct.long(), bins))
