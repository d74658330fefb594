"""Nearest neighbours during the fit of an encoder, from features that were computed anyway."""

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from errors import InputError
from lightning_modules.retrieval import retrieval_metrics, retrieval_statistics


class RetrievalMonitor(Callback):
    """Logs `val_sample/knn_accuracy` and the other metrics of `retrieval_statistics` after every validation.

    The queries are a sample of the validation images; the bank are the training images of the last steps, with the
    features they had then: augmented, under the weights and batch statistics of their step. That costs no pass through
    the network, and is an estimate; `validate` and `test` compute the metrics in full.

    Args:
        queries: validation images, evenly spread over the split.
        bank: training images.
    """

    def __init__(self, queries: int = 1000, bank: int = 10_000) -> None:
        for name, value in (("queries", queries), ("bank", bank)):
            if value < 1:
                raise InputError(f"RetrievalMonitor {name} {value}: must be at least 1")
        self.queries, self.bank = queries, bank
        self._training: list[tuple[Tensor, Tensor]] = []
        self._validation: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "triplet_loss"):
            raise InputError(f"RetrievalMonitor watches triplet encoders; {type(pl_module).__name__} is none")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        self._training.append((pl_module.last_features, batch[1]))
        size = len(batch[1]) * trainer.world_size
        del self._training[: -max(1, self.bank // size)]

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.state.fn == "fit":
            self._validation.append((pl_module.last_features, batch[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation, self._validation = self._validation, []
        if trainer.sanity_checking or not validation or not self._training:
            return
        queries, labels = (torch.cat(x) for x in zip(*validation))
        bank, bank_labels = (torch.cat(x) for x in zip(*self._training))
        # Of every process's block of the validation images equally many.
        wanted = min(-(-self.queries // trainer.world_size), len(queries))
        index = torch.arange(wanted, device=queries.device) * len(queries) // wanted
        queries, labels = queries[index].float(), labels[index]
        if trainer.world_size > 1:
            bank, bank_labels = (pl_module.all_gather(x).flatten(0, 1) for x in (bank, bank_labels))
        options = pl_module.num_classes, pl_module.knn_k, pl_module.knn_temperature
        found = retrieval_statistics(queries, labels, bank.float(), bank_labels, *options)
        sums = torch.cat([found.sum(0), found.new_tensor([len(found)])])
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        metrics = retrieval_metrics(sums[:-1] / sums[-1])
        pl_module.log("knn", metrics["knn_accuracy"], prog_bar=True, logger=False, sync_dist=True)
        pl_module.log_dict({f"val_sample/{name}": value for name, value in metrics.items()}, sync_dist=True)
