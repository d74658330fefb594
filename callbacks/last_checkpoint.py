"""The checkpoint that a stopped or killed run resumes from."""

import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from errors import InputError, require
from run_folder import LAST, STEP0


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` at every epoch's end, every so many steps between, at `max_steps`, and after other
    validations.

    SIGTERM and SIGINT (Ctrl-C) end a fit at the end of its step, or of the validation it is in, with that checkpoint
    and exit code 143 or 130. A second one ends it at once. A loss that is not finite ends the fit with InputError, and
    is in no checkpoint. It is looked at in every step; on a GPU in every tenth, in each epoch's last and before each
    checkpoint.

    Args:
        every_n_steps: steps between two checkpoints within an epoch.
    """

    ASK_EVERY = 10  # steps after which several processes ask each other for a signal, and a GPU is asked for the loss

    def __init__(self, every_n_steps: int = 200) -> None:
        require(every_n_steps >= 1, "LastCheckpoint every_n_steps", every_n_steps, "at least 1")
        self.every_n_steps, self.signal, self._step = every_n_steps, 0, 0
        self._handlers = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not Lightning's: they end with exit code 0 and no checkpoint, and several processes at different steps.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame) -> None:
        if self.signal:
            sys.exit(128 + number)
        self.signal = number

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        due = trainer.is_last_batch or step % self.every_n_steps == 0 or step % self.ASK_EVERY == 0
        loss = outputs["loss"]
        if (due or self.signal or loss.device.type == "cpu") and not loss.isfinite():
            self._not_finite(trainer, float(loss))
        accumulating, self._step = step == self._step, step
        if trainer.is_last_batch or accumulating:
            return  # the epoch's end follows, or the step's
        stop = self._stopped(trainer) if trainer.world_size == 1 or step % self.ASK_EVERY == 0 else 0
        if stop or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)
        self._end(trainer, stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # an epoch that stops early is not over: it has been saved where it stopped
            self._save(trainer)
        self._end(trainer, self._stopped(trainer))

    def _save(self, trainer: Trainer) -> None:
        if trainer.logger and not trainer.fast_dev_run:
            trainer.save_checkpoint(Path(trainer.log_dir) / "checkpoints" / LAST)

    def _not_finite(self, trainer: Trainer, loss: float) -> NoReturn:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        kept = [Path(trainer.log_dir) / "checkpoints" / name for name in (LAST, STEP0)] if trainer.logger else []
        kept = [str(path) for path in kept if path.is_file()]
        raise InputError(
            f"the loss is {loss} at step {trainer.global_step} (learning rate {rate:.3g}): start anew with a lower"
            " model.lr (a resumed fit keeps its rate), --trainer.precision 32-true or --trainer.gradient_clip_val;"
            f" the last good checkpoint is {kept[0] if kept else 'not there yet'}"
        )

    def _stopped(self, trainer: Trainer) -> int:
        """The signal that any of the processes has received, or 0."""
        number = torch.tensor(self.signal, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _end(self, trainer: Trainer, number: int) -> None:
        if number:
            if trainer.is_global_zero:
                name, step = signal.Signals(number).name, trainer.global_step
                print(f"main.py: stopped by {name} at step {step}; resume with --ckpt_path last", file=sys.stderr)
            sys.exit(128 + number)
