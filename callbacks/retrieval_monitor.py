"""Nearest neighbours during the fit of an encoder, from features that were computed anyway."""

import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from errors import InputError
from lightning_modules.distributed import gather_objects, world
from lightning_modules.retrieval import retrieval_metrics, retrieval_statistics


class RetrievalMonitor(Callback):
    """Logs `val_sample/knn_accuracy` and the other metrics of `retrieval_statistics` after every validation.

    The queries are a sample of the validation images; the bank are the training images of the epoch's last steps, with
    the features they had then: augmented, under the weights and batch statistics of their step. That costs no pass through
    the network, and is an estimate; `validate` and `test` compute the metrics in full. The queries' two principal
    components go to TensorBoard as the picture `val_sample/pca`, one after every validation.

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

    def state_dict(self) -> dict:
        return {"bank": gather_objects([(x.cpu(), labels.cpu()) for x, labels in self._training])}

    def load_state_dict(self, state: dict) -> None:
        banks = state["bank"]
        rank, processes = world()
        self._training = banks[rank] if len(banks) == processes else []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = []

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
        bank, bank_labels = (torch.cat([part.to(pl_module.device) for part in x]) for x in zip(*self._training))
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._training = []  # out of the checkpoints of epochs' ends
        # Evenly spread over the whole split, of which each process has a block.
        block, images = trainer.val_dataloaders.block, trainer.val_dataloaders.num_samples
        chosen = torch.arange(min(self.queries, images)) * images // min(self.queries, images)
        chosen = (
            chosen[(chosen >= block.start) & (chosen < block.start + len(queries))].to(queries.device) - block.start
        )
        queries, labels = queries[chosen].float(), labels[chosen]
        if trainer.world_size > 1:
            bank, bank_labels = (pl_module.all_gather(x).flatten(0, 1) for x in (bank, bank_labels))
        options = pl_module.num_classes, pl_module.knn_k, pl_module.knn_temperature
        found = retrieval_statistics(queries, labels, bank.float(), bank_labels, *options)
        sums = torch.cat([found.sum(0), found.new_tensor([len(found)])])
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        metrics = retrieval_metrics(sums[:-1] / sums[-1])
        pl_module.log("knn", metrics["knn_accuracy"], prog_bar=True, logger=False, sync_dist=True)
        pl_module.log_dict({f"val_sample/{name}": value for name, value in metrics.items()}, sync_dist=True)
        if trainer.logger and trainer.is_global_zero and queries.isfinite().all():
            figure = draw_pca(queries.cpu().double(), labels.cpu(), pl_module.class_names)
            trainer.logger.experiment.add_figure("val_sample/pca", figure, trainer.global_step)


def draw_pca(features: Tensor, labels: Tensor, names: list[str]) -> Figure:
    """The two directions of largest variance of `features` (N, D) float64, coloured by `labels` (N,)."""
    centred = features - features.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    points = (centred @ directions[:, -2:].flip(1)).numpy()
    shares = (variances.flip(0)[:2] / variances.sum().clamp_min(1e-300)).tolist()
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for c, name in enumerate(names):
        axes.plot(*points[(labels == c).numpy()].T, ".", markersize=3, color=f"C{c}", label=name)
    axes.set(title=f"{len(points)} validation images' features", xticks=[], yticks=[])
    axes.set(xlabel=f"{shares[0]:.0%} of the variance", ylabel=f"{shares[1]:.0%} of the variance")
    axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
