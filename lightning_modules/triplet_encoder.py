"""The contrastive encoder: trained so that images of a class lie closer together than images of two classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, first_line
from lightning_modules.encoders import CompileMode, Encoder
from lightning_modules.losses import BatchLoss
from lightning_modules.losses.triplets import MATRIX, anchor_blocks
from lightning_modules.retrieval import knn_probabilities, retrieval_metrics, retrieval_statistics
from lightning_modules.stage import Stage


class TripletEncoder(Stage):
    """An encoder under a loss over the triplets of a batch, all processes' images together.

    `accuracy` is that of the nearest neighbour (cosine) within the batch. `validate` and `test` add what the nearest
    neighbours among all training images say, on the features before the projection head: `knn_accuracy`,
    `precision_at_1`, `r_precision`, `map_at_r`, `alignment`, `uniformity` (see `retrieval_statistics`). `predict` has
    these neighbours vote.

    While fitting, `last_embeddings` holds the global batch's embeddings and labels, `last_features` this process's
    features, without gradient: what the monitors among the callbacks read.

    Args:
        encoder: the network whose features probes and kNN read.
        loss: a BatchLoss, called as loss(z, labels, generator), such as MultiNegativeLoss or TripletMarginLoss.
        z_dim: width of the projection head, a linear layer used for the loss only; null for none.
        global_mining: on several processes, gather the embeddings of the whole global batch, so that the loss is the one
            that a single process would have; false: each process on its own slice alone, with less communication, fewer
            triplets and another loss.
        mirror: evaluate on features averaged over each image and its mirror image; null: where the training data is flipped.
        shift: average them also over the image moved by so many pixels along the diagonal, to both sides; null: 1 where the
            training data is translated, else 0.
        knn_k: neighbours that vote.
        knn_temperature: τ of their weights exp(s / τ).
        compile_mode: torch.compile's for the encoder's training passes; null: not compiled.
        channels_last: false: images and weights lie in memory channel by channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: BatchLoss,
        z_dim: int | None = 128,
        global_mining: bool = True,
        mirror: bool | None = None,
        shift: int | None = None,
        knn_k: int = 20,
        knn_temperature: float = 0.07,
        compile_mode: CompileMode | None = None,
        channels_last: bool = True,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if z_dim is not None and z_dim < 1:
            raise InputError(f"model.z_dim {z_dim}: must be at least 1, or null for no projection head")
        if knn_k < 1:
            raise InputError(f"model.knn_k {knn_k}: must be at least 1")
        if not knn_temperature > 0:
            raise InputError(f"model.knn_temperature {knn_temperature}: must be above 0")
        self.encoder = encoder.run_as(channels_last, compile_mode)
        self.head = nn.Identity() if z_dim is None else nn.Linear(encoder.feature_dim, z_dim, bias=False)
        self.triplet_loss, self.global_mining, self.mirror, self.shift = loss, global_mining, mirror, shift
        self.knn_k, self.knn_temperature = knn_k, knn_temperature
        self._queries: list[tuple[Tensor, Tensor]] = []
        _try(loss, encoder.feature_dim if z_dim is None else z_dim)

    @property
    def identity(self) -> dict:
        return {**super().identity, "encoder": self.encoder.spec}

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.trainer.datamodule.split(
                "train"
            )  # the neighbours: read now, so that the checkpoint is checked for them
        super().setup(stage)
        if stage == "fit" and self.trainer.datamodule.batch_size < 3:
            raise InputError(f"data.batch_size {self.trainer.datamodule.batch_size}: a triplet needs three images")
        if stage == "fit":
            size = self.trainer.datamodule.batch_size // (1 if self.global_mining else self.trainer.world_size)
            if (blocks := len(anchor_blocks(size))) > 1 and self.trainer.is_global_zero:
                print(
                    f"model.loss: the pairs of {size:,} images are worked on in {blocks} blocks, so that memory does not run out"
                )

    def initialize(self, images: Tensor) -> None:
        self.encoder.initialize(images)
        self.encoder.set_views(self.trainer.datamodule, self.mirror, self.shift)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, z_dim)."""
        features = self.encoder(images)
        self.last_features = features.detach()
        return self.head(features)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if not len(output):  # in an evaluation, where there are fewer batches than processes
            return output.sum()
        if self.training and self.trainer.world_size > 1 and self.global_mining:
            # With gradient: every process computes the loss of the whole global batch.
            output = self.all_gather(output, sync_grads=True).flatten(0, 1)
            labels = self.all_gather(labels).flatten()
        # Random triplets depend on the step alone; in evaluation they are the same each time.
        seed = self._step_seed + (0 if self.global_mining else self.global_rank) if self.training else 0
        with torch.autocast(output.device.type, enabled=False):
            z = output if output.dtype == torch.float64 else output.float()
            loss = self.triplet_loss(z, labels, torch.Generator().manual_seed(seed % 2**63))
        if self.training:
            self.last_embeddings, self.last_loss = (output.detach(), labels), loss.detach()
        return loss

    def predicted_classes(self, output: Tensor, labels: Tensor) -> Tensor:
        # While training among the global batch, where this process's images stand behind those of the lower ranks.
        bank, bank_labels = self.last_embeddings if self.training else (output, labels)
        first = self.global_rank * len(labels) if len(bank) > len(labels) else 0
        queries, bank, nearest = F.normalize(output.float(), dim=1), F.normalize(bank.float(), dim=1), []
        for rows in queries.split(max(1, MATRIX // len(bank))):
            similarity = rows @ bank.T
            similarity.diagonal(first).fill_(-2)
            first += len(rows)
            nearest.append(similarity.argmax(1))
        return bank_labels[torch.cat(nearest)]

    def on_predict_start(self) -> None:
        with torch.inference_mode(), self.trainer.precision_plugin.forward_context():
            bank = self.encoder.embed_all(self.trainer.datamodule.evaluation_loader("train"), shifted=False)
        self._bank = bank, self.trainer.datamodule.split("train").labels.to(self.device)

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The classes' shares (B, num_classes) of the votes of the nearest training images."""
        options = self.num_classes, self.knn_k, self.knn_temperature
        return knn_probabilities(self.encoder.embed(batch[0]), *self._bank, *options)

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
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def _log_retrieval(self, split: str) -> None:
        if not self._queries:
            return
        queries, labels = (torch.cat(x) for x in zip(*self._queries))
        self._queries.clear()
        with self.trainer.precision_plugin.forward_context():
            bank = self.encoder.embed_all(self.trainer.datamodule.evaluation_loader("train"), shifted=False)
        bank_labels = self.trainer.datamodule.split("train").labels.to(self.device)
        options = self.num_classes, self.knn_k, self.knn_temperature
        found = retrieval_statistics(queries, labels, bank, bank_labels, *options)
        # Every process asked for its own images; sum and count over all of them.
        sums = torch.cat([found.sum(0), found.new_tensor([len(found)])])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        metrics = {f"{split}/{name}": value for name, value in retrieval_metrics(sums[:-1] / sums[-1]).items()}
        self.log_dict(metrics, sync_dist=True)  # the same on every process; said so that Lightning does not warn


def _try(loss: BatchLoss, dim: int) -> None:
    """Raises InputError where `loss` cannot be called on embeddings of width `dim`: now, not after the data is read."""
    name, generator = type(loss).__name__, torch.Generator().manual_seed(0)
    z = torch.randn(6, dim, generator=generator)
    try:
        value = loss(z, torch.tensor([0, 0, 1, 1, 2, 2]), generator)
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(
            f"model.loss {name} does not take embeddings of width {dim}, labels and a generator ({first_line(error)}); choose a loss"
            " of lightning_modules, and give MahalanobisDistance that width as dim"
        ) from error
    if not isinstance(value, Tensor) or value.ndim:
        raise InputError(f"model.loss {name} gives no single number; choose a loss of lightning_modules")
