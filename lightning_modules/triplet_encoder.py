"""The contrastive encoder: trained so that images of a class lie closer together than images of two classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from errors import InputError
from lightning_modules.encoders import Encoder
from lightning_modules.knn import knn_classify
from lightning_modules.stage import Stage


class TripletEncoder(Stage):
    """An encoder under a loss over the triplets of a batch, all processes' images together.

    `accuracy` is that of the nearest neighbour (cosine) within the batch. `validate` and `test` add `knn_accuracy`:
    k nearest neighbours among all training images, on the features before the projection head.

    Args:
        encoder: the network whose features probes and kNN read.
        loss: module called as loss(z, labels, generator), such as MultiNegativeLoss or RandomTripletMarginLoss.
        z_dim: width of the projection head, a linear layer used for the loss only; null for none.
        mirror: average features over each image and its mirror image; null: where the training data is flipped.
        knn_k: neighbours that vote.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: nn.Module,
        z_dim: int | None = 128,
        mirror: bool | None = None,
        knn_k: int = 20,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if z_dim is not None and z_dim < 1:
            raise InputError(f"model.z_dim {z_dim}: must be at least 1, or null for no projection head")
        if knn_k < 1:
            raise InputError(f"model.knn_k {knn_k}: must be at least 1")
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.head = nn.Identity() if z_dim is None else nn.Linear(encoder.feature_dim, z_dim, bias=False)
        self.triplet_loss, self.mirror, self.knn_k = loss, mirror, knn_k
        self.knn_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self._queries: list[tuple[Tensor, Tensor]] = []

    @property
    def identity(self) -> dict:
        return {**super().identity, "encoder": self.encoder.spec}

    def setup(self, stage: str) -> None:
        if stage == "predict":
            raise InputError("a triplet encoder has no classes to predict: fit a probe on it and predict with the probe")
        super().setup(stage)

    def initialize(self, images: Tensor) -> None:
        self.encoder.initialize(images)
        self.encoder.mirror.fill_(self.trainer.datamodule.flip if self.mirror is None else self.mirror)
        self._seed = self.trainer.strategy.broadcast(torch.initial_seed()) % 2**31

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, z_dim)."""
        return self.head(self.encoder(images))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if self.training and self.trainer.world_size > 1:
            # With gradient: every process computes the loss of the whole global batch.
            output = self.all_gather(output, sync_grads=True).flatten(0, 1)
            labels = self.all_gather(labels).flatten()
        # Random triplets depend on (seed, step) alone; in evaluation they are the same each time.
        step = self._seed * 1_000_003 + self.global_step + 1 if self.training else 0
        with torch.autocast(output.device.type, enabled=False):
            return self.triplet_loss(output.float(), labels, torch.Generator().manual_seed(step))

    def predicted_classes(self, output: Tensor, labels: Tensor) -> Tensor:
        z = F.normalize(output.float(), dim=1)
        return labels[(z @ z.T).fill_diagonal_(-2).argmax(1)]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._collect(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._collect(batch)

    def _collect(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.trainer.state.fn != "fit":
            self._queries.append((self.encoder.embed(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self._log_knn("val")

    def on_test_epoch_end(self) -> None:
        self._log_knn("test")

    def _log_knn(self, split: str) -> None:
        if not self._queries:
            return
        queries, labels = (torch.cat(x) for x in zip(*self._queries))
        self._queries.clear()
        with self.trainer.precision_plugin.forward_context():
            bank = self.encoder.embed_all(self.trainer.datamodule.evaluation_loader("train"))
        bank_labels = self.trainer.datamodule.split("train").labels.to(self.device)
        self.knn_accuracy(knn_classify(queries, bank, bank_labels, self.num_classes, self.knn_k), labels)
        self.log(f"{split}/knn_accuracy", self.knn_accuracy)
