"""The checkpoint that a stopped or killed run resumes from."""

import signal
import sys
import threading

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from checkpoint_file import LAST, STEP0
from errors import require
from lightning_modules.finite_loss import LossNotFinite
from run_folder import shared_folder


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` at every epoch's end, every so many steps between, at `max_steps`, and after other
    validations.

    SIGTERM and SIGINT (Ctrl-C) end a fit with that checkpoint and exit code 143 or 130: at the end of the step or of
    the validation it is in, on several processes within ten steps. A second signal ends it at once.

    Args:
        every_n_steps: steps between two checkpoints within an epoch.
    """

    ASK_EVERY = 10  # steps after which several processes ask each other for a signal

    def __init__(self, every_n_steps: int = 200) -> None:
        require(every_n_steps >= 1, "LastCheckpoint every_n_steps", every_n_steps, "at least 1")
        self.every_n_steps, self.signal, self._step = every_n_steps, 0, 0
        self._handlers, self._folder = {}, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = shared_folder(trainer)  # now, when all processes ask for it
        # Not Lightning's: they end with exit code 0 and no checkpoint, and several processes at different steps.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def _receive(self, number: int, frame) -> None:
        if self.signal:
            sys.exit(128 + number)
        self.signal = number

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, LossNotFinite):
            kept = [self._folder / "checkpoints" / name for name in (LAST, STEP0)] if self._folder is not None else []
            kept = [str(path) for path in kept if path.is_file()]
            exception.args = (f"{exception}; the last good checkpoint is {kept[0] if kept else 'not there yet'}",)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        accumulating, self._step = step == self._step, step
        if trainer.is_last_batch or accumulating or self._validates(trainer, batch_idx):
            return  # the epoch's end follows, or the step's, or a validation, which a checkpoint before it would skip
        stop = self._stopped(trainer) if trainer.world_size == 1 or step % self.ASK_EVERY == 0 else 0
        if stop or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)
        self._end(trainer, stop)

    def _validates(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether a validation follows this step, as far as that does not depend on the clock."""
        every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
        if every is None or not sum(trainer.num_val_batches):
            return False
        if epochs is None:  # validations are counted over all epochs
            return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0
        return (batch_idx + 1) % every == 0 and (trainer.current_epoch + 1) % epochs == 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # an epoch that stops early is not over: it has been saved where it stopped
            self._save(trainer)
        self._end(trainer, self._stopped(trainer))

    def _save(self, trainer: Trainer) -> None:
        if self._folder is not None:
            trainer.save_checkpoint(self._folder / "checkpoints" / LAST)

    def _stopped(self, trainer: Trainer) -> int:
        """The signal that any of the processes has received, or 0."""
        if trainer.world_size == 1:
            return self.signal
        number = torch.tensor(self.signal, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _end(self, trainer: Trainer, number: int) -> None:
        if number:
            if trainer.is_global_zero:
                name, step = signal.Signals(number).name, trainer.global_step
                remedy = "; resume with --ckpt_path last" if self._folder is not None else ""
                print(f"main.py: stopped by {name} at step {step}{remedy}", file=sys.stderr)
            sys.exit(128 + number)
