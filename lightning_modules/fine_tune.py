"""Fine-tuning: an encoder trained on together with the linear probe that was fitted on it."""

from typing import Any

from torch import nn

from errors import InputError, require
from lightning_modules.encoders.contract import Encoder
from lightning_modules.identity import check_shapes
from lightning_modules.probe import LinearProbe


class FineTune(LinearProbe):
    """Starts from a finished linear probe, encoder and head, and trains both: the assignment's network B.

    A head that fits already spares the encoder the first steps' large gradients (A. Kumar et al., "Fine-Tuning can
    Distort Pretrained Features and Underperform Out-of-Distribution", 2022, LP-FT).

    Args:
        encoder_lr: the encoder's learning rate, which follows the schedule of the head's, `lr`. Weight decay and
            `l2_lambda` stay the head's alone.
    """

    starts_from = "linear_probe"
    trains_encoder = True

    def __init__(self, encoder_lr: float = 0.0005, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        require(encoder_lr > 0, "model.encoder_lr", encoder_lr, "above 0")
        self.encoder_lr = encoder_lr

    def adopt(self, encoder: Encoder, checkpoint: dict[str, Any]) -> None:
        super().adopt(encoder, checkpoint)
        if (checkpoint.get("stage") or {}).get("module") not in ("LinearProbe", "FineTune"):
            raise InputError("fine-tuning starts from a finished linear probe: name its run as --frozen_encoder.run")
        for name in ("standardize", "head"):
            part, prefix = getattr(self, name), f"{name}."
            weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
            check_shapes(part, weights)
            part.load_state_dict(weights)

    def initialize(self, images) -> None:
        """Nothing: the features' statistics are the probe's."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained: list[nn.Parameter] = [p for p in self.encoder.parameters() if p.requires_grad]
        return [*super().parameter_groups(), {"params": trained, "weight_decay": 0.0, "lr": self.encoder_lr}]
