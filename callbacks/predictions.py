"""`predictions.csv`: what `predict` says of every test image."""

import csv
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from errors import InputError
from lightning_modules.distributed import gather_objects


class PredictionWriter(Callback):
    """Writes index, label, class name and probability of the most probable class of every image, in file order.

    Args:
        labels_only: write the report's file instead: one integer a line, no header.
    """

    def __init__(self, labels_only: bool = False) -> None:
        self.labels_only = labels_only
        self._blocks: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and not trainer.logger:
            raise InputError("predict writes into a run folder: leave --trainer.logger on")

    def on_predict_batch_end(self, trainer, pl_module, outputs: Tensor, batch, batch_idx, dataloader_idx=0) -> None:
        self._blocks.append(outputs.cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each process has a contiguous block of the images, so their order is the order of the ranks.
        blocks = [block for rank in gather_objects(self._blocks) for block in rank]
        self._blocks = []
        if not trainer.is_global_zero:
            return
        probabilities, labels = torch.cat(blocks).max(1)
        path = Path(trainer.logger.log_dir) / "predictions.csv"
        names = pl_module.class_names
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self.labels_only:
                writer.writerows([label] for label in labels.tolist())
            else:
                writer.writerow(["index", "label", "class_name", "probability"])
                for i, (label, p) in enumerate(zip(labels.tolist(), probabilities.tolist())):
                    writer.writerow([i, label, names[label], f"{p:.6f}"])
        rows = [f"| {i} | {names[c]} | {p:.3f} |" for i, (c, p) in enumerate(zip(labels[:100].tolist(), probabilities.tolist()))]
        experiment = trainer.logger.experiment
        experiment.add_text("predictions (first 100)", "\n".join(["| image | class | probability |", "|---|---|---|", *rows]))
        experiment.add_histogram("predictions/label", labels)
        experiment.add_histogram("predictions/probability", probabilities)
