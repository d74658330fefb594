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
        mirror: evaluate on features averaged over each image and its mirror image; null: where the training data is flipped.
        shift: average them also over the image moved by so many pixels along the diagonal, to both sides; null: 1 where the
            training data is translated, else 0.
        compile_mode: torch.compile's for the encoder's training passes; null: not compiled.
        channels_last: false: images and weights lie in memory channel by channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        label_smoothing: float = 0.0,
        mirror: bool | None = None,
        shift: int | None = None,
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
        self.label_smoothing, self.mirror, self.shift = label_smoothing, mirror, shift

    @property
    def identity(self) -> dict:
        return {**super().identity, "encoder": self.encoder.spec}

    def initialize(self, images: Tensor) -> None:
        self.encoder.initialize(images)
        self.encoder.set_views(self.trainer.datamodule, self.mirror, self.shift)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.classifier(self.encoder(images))
        # The validations of a fit do without the shifted views, which take three times as long.
        return self.classifier(self.encoder.embed(images, shifted=self.trainer.state.fn != "fit"))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels, label_smoothing=self.label_smoothing if self.training else 0.0)
