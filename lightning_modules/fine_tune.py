"""Fine-tuning: an encoder trained on together with the linear probe that was fitted on it."""

from typing import Any

from torch import Tensor, nn

from errors import require
from lightning_modules.encoders.contract import Encoder
from lightning_modules.identity import check_shapes
from lightning_modules.probe import LinearProbe


class FineTune(LinearProbe):
    """Starts from a finished linear probe, encoder and head, and trains both: the assignment's network B.

    A head that fits already spares the encoder the first steps' large gradients (A. Kumar et al., "Fine-Tuning can
    Distort Pretrained Features and Underperform Out-of-Distribution", 2022, LP-FT). From an encoder's run, the head is
    a new one.

    Args:
        encoder_lr: the encoder's learning rate, which follows the schedule of the head's, `lr`. Weight decay and
            `l2_lambda` stay the head's alone.
    """

    starts_from = ("linear_probe", "triplet_encoder")
    trains_encoder = True

    def __init__(self, encoder_lr: float = 0.0005, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        require(encoder_lr > 0, "model.encoder_lr", encoder_lr, "above 0")
        self.encoder_lr, self.head_is_new = encoder_lr, True

    def adopt(self, encoder: Encoder, checkpoint: dict[str, Any]) -> None:
        super().adopt(encoder, checkpoint)
        self.head_is_new = checkpoint["stage"]["module"] not in ("LinearProbe", "FineTune")
        for name in () if self.head_is_new else ("standardize", "head"):
            part, prefix = getattr(self, name), f"{name}."
            weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
            check_shapes(part, weights)
            part.load_state_dict(weights)

    def initialize(self, images: Tensor) -> None:
        if self.head_is_new:  # the features' statistics are otherwise the probe's
            super().initialize(images)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained: list[nn.Parameter] = [p for p in self.encoder.parameters() if p.requires_grad]
        return [*super().parameter_groups(), {"params": trained, "weight_decay": 0.0, "lr": self.encoder_lr}]
