"""Classifiers on a frozen encoder, which `callbacks.FrozenEncoder` hands over."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, require
from lightning_modules.distributed import SharedDropout
from lightning_modules.encoders.contract import Encoder, Predictor, build_encoder, encoder_weights, weights_sha256
from lightning_modules.stage import Stage


class Standardize(nn.Module):
    """Features (B, D) → (features − mean) / std of the training images' features."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def initialize(self, features: Tensor) -> None:
        std = features.std(0)
        self.mean.copy_(features.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Probe(Stage):
    """A classifier, its head, on the standardised features of an encoder that never trains.

    `encoder` is None until `adopt` (in a fit) or the probe's own checkpoint (test, predict) brings one. Inputs are
    images (B, 3, 32, 32) in [0, 1], or features (B, D) where they were computed beforehand. The head trains on the
    features of single views and is evaluated on `Encoder.embed`, the mean over views: training on means too would cost
    further passes over the training images. A checkpoint holds two digests (SHA-256): that of the encoder that was
    handed over, and that of its weights in this fit's precision, which are compared whenever the probe is loaded.
    """

    starts_from = ("triplet_encoder",)  # stages: the newest finished run of the first that has one gives the encoder
    trains_encoder = False
    encoder: Encoder | None  # no default here: a class attribute would hide the submodule

    def __init__(self, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        self.encoder, self.encoder_sha256, self.frozen_sha256 = None, None, None
        self._encoder_data: dict | None = None  # what the encoder's checkpoint says of its training images
        self._seen: Tensor | None = None  # their digests

    def build_head(self, feature_dim: int) -> nn.Module:
        """Features (B, `feature_dim`) → logits (B, num_classes)."""
        raise NotImplementedError

    def adopt(self, encoder: Encoder, checkpoint: dict[str, Any]) -> None:
        """Takes over a trained encoder, and makes a head for it. `checkpoint` is the one that the encoder came from."""
        self.encoder_sha256, self._encoder_data = weights_sha256(encoder.state_dict()), checkpoint.get("data")
        self._encoder_data = checkpoint.get("encoder_data") or self._encoder_data  # of a probe: its own encoder's
        self._seen = checkpoint.get("seen_images")
        self._build(encoder)

    def _build(self, encoder: Encoder) -> None:
        if not self.trains_encoder:
            encoder.requires_grad_(False)
        self.encoder = encoder.train(self.trains_encoder)
        self.standardize, self.head = Standardize(encoder.feature_dim), self.build_head(encoder.feature_dim)

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "encoder": None if self.encoder is None else self.encoder.spec}

    @property
    def training_identity(self) -> dict[str, Any]:
        return {**super().training_identity, "encoder_sha256": self.encoder_sha256}

    def initialize(self, images: Tensor) -> None:
        data = self.trainer.datamodule
        if self.encoder is None:
            raise InputError(f"{type(self).__name__} has no encoder: the FrozenEncoder callback must hand it one")
        features = data.train_features
        if features is None:
            features = self.encoder.embed_all(data.evaluation_loader("train"), single_view=True).cpu()
        self.standardize.initialize(features)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self._build_from(checkpoint)
        super().restore(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._build_from(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def _build_from(self, checkpoint: dict[str, Any]) -> None:
        """Makes encoder and head as the checkpoint says, unless `adopt` has; compares the encoder's digest."""
        stage = checkpoint.get("stage")
        if not isinstance(stage, dict) or stage.get("module") != type(self).__name__:
            return  # refused by what follows
        if self.encoder is None:
            self._build(build_encoder(stage.get("encoder")).to(self.device))
            self.encoder_sha256 = stage.get("encoder_sha256")
        elif stage.get("encoder_sha256") != self.encoder_sha256:
            raise InputError(
                "this probe was fitted on another encoder than this one; give the same --frozen_encoder.run, or the"
                " same --seed_everything beside --frozen_encoder.encoder"
            )
        found = weights_sha256(encoder_weights(checkpoint["state_dict"]))
        if not self.trains_encoder and found != checkpoint.get("frozen_sha256"):
            raise InputError("the encoder in this probe's checkpoint is not the one it was fitted on; fit it again")

    def on_train_start(self) -> None:
        super().on_train_start()
        self.frozen_sha256 = self.frozen_sha256 or weights_sha256(self.encoder.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.frozen_sha256 = self.frozen_sha256 or weights_sha256(self.encoder.state_dict())
        checkpoint["frozen_sha256"] = self.frozen_sha256
        checkpoint["encoder_data"] = self._encoder_data
        own = self.trainer.datamodule.training_digests
        checkpoint["seen_images"] = own if self._seen is None else torch.cat([own, self._seen]).unique()

    def on_train_end(self) -> None:
        if not self.trains_encoder and weights_sha256(self.encoder.state_dict()) != self.frozen_sha256:
            raise InputError(
                "the frozen encoder has changed while the probe was fitted; leave out the callback that did so"
            )

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        if self.encoder is not None and not self.trains_encoder:
            self.encoder.eval()  # BatchNorm keeps its statistics
        return self

    def decaying(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, num_classes) of images or features."""
        if self.encoder is None:
            raise InputError(f"{type(self).__name__} has no encoder: give --ckpt_path, or fit it with FrozenEncoder")
        features = inputs
        if inputs.ndim > 2:
            features = self.encoder(inputs).float() if self.training else self.encoder.embed(inputs)
        with torch.autocast(features.device.type, enabled=False):  # the head computes in its weights' type
            return self.head(self.standardize(features.to(self.standardize.mean.dtype)))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    def predictor(self, features: bool = False) -> nn.Module:
        head = nn.Identity() if features else nn.Sequential(self.standardize, self.prediction_head(), nn.Softmax(1))
        return Predictor(self.encoder, head)

    def prediction_head(self) -> nn.Module:
        return self.head


class LinearProbe(Probe):
    """Softmax regression on an encoder's frozen features."""

    def build_head(self, feature_dim: int) -> nn.Module:
        head = nn.Linear(feature_dim, self.num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head


class MLPProbe(Probe):
    """A network of one hidden layer on an encoder's frozen features.

    Args:
        hidden_dim: units of the hidden layer.
        dropout: share of hidden units dropped while training.
    """

    def __init__(self, hidden_dim: int = 512, dropout: float = 0.0, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        require(hidden_dim >= 1, "model.hidden_dim", hidden_dim, "at least 1")
        require(0 <= dropout < 1, "model.dropout", dropout, "in [0, 1)")
        self.hidden_dim, self.dropout = hidden_dim, dropout

    def build_head(self, feature_dim: int) -> nn.Module:
        hidden, classes = self.hidden_dim, self.num_classes
        layers = nn.Linear(feature_dim, hidden), nn.ReLU(), SharedDropout(self.dropout), nn.Linear(hidden, classes)
        return nn.Sequential(*layers)
