"""The contrastive encoder: trained so that images of a class lie closer together than images of two classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, first_line, require
from lightning_modules.encoder_stage import EncoderStage
from lightning_modules.encoders.contract import Encoder
from lightning_modules.losses import BatchLoss
from lightning_modules.losses.triplets import MATRIX, anchor_blocks
from lightning_modules.means import Mean
from lightning_modules.retrieval import STATISTICS, knn_probabilities, retrieval_metrics, retrieval_statistics
from lightning_modules.stage import Batch


class TripletEncoder(EncoderStage):
    """An encoder under a loss over the triplets of a batch, all processes' images together.

    `accuracy` is that of the nearest neighbour (cosine) within the batch; an image alone in its batch counts as wrong.
    `validate` and `test` add what the nearest neighbours among all training images say, on the features before the
    projection head: `knn_accuracy`, `precision_at_1`, `r_precision`, `map_at_r`, `alignment`, `uniformity` (see
    `retrieval_statistics`). `predict` lets these neighbours vote.

    Args:
        encoder: the network whose features probes and kNN read.
        loss: a BatchLoss, called as loss(z, labels, generator), such as MultiNegativeLoss or TripletMarginLoss.
        z_dim: width of the projection head, a linear layer used for the loss only; null for none.
        global_mining: on several processes, gather the embeddings of the whole global batch, so the loss is the one
            that a single process would have; false: each process on its own slice alone, with less communication, fewer
            triplets and another loss.
        knn_k: neighbours that vote.
        knn_temperature: τ of their weights exp(s / τ).
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: BatchLoss,
        z_dim: int | None = 128,
        global_mining: bool = True,
        knn_k: int = 20,
        knn_temperature: float = 0.07,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(encoder, num_classes=num_classes, **kwargs)
        require(z_dim is None or z_dim >= 1, "model.z_dim", z_dim, "at least 1, or null for no projection head")
        require(knn_k >= 1, "model.knn_k", knn_k, "at least 1")
        require(knn_temperature > 0, "model.knn_temperature", knn_temperature, "above 0")
        self.head = nn.Identity() if z_dim is None else nn.Linear(encoder.feature_dim, z_dim, bias=False)
        self.loss_function, self.global_mining = loss, global_mining
        self.knn_k, self.knn_temperature = knn_k, knn_temperature
        self._queries: list[tuple[Tensor, Tensor]] = []
        _try(loss, encoder.feature_dim if z_dim is None else z_dim)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if stage in ("test", "predict") and data is not None:
            data.split("train")  # the neighbours: read now, so that the checkpoint is checked for them
        super().setup(stage)
        if stage == "fit":
            require(data.batch_size >= 3, "data.batch_size", data.batch_size, "at least 3, since a triplet needs three")
            size = data.batch_size // (1 if self.global_mining else self.trainer.world_size)
            if (blocks := len(anchor_blocks(size))) > 1 and self.trainer.is_global_zero:
                print(f"model.loss: pairs of {size:,} images are worked on in {blocks} blocks, to fit into memory")

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, z_dim)."""
        return self.head(self.encoder(images))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        features = self.encoder(images)
        embeddings, everyones, first = self.gather(self.head(features), labels)
        loss = self.contrastive_loss(embeddings, everyones, self.step_seed)
        nearest = nearest_labels(embeddings.detach(), everyones, first, len(labels))
        self.record("train", batch_idx, loss, nearest == labels)
        seen = {"features": features.detach(), "embeddings": embeddings.detach(), "labels": everyones}
        return {"loss": loss + self.l2_penalty(), "logged_loss": loss.detach(), **seen}

    def gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
        """The embeddings and labels of the global batch, with gradient, and the place of this process's first image."""
        if self.trainer.world_size == 1 or not self.global_mining:
            return embeddings, labels, 0
        everyones = self.all_gather(embeddings, sync_grads=True).flatten(0, 1), self.all_gather(labels).flatten()
        return *everyones, self.global_rank * len(labels)

    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The loss (no dimensions) of embeddings (B, z_dim), in float32 or better; `seed` is for one that draws."""
        if not self.global_mining:
            seed += self.global_rank
        with torch.autocast(embeddings.device.type, enabled=False):
            z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            return self.loss_function(z, labels, torch.Generator().manual_seed(seed % 2**63))

    def evaluation_step(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        features = self.encoder(images)
        embeddings = self.head(features)
        if len(labels):  # there are none where a process has no images of its own
            nearest = nearest_labels(embeddings, labels, 0, len(labels))
            loss = self.contrastive_loss(embeddings, labels, 0)  # random triplets are the same each time
            self.record(split, batch_idx, loss, nearest == labels)
        else:
            self.record(split, batch_idx, embeddings.sum(), labels)
        if self.trainer.state.fn != "fit":
            self._queries.append((self.encoder.embed(images), labels))
        return {"features": features}

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def _log_retrieval(self, split: str) -> None:
        if not self._queries:
            return
        queries, labels = (torch.cat(x) for x in zip(*self._queries))
        self._queries.clear()
        found = retrieval_statistics(queries, labels, *self._bank(), self.num_classes, self.knn_k, self.knn_temperature)
        mean = Mean(len(STATISTICS)).to(self.device)  # every process asked for its own images
        mean.update(found.sum(0), len(found))
        metrics = retrieval_metrics(mean.compute())
        # The same on every process; said so that Lightning does not warn.
        self.log_dict({f"{split}/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def _bank(self) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all training images, among which neighbours are sought."""
        data = self.trainer.datamodule
        with torch.inference_mode(), self.trainer.precision_plugin.forward_context():
            features = self.encoder.embed_all(data.evaluation_loader("train"), shifted=False)
        return features, data.split("train").labels.to(self.device)

    def on_predict_start(self) -> None:
        self._neighbours = self._bank()

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The classes' shares (B, num_classes) of the votes of the nearest training images."""
        features = self.encoder.embed(batch[0])
        return knn_probabilities(features, *self._neighbours, self.num_classes, self.knn_k, self.knn_temperature)


