"""The contrastive encoder: trained so that images of a class, or views of an image, lie closer together than others."""

from typing import Any, Literal

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
from lightning_modules.stage import Batch, of_views


class TripletEncoder(EncoderStage):
    """An encoder under a loss over the triplets of a batch, all processes' images together.

    An anchor's positives are the images of its class, or (`positives: view`) the other views of its image, whose labels
    are then the numbers of the images in the batch: no class reaches a weight. The data module makes the views.
    `accuracy` is that of the nearest neighbour (cosine) within the batch; an image alone in its batch counts as wrong.
    For views it is `view_accuracy`, in a validation or test of two views of each image that never change.
    `validate` and `test` add what the nearest neighbours among all training images say, on the features before the
    projection head: `knn_accuracy`, `precision_at_1`, `r_precision`, `map_at_r`, `alignment`, `uniformity` (see
    `retrieval_statistics`). `predict` lets these neighbours vote.

    Args:
        encoder: the network whose features probes and kNN read.
        loss: a BatchLoss, called as loss(z, labels, generator), such as MultiNegativeLoss or TripletMarginLoss.
        z_dim: width of the projection head, used for the loss only; null for none.
        z_hidden: units of a hidden layer, with BatchNorm and ReLU, in the projection head; null: it is one linear
            layer.
        positives: `class`, or `view` to learn without labels.
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
        z_hidden: int | None = None,
        positives: Literal["class", "view"] = "class",
        global_mining: bool = True,
        knn_k: int = 20,
        knn_temperature: float = 0.07,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        require(positives in ("class", "view"), "model.positives", positives, "class or view")
        self.positives = positives
        unlabelled = num_classes == 0 and positives == "view"  # how many classes there are does not matter then
        super().__init__(encoder, num_classes=2 if unlabelled else num_classes, **kwargs)
        require(z_dim is None or z_dim >= 1, "model.z_dim", z_dim, "at least 1, or null for no projection head")
        hidden = z_hidden is None or z_hidden >= 1 and z_dim is not None
        require(hidden, "model.z_hidden", z_hidden, "at least 1 beside a model.z_dim, or null")
        require(knn_k >= 1, "model.knn_k", knn_k, "at least 1")
        require(knn_temperature > 0, "model.knn_temperature", knn_temperature, "above 0")
        self.head = projection_head(encoder.contrast_dim, z_hidden, z_dim)
        self.loss_function, self.global_mining = loss, global_mining
        self.knn_k, self.knn_temperature = knn_k, knn_temperature
        self._queries: list[tuple[Tensor, Tensor]] = []
        _try(loss, encoder.contrast_dim if z_dim is None else z_dim)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if stage in ("test", "predict") and data is not None:
            data.split("train")  # the neighbours: read now, so that the checkpoint is checked for them
        if stage != "predict" and data is not None and self.positives == "view":
            wanted = "at least 2, or some data.small_views, with model.positives view"
            require(data.number_of_views > 1, "data.views", data.number_of_views, wanted)
            wanted = "views that differ: give data.crop_scale [0.2,1], data.color_jitter 0.5 or data.greyscale 0.2"
            require(data.views[0].varies, "model.positives", "view", wanted)
        super().setup(stage)
        if stage == "fit":
            require(data.batch_size >= 3, "data.batch_size", data.batch_size, "at least 3, since a triplet needs three")
            size = data.number_of_views * data.batch_size // (1 if self.global_mining else self.trainer.world_size)
            if (blocks := len(anchor_blocks(size))) > 1 and self.trainer.is_global_zero:
                print(f"model.loss: pairs of {size:,} embeddings are worked on in {blocks} blocks, to fit into memory")

    @property
    def needs_labels(self) -> str:
        if self.positives == "class":
            return super().needs_labels
        votes = "the nearest labelled training images vote in test and predict: validate, or give labelled data"
        return votes if self.trainer.state.fn in ("test", "predict") else ""

    @property
    def accuracy_name(self) -> str:
        return "accuracy" if self.positives == "class" else "view_accuracy"

    @property
    def training_identity(self) -> dict[str, Any]:
        return {**super().training_identity, "positives": self.positives}

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, z_dim)."""
        return self.head(self.read(self.encoder(images)))

    def read(self, features: Tensor) -> Tensor:
        """Those of the features (N, D) that the projection head and nearest neighbours read."""
        return features[:, : self.encoder.contrast_dim]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        views, labels = batch
        features = self.read(of_views(self.encoder, views, len(labels)))
        targets = self.targets(labels, len(features) // len(labels))
        embeddings, everyones, first = self.gather(self.head(features), targets)
        loss = self.contrastive_loss(embeddings, everyones, self.step_seed)
        nearest = nearest_labels(embeddings.detach(), everyones, first, len(targets))
        self.record("train", batch_idx, loss, nearest == targets)
        # Of each image, the features of its first view.
        one = features.detach()[:: len(features) // len(labels)]
        seen = {"features": one, "embeddings": embeddings.detach(), "labels": everyones}
        return {"loss": loss + self.l2_penalty(), "logged_loss": loss.detach(), **seen}

    def targets(self, labels: Tensor, views: int) -> Tensor:
        """Labels (B · V,) for the loss, of B images with so many views each: classes, or numbers of images."""
        if self.positives == "view":
            labels = torch.arange(len(labels), device=labels.device) + self.global_rank * len(labels)
        return labels.repeat_interleave(views)

    def gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
        """The embeddings and labels of the global batch, with gradient, and the place of this process's first one."""
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
        images, labels, *views = batch
        features = self.read(self.encoder(images))
        compared, targets = self.read(self.encoder(views[0])) if self.positives == "view" else features, labels
        if self.positives == "view":
            targets = self.targets(labels, 2)
        embeddings = self.head(compared)
        if len(labels):  # there are none where a process has no images of its own
            nearest = nearest_labels(embeddings, targets, 0, len(targets))
            loss = self.contrastive_loss(embeddings, targets, 0)  # random triplets are the same each time
            self.record(split, batch_idx, loss, nearest == targets)
        else:
            self.record(split, batch_idx, embeddings.sum(), targets)
        if self.trainer.state.fn != "fit" and self.trainer.datamodule.labelled:
            self._queries.append((self.read(self.encoder.embed(images)), labels))
        return {"features": features, "views": compared}

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
        return self.read(features), data.split("train").labels.to(self.device)

    def on_predict_start(self) -> None:
        self._neighbours = self._bank()

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The classes' shares (B, num_classes) of the votes of the nearest training images."""
        features = self.read(self.encoder.embed(batch[0]))
        return knn_probabilities(features, *self._neighbours, self.num_classes, self.knn_k, self.knn_temperature)


def projection_head(inputs: int, hidden: int | None, outputs: int | None) -> nn.Module:
    """Features (B, inputs) → embeddings (B, outputs); the features themselves where that is None."""
    if outputs is None:
        return nn.Identity()
    if hidden is None:
        return nn.Linear(inputs, outputs, bias=False)
    # BatchNorm2d, which several processes share.
    norm = nn.Unflatten(1, (hidden, 1, 1)), nn.BatchNorm2d(hidden), nn.Flatten()
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False), *norm, nn.ReLU(), nn.Linear(hidden, outputs, bias=False)
    )


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
