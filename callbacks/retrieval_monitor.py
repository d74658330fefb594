"""Nearest neighbours during the fit of an encoder, from features that were computed anyway."""

import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.figures import DRAW_EVERY, draw_pca, save
from errors import require
from lightning_modules import TripletEncoder
from lightning_modules.distributed import gather_objects, world
from lightning_modules.means import Mean
from lightning_modules.mining import view_statistics
from lightning_modules.retrieval import STATISTICS, retrieval_metrics, retrieval_statistics


class RetrievalMonitor(Callback):
    """Logs `val_sample/knn_accuracy` and the other metrics of `retrieval_statistics` after every validation of a fit.

    The queries are a sample of the validation images. The bank are the training images of the epoch's last steps,
    with the features they had then: augmented, under the weights and batch statistics of their step. That costs no
    pass through the network and is an estimate; `validate` and `test` compute the metrics in full. A figure of the
    queries' two principal components goes into `pca.png` and to TensorBoard as `val_sample/pca`, every two minutes and
    at the end of the fit. Where an image's positives are its views, those of the queries give `view_statistics` too,
    and the labels count in what is logged alone. Does nothing for other stages than TripletEncoder.

    Args:
        queries: validation images, evenly spread over the split.
        bank: training images.
        pictures: false: no figure.
    """

    def __init__(self, queries: int = 1000, bank: int = 10_000, pictures: bool = True) -> None:
        require(queries >= 1, "retrieval_monitor.queries", queries, "at least 1")
        require(bank >= 1, "retrieval_monitor.bank", bank, "at least 1")
        self.queries, self.bank, self.pictures = queries, bank, pictures
        self._training: list[tuple[Tensor, Tensor]] = []
        self._validation: list[tuple[Tensor, Tensor, Tensor]] = []
        self._undrawn: tuple[Tensor, Tensor] | None = None  # the last queries and their labels
        self._drawn_at = 0.0

    def state_dict(self) -> dict:
        return {"bank": gather_objects([(x.cpu(), labels.cpu()) for x, labels in self._training])}

    def load_state_dict(self, state: dict) -> None:
        rank, processes = world()
        self._training = state["bank"][rank] if len(state["bank"]) == processes else []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if isinstance(pl_module, TripletEncoder):
            self._training.append((outputs["features"], batch[1]))
            del self._training[: -max(1, self.bank // (len(batch[1]) * trainer.world_size))]

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.state.fn == "fit" and isinstance(pl_module, TripletEncoder):
            views = outputs["views"].unflatten(0, (len(batch[1]), -1)) if len(batch[1]) else outputs["views"][:, None]
            self._validation.append((outputs["features"], batch[1], views))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation, self._validation = self._validation, []
        if trainer.sanity_checking or not validation or not self._training:
            return
        queries, labels, views = (torch.cat(x) for x in zip(*validation))
        bank, bank_labels = (torch.cat([part.to(pl_module.device) for part in x]) for x in zip(*self._training))
        if trainer.is_last_batch:
            self._training = []  # out of the checkpoints of epochs' ends
        # Evenly spread over the whole split, of which each process has a block.
        block, images = trainer.val_dataloaders.block, trainer.val_dataloaders.num_samples
        chosen = torch.arange(min(self.queries, images), device=labels.device) * images // min(self.queries, images)
        chosen = chosen[(chosen >= block.start) & (chosen < block.start + len(queries))] - block.start
        queries, labels, views = queries[chosen].float(), labels[chosen], views[chosen]
        metrics = {}
        if trainer.world_size > 1:
            bank, bank_labels = (pl_module.all_gather(x).flatten(0, 1) for x in (bank, bank_labels))
        if trainer.datamodule.labelled:
            options = pl_module.num_classes, pl_module.knn_k, pl_module.knn_temperature
            found = retrieval_statistics(queries, labels, bank.float(), bank_labels, *options)
            mean = Mean(len(STATISTICS)).to(pl_module.device)
            mean.update(found.sum(0), len(found))
            metrics = retrieval_metrics(mean.compute())
            pl_module.log("val_sample/knn_accuracy", metrics.pop("knn_accuracy"), prog_bar=True, sync_dist=True)
        if pl_module.positives == "view":
            everyones = [x for x in gather_objects(views.flatten(0, 1).cpu()) if len(x)]
            metrics |= view_statistics(torch.cat(everyones))
        pl_module.log_dict({f"val_sample/{name}": value for name, value in metrics.items()}, sync_dist=True)
        if self.pictures and trainer.loggers and trainer.is_global_zero:
            self._undrawn = queries, labels
            if time.monotonic() - self._drawn_at > DRAW_EVERY:
                self._draw(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._undrawn is not None:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (queries, labels), self._undrawn = (x.cpu() for x in self._undrawn), None
        if queries.isfinite().all():
            figure = draw_pca(queries.double(), labels, pl_module.class_names)
            save(trainer, figure, "pca.png", "val_sample/pca")
        self._drawn_at = time.monotonic()