@torch.no_grad()
def nearest_labels(embeddings: Tensor, labels: Tensor, first: int, count: int) -> Tensor:
    """Labels (count,) of the nearest other embedding (cosine) of `count` images of the batch from place `first` on.

    `embeddings` (B, D), `labels` (B,). −1, which is no label, where B is 1. Blocks of rows keep the similarities
    below `MATRIX` elements.
    """
    if len(labels) == 1:
        return torch.full_like(labels, -1)
    nearest = []
    with torch.autocast(embeddings.device.type, enabled=False):  # bfloat16 would take others for the nearest
        bank = F.normalize(embeddings.float(), dim=1)
        for rows in bank[first : first + count].split(max(1, MATRIX // len(bank))):
            similarity = rows @ bank.T
            similarity.diagonal(first).fill_(-2)
            first += len(rows)
            nearest.append(similarity.argmax(1))
    return labels[torch.cat(nearest)]


def _try(loss: BatchLoss, dim: int) -> None:
    """Raises InputError where `loss` cannot be called on embeddings of width `dim`: now, not after the data is read."""
    name, generator = type(loss).__name__, torch.Generator().manual_seed(0)
    z = torch.randn(6, dim, generator=generator)
    try:
        value = loss(z, torch.tensor([0, 0, 1, 1, 2, 2]), generator)
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(
            f"model.loss {name} does not take embeddings of width {dim}, labels and a generator ({first_line(error)});"
            " choose a loss of lightning_modules, and give MahalanobisDistance that width as dim"
        ) from error
    if not isinstance(value, Tensor) or value.ndim:
        raise InputError(f"model.loss {name} gives no single number; choose a loss of lightning_modules")
