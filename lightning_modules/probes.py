"""Classifiers on a frozen encoder, which `callbacks.FrozenEncoder` hands over."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.distributed import SharedDropout
from lightning_modules.encoders import Encoder, build_encoder
from lightning_modules.stage import Stage


class OnFrozenEncoder:
    """The half of a probe that is not its head: an encoder that never trains, and standardised features.

    `encoder` is None until FrozenEncoder sets it (fit) or the probe's own checkpoint brings it (test, predict). Inputs
    are images (B, 3, 32, 32) in [0, 1], or features (B, D) where they were computed beforehand. The head trains on the
    features of single views and is evaluated on `Encoder.embed`, mirror-averaged where the encoder says so: training on
    averages too would cost a second pass over the training images.

    FrozenEncoder may release the encoder in the middle of a fit: with `encoder_lr` set before the optimiser is made, and
    `released` from then on, it is trained with the head.
    """

    encoder: Encoder | None  # no default here: a class attribute would hide the submodule
    encoder_lr: float | None = None
    released = False

    def build_head(self, feature_dim: int) -> nn.Module:
        raise NotImplementedError

    def _build(self) -> None:
        self.head = self.build_head(self.encoder.feature_dim)
        self.register_buffer("feature_mean", torch.zeros(self.encoder.feature_dim))
        self.register_buffer("feature_std", torch.ones(self.encoder.feature_dim))

    @property
    def identity(self) -> dict:
        return {**super().identity, "encoder": None if self.encoder is None else self.encoder.spec}

    def initialize(self, inputs: Tensor) -> None:
        if self.encoder is None:
            raise InputError(f"{type(self).__name__} has no encoder: the FrozenEncoder callback must hand it one")
        self._build()
        features = inputs
        if inputs.ndim > 2:
            features = self.encoder.embed_all(
                self.trainer.datamodule.evaluation_loader("train"), single_view=True
            ).cpu()
        self.feature_mean.copy_(features.mean(0))
        std = features.std(0)
        self.feature_std.copy_(torch.where(std > 1e-6, std, 1.0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.encoder is None and (checkpoint.get("stage") or {}).get("module") == type(self).__name__:
            self.encoder = build_encoder(checkpoint["stage"]["encoder"]).requires_grad_(False).eval()
            self._build()
        super().on_load_checkpoint(checkpoint)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.encoder is not None and not self.released:
            self.encoder.eval()  # BatchNorm keeps its statistics
        return self

    def _trained(self) -> list[nn.Parameter]:
        return list(self.head.parameters())  # what weight decay and l2_lambda act on

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.encoder_lr is not None:
            trained = [p for p in self.encoder.parameters() if p.requires_grad]
            groups.append({"params": trained, "weight_decay": 0.0, "lr": self.encoder_lr})
        return groups

    def forward(self, inputs: Tensor) -> Tensor:
        if self.encoder is None:
            raise InputError(f"{type(self).__name__} has no encoder: give --ckpt_path, or fit it with FrozenEncoder")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.released):
            if inputs.ndim == 2:
                features = inputs
            else:
                features = self.encoder(inputs).float() if self.training else self.encoder.embed(inputs)
        with torch.autocast(features.device.type, enabled=False):  # the head stays in float32
            return self.head((features - self.feature_mean) / self.feature_std)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)


class LinearProbe(OnFrozenEncoder, Stage):
    """Softmax regression on an encoder's frozen features."""

    def __init__(self, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        self.encoder = None

    def build_head(self, feature_dim: int) -> nn.Module:
        head = nn.Linear(feature_dim, self.num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head


class MLPProbe(OnFrozenEncoder, Stage):
    """A network of one hidden layer on an encoder's frozen features.

    Args:
        hidden_dim: units of the hidden layer.
        dropout: share of hidden units dropped while training.
    """

    def __init__(self, hidden_dim: int = 512, dropout: float = 0.0, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        if hidden_dim < 1:
            raise InputError(f"model.hidden_dim {hidden_dim}: must be at least 1")
        if not 0 <= dropout < 1:
            raise InputError(f"model.dropout {dropout}: must be in [0, 1)")
        self.encoder, self.hidden_dim, self.dropout = None, hidden_dim, dropout

    def build_head(self, feature_dim: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(feature_dim, self.hidden_dim), nn.ReLU(), SharedDropout(self.dropout),
            nn.Linear(self.hidden_dim, self.num_classes),
        )  # fmt: skip
