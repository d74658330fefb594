"""A callback that ends its process as `kill -9` would, at a chosen point of a fit; for tests/test_killed.py."""

import os
import signal
import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback

from errors import one_line
from main import main

PHASES = ("backward", "step", "validation", "checkpoint", "epoch_end")


def quiet_main(args: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(one_line("main.py", lambda: main(args)))


class Killer(Callback):
    """Args:
    phase: `backward`: before the optimiser's step; `step`: behind it; `validation`: in a validation; `checkpoint`: with
        half of the file written; `epoch_end`: between validation and the epoch's end.
    step: the first optimiser step at or after which to die.
    log_file: a line "phase step" is added to this file.
    """

    def __init__(self, phase: str, step: int, log_file: str) -> None:
        self.phase, self.step, self.log_file = phase, step, log_file

    def on_fit_start(self, trainer, pl_module) -> None:
        write = torch.save

        def save(value, file, **options):
            write(value, file, **options)
            # What processes send to each other is written by torch.save as well, and not to a file.
            if (
                self.phase == "checkpoint"
                and trainer.global_step >= self.step
                and hasattr(file, "truncate")
                and hasattr(file, "name")
            ):
                file.truncate(file.tell() // 2)
                file.flush()
                self._die(trainer)

        torch.save = save

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._maybe("backward", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._maybe("step", trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._maybe("validation", trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._maybe("epoch_end", trainer)

    def _maybe(self, phase: str, trainer) -> None:
        if phase == self.phase and trainer.global_step >= self.step:
            self._die(trainer)

    def _die(self, trainer) -> None:
        if trainer.is_global_zero:
            with Path(self.log_file).open("a") as file:
                file.write(f"{self.phase} {trainer.global_step}\n")
        os.kill(os.getpid(), signal.SIGKILL)


class Signal(Callback):
    """Sends its own process the signal `number` in step 11."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 10:
            os.kill(os.getpid(), self.number)
