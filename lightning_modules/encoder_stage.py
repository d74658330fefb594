"""What the two stages that train an encoder share."""

from typing import Any

from torch import Tensor, nn

from errors import InputError, require
from lightning_modules.encoders.contract import CompileMode, Encoder, Predictor
from lightning_modules.stage import Stage


class EncoderStage(Stage):
    """A stage that trains an encoder, on whose features probes are put afterwards.

    Args:
        encoder: the network whose features probes and kNN read.
        mirror: evaluate on features averaged over each image and its mirror image; null: where the training data is
            flipped.
        shift: average them also over the image moved by so many pixels along the diagonal, to both sides; null: 1 where
            the training data is translated, else 0.
        compile_mode: torch.compile's for the encoder's training passes; null: not compiled.
        channels_last: false: images and weights lie in memory channel by channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        mirror: bool | None = None,
        shift: int | None = None,
        compile_mode: CompileMode | None = None,
        channels_last: bool = True,
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        require(0 <= (shift or 0) < 32, "model.shift", shift, "0..31 pixels")
        self.encoder, self.mirror, self.shift = encoder.run_as(channels_last, compile_mode), mirror, shift
        self.compile_mode = compile_mode

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1 and self.compile_mode in ("reduce-overhead", "max-autotune"):
            raise InputError(
                f"model.compile_mode {self.compile_mode}: its CUDA graphs would hold BatchNorm's messages between the"
                " processes, which nobody has tried; give default, max-autotune-no-cudagraphs, or one device"
            )
        super().setup(stage)

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "encoder": self.encoder.spec}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["seen_images"] = self.trainer.datamodule.training_digests

    def initialize(self, images: Tensor) -> None:
        self.encoder.initialize(images)
        data = self.trainer.datamodule
        self.encoder.mirror.fill_(data.flip if self.mirror is None else self.mirror)
        self.encoder.shift.fill_(min(1, data.translate) if self.shift is None else self.shift)

    def predictor(self, features: bool = False) -> nn.Module:
        return Predictor(self.encoder, nn.Identity() if features else self.prediction_head())

    def prediction_head(self) -> nn.Module:
        """Features (B, D) → what `predictor` gives."""
        return nn.Identity()
