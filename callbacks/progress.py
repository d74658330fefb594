"""The progress bar: stage and epoch, loss and accuracy, images/s, and the time left of the whole fit."""

import math
import time
from datetime import timedelta

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar with the stage's name, epochs counted from 1, and the time that all remaining epochs will take."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first, self._total = (
            time.monotonic(),
            trainer.global_step,
            trainer.estimated_stepping_batches,
        )
        super().on_train_start(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if trainer.state.fn == "fit" and (done := trainer.global_step - self._first) and math.isfinite(self._total):
            seconds = (time.monotonic() - self._began) / done * (self._total - trainer.global_step)
            items["left"] = str(timedelta(seconds=round(seconds)))
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        last = "" if self.trainer.max_epochs in (None, -1) else f"/{self.trainer.max_epochs}"
        return f"{type(self.trainer.lightning_module).__name__}, epoch {current_epoch + 1}{last}"
