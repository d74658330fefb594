"""The reference from above: the same network trained under cross-entropy."""

import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.encoders import CompileMode, Encoder
from lightning_modules.stage import Stage


class SupervisedEncoder(Stage):
    """An encoder and a linear classifier trained together with cross-entropy.

    Args:
        encoder: the network; probes can be put on it as on a triplet encoder.
        label_smoothing: share of each label spread over all classes in the training loss.
        mirror: average features over each image and its mirror image; null: where the training data is flipped.
        compile_mode: torch.compile's for the encoder's training passes; null: not compiled.
        channels_last: false: images and weights lie in memory channel by channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        label_smoothing: float = 0.0,
        mirror: bool | None = None,
        compile_mode: CompileMode | None = None,
        channels_last: bool = True,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"model.label_smoothing {label_smoothing}: must be in [0, 1)")
        self.encoder = encoder.run_as(channels_last, compile_mode)
        self.classifier = nn.Linear(encoder.feature_dim, num_classes)
        self.label_smoothing, self.mirror = label_smoothing, mirror

    @property
    def identity(self) -> dict:
        return {**super().identity, "encoder": self.encoder.spec}

    def initialize(self, images: Tensor) -> None:
        self.encoder.initialize(images)
        self.encoder.mirror.fill_(self.trainer.datamodule.flip if self.mirror is None else self.mirror)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images) if self.training else self.encoder.embed(images))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels, label_smoothing=self.label_smoothing if self.training else 0.0)
