"""Ends a fit whose loss is not finite, before anything is saved of it."""

from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from checkpoint_file import LAST, STEP0
from errors import InputError
from run_folder import shared_folder


class FiniteLoss(Callback):
    """Raises InputError on every process after a step in which any of them had a loss that is not finite.

    One process on a CPU looks at each step's loss. A GPU's host would have to wait for it, and several processes have
    to agree: there the losses of all steps since the last look are looked at together, every `log_every_n_steps` steps,
    before each validation, and before a checkpoint of any kind is written. So no checkpoint holds what came of them.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # of the steps that have not been looked at
        self._bad: int | None = None  # the first step whose loss is not finite
        self._looked_at = 0  # accumulated batches share a step
        self._folder: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = shared_folder(trainer)  # now, when all processes ask for it

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step, loss = trainer.global_step, outputs["loss"].detach()
        self._losses.append((max(step, 1), loss))
        each = trainer.world_size == 1 and loss.device.type == "cpu"
        if each or (step != self._looked_at and step % (trainer.log_every_n_steps or 10) == 0):
            self._looked_at = step
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Called by all processes at the same steps."""
        if self._losses:
            values = torch.stack([loss for _, loss in self._losses]).cpu()  # one copy
            bad = (step for (step, _), good in zip(self._losses, values.isfinite().tolist()) if not good)
            self._bad, self._losses = self._bad or next(bad, None), []
        if trainer.world_size > 1:
            # The first of the bad steps is the one with the largest inverse; steps count from 1.
            mine = torch.tensor(1 / self._bad if self._bad else 0.0, device=trainer.strategy.root_device)
            first = float(trainer.strategy.reduce(mine, reduce_op="max"))
            self._bad = round(1 / first) if first else None
        if self._bad is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            kept = [self._folder / "checkpoints" / name for name in (LAST, STEP0)] if self._folder is not None else []
            kept = [str(path) for path in kept if path.is_file()]
            raise InputError(
                f"the loss is not finite at step {self._bad} (learning rate {rate:.3g}): start anew with a lower"
                " model.lr, --trainer.precision 32-true or --trainer.gradient_clip_val;"
                f" the last good checkpoint is {kept[0] if kept else 'not there yet'}"
            )
