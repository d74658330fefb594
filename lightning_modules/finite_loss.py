"""What ends a fit whose loss is not finite, before anything is saved of it."""

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from errors import InputError


class LossNotFinite(InputError):
    """The loss of a step was NaN or infinite."""


class FiniteLoss(LightningModule):
    """Raises LossNotFinite on every process after a step in which any of them had a loss that is not finite.

    One process on a CPU looks at each step's loss. A GPU's host would have to wait for it, and several processes have
    to agree: there the losses of all steps since the last look are looked at together, every `log_every_n_steps` steps
    (several processes: every ten), before each validation, and before a checkpoint of any kind is written. So no
    checkpoint holds what came of them. One that is asked for after the error, as by OnExceptionCheckpoint, gets the
    error again.
    """

    TOGETHER = 10  # steps after which several processes look; Lightning makes them wait for each other in every step

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[tuple[int, Tensor]] = []  # of the steps that have not been looked at
        self._bad: int | None = None  # the first step whose loss is not finite
        self._looked_at = 0  # accumulated batches share a step

    def note_loss(self, loss: Tensor) -> None:
        """Takes the loss (no dimensions) of the training step that is being done."""
        self._losses.append((self.trainer.global_step + 1, loss.detach()))

    def on_train_start(self) -> None:
        self._losses, self._bad, self._looked_at = [], None, self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, alone = self.trainer.global_step, self.trainer.world_size == 1
        every = (self.trainer.log_every_n_steps or self.TOGETHER) if alone else self.TOGETHER
        if (alone and self.device.type == "cpu") or (step != self._looked_at and step % every == 0):
            self._looked_at = step
            self._look()

    def on_train_epoch_end(self) -> None:
        self._look()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self._look()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            self._look()

    def _look(self) -> None:
        """Called by all processes at the same steps."""
        if self._losses:
            values = torch.stack([loss for _, loss in self._losses]).cpu()  # one copy
            bad = (step for (step, _), good in zip(self._losses, values.isfinite().tolist()) if not good)
            self._bad, self._losses = self._bad or next(bad, None), []
        if self.trainer.world_size > 1:
            # The first of the bad steps is the one with the largest inverse; steps count from 1.
            mine = torch.tensor(1 / self._bad if self._bad else 0.0, device=self.device)
            first = float(self.trainer.strategy.reduce(mine, reduce_op="max"))
            self._bad = round(1 / first) if first else None
        if self._bad is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise LossNotFinite(
                f"the loss is not finite at step {self._bad} (learning rate {rate:.3g}): start anew with a lower"
                " model.lr, --trainer.precision 32-true or --trainer.gradient_clip_val"
            )
