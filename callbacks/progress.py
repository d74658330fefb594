"""The progress bar: one line that fits 80 columns."""

import math
import time

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

from callbacks.image_rate import ImageRate


class Progress(TQDMProgressBar):
    """Lightning's bar with stage and epoch, loss, validation accuracy, the time left of the whole fit, and images/s.

    Epochs count from 1. A narrower terminal cuts the line's end. The validations of a fit have no bar of their own,
    which would take a second line. Loss and images/s are those of every `log_every_n_steps`-th step, since a GPU's host
    waits for such a number.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._began, self._first = 0.0, None  # there may be validations before a fit's first step
        self._loss: float | None = None
        self._images, self._rate = ImageRate(), None
        self._shown_at, self._looked_at = 0.0, 0

    def init_train_tqdm(self) -> tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{postfix} {bar}"
        return bar

    def init_validation_tqdm(self) -> tqdm:
        return tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first = time.monotonic(), trainer.global_step
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._images.restart()
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        stage = type(trainer.lightning_module).__name__
        self.train_progress_bar.set_description_str(f"{stage} {trainer.current_epoch + 1}{last}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps
        self._images.add(len(batch[1]) * trainer.world_size)
        if every and step % every == 0 and step != self._looked_at:  # accumulated batches share a step
            self._loss, self._looked_at = float(outputs["logged_loss"]), step
            self._rate = self._images.measure() or self._rate
        if trainer.is_last_batch or time.monotonic() - self._shown_at > 0.2:  # drawing may take longer than a step
            self._shown_at = time.monotonic()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images.restart()
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        metrics, shown = super().get_metrics(trainer, pl_module), {}
        if self._loss is not None:
            shown["loss"] = f"{self._loss:.3g}"
        accuracy = f"val/{getattr(pl_module, 'accuracy_name', 'accuracy')}"
        if accuracy in metrics:
            shown["val"] = f"{metrics[accuracy]:.3f}"
        steps = 0 if self._first is None else trainer.global_step - self._first
        if steps and math.isfinite(total := trainer.estimated_stepping_batches):
            left = (time.monotonic() - self._began) / steps * (total - trainer.global_step)
            shown["left"] = tqdm.format_interval(left)
        if self._rate is not None:
            shown["img/s"] = tqdm.format_sizeof(self._rate)
        return shown
