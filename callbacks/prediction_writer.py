"""`predictions.csv`: the class that `predict` gives every test image."""

import csv
import io

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.figures import tensorboards
from errors import InputError
from files import write
from lightning_modules.distributed import gather_objects
from run_folder import folder_of


class PredictionWriter(Callback):
    """Writes index, label, class name and probability of the most probable class of every image, in file order; and the
    image's file, where the images come from a folder.

    Args:
        labels_only: write the report's file instead: one integer a line, no header.
        features: also write `features.npz`, the encoder's features (N, D) float32 as `features`, in the same order, and
            the images' numbers (N,) as `index`.
    """

    def __init__(self, labels_only: bool = False, features: bool = False) -> None:
        self.labels_only, self.features = labels_only, features
        self._blocks: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        if self.features and not hasattr(pl_module, "encoder"):
            stage = type(pl_module).__name__
            raise InputError(f"prediction_writer.features: {stage} has no encoder; leave the option out")
        if self.labels_only and trainer.world_size > 1 and trainer.limit_predict_batches != 1.0:
            raise InputError("prediction_writer.labels_only: lines without numbers need all batches, or one process")

    def on_predict_batch_end(self, trainer, pl_module, outputs: Tensor, batch, batch_idx, dataloader_idx=0) -> None:
        features = None
        if self.features:
            with trainer.precision_plugin.forward_context():
                features = pl_module.encoder.embed(batch[0]).cpu()
        index = trainer.predict_dataloaders.numbers(batch_idx, len(outputs))
        self._blocks.append((index, outputs.cpu(), features))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each process has a contiguous block of the images, so their order is the order of the ranks. `index` has gaps
        # where `limit_predict_batches` ends the blocks early.
        blocks = [block for rank in gather_objects(self._blocks) for block in rank]
        self._blocks = []
        if (folder := folder_of(trainer)) is None:
            return
        index, outputs, features = zip(*blocks)
        index = torch.cat(index).tolist()
        probabilities, labels = torch.cat(outputs).max(1)
        if self.features:
            arrays = {"features": torch.cat(features).numpy(), "index": np.array(index)}
            write(folder / "features.npz", lambda file: np.savez(file, **arrays))
        names, files = pl_module.class_names, trainer.datamodule.test_files
        columns = {
            "index": index,
            "label": labels.tolist(),
            "class_name": [names[label] for label in labels.tolist()],
            "probability": [f"{p:.6f}" for p in probabilities.tolist()],
            **({"file": [files[i] for i in index]} if files else {}),
        }
        text = io.StringIO()
        rows = zip(columns["label"]) if self.labels_only else [columns, *zip(*columns.values())]
        csv.writer(text, lineterminator="\n").writerows(rows)
        write(folder / "predictions.csv", text.getvalue())
        cells = (" ".join(name.split()).replace("|", r"\|") for name in columns["class_name"])
        first = zip(columns["index"][:100], cells, columns["probability"])
        table = "| image | class | probability |\n|---|---|---|\n" + "\n".join(
            f"| {i} | {c} | {p} |" for i, c, p in first
        )
        for logger in tensorboards(trainer):
            logger.experiment.add_text("predictions (first 100)", table)
            logger.experiment.add_histogram("predictions/label", labels)
            logger.experiment.add_histogram("predictions/probability", probabilities)
