"""`predictions.csv`: what `predict` says of every test image."""

import csv
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from errors import InputError
from lightning_modules.distributed import gather_objects


class PredictionWriter(Callback):
    """Writes index, label, class name and probability of the most probable class of every image, in file order; and its
    file, where the images come from a folder.

    Args:
        labels_only: write the report's file instead: one integer a line, no header.
        features: also write `features.npz`, the encoder's features (N, D) float32 as `features`, in the same order.
    """

    def __init__(self, labels_only: bool = False, features: bool = False) -> None:
        self.labels_only, self.features = labels_only, features
        self._blocks: list[Tensor] = []
        self._features: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and not trainer.logger:
            raise InputError("predict writes into a run folder: leave --trainer.logger on")
        if stage == "predict" and self.features and not hasattr(pl_module, "encoder"):
            raise InputError(
                f"PredictionWriter features: {type(pl_module).__name__} has no encoder; leave the option out"
            )

    def on_predict_batch_end(self, trainer, pl_module, outputs: Tensor, batch, batch_idx, dataloader_idx=0) -> None:
        self._blocks.append(outputs.cpu())
        if self.features:
            with trainer.precision_plugin.forward_context():
                self._features.append(pl_module.encoder.embed(batch[0]).cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each process has a contiguous block of the images, so their order is the order of the ranks.
        ranks = gather_objects((self._blocks, self._features))
        self._blocks, self._features = [], []
        if not trainer.is_global_zero:
            return
        probabilities, labels = torch.cat([block for blocks, _ in ranks for block in blocks]).max(1)
        path = Path(trainer.logger.log_dir) / "predictions.csv"
        if self.features:
            features = torch.cat([block for _, blocks in ranks for block in blocks])
            np.savez(path.with_name("features.npz"), features=features.numpy())
        names = pl_module.class_names
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self.labels_only:
                writer.writerows([label] for label in labels.tolist())
            else:
                files = trainer.datamodule.test_files
                writer.writerow(["index", "label", "class_name", "probability", *(["file"] if files else [])])
                for i, (label, p) in enumerate(zip(labels.tolist(), probabilities.tolist())):
                    writer.writerow([i, label, names[label], f"{p:.6f}", *(files[i : i + 1] if files else [])])
        rows = [
            f"| {i} | {names[c]} | {p:.3f} |"
            for i, (c, p) in enumerate(zip(labels[:100].tolist(), probabilities.tolist()))
        ]
        experiment = trainer.logger.experiment
        experiment.add_text(
            "predictions (first 100)", "\n".join(["| image | class | probability |", "|---|---|---|", *rows])
        )
        experiment.add_histogram("predictions/label", labels)
        experiment.add_histogram("predictions/probability", probabilities)
