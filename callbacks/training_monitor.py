"""What TensorBoard shows of every fit: speed, gradients and learning rate, curves in pairs, and runs side by side."""

import time

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.nn.utils import get_total_norm

# The custom scalars page: training and validation in one chart.
LAYOUT = {"training": {q: ["Multiline", [f"train/{q}", f"val/{q}"]] for q in ("loss", "accuracy")}}


class TrainingMonitor(Callback):
    """Logs `step/images_per_s`, `step/gradient_norm` (before clipping) and `step/lr` every `log_every_n_steps` steps.

    Puts training and validation curves into one chart on the custom scalars page. After a fit, the options of model and
    data and the metrics of the last validation go to the HParams page, where runs are compared and sorted.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at, self._has_layout = trainer.global_step, False
        self._since, self._images = None, 0  # a fit that goes on within an epoch does not pass its start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._images = None, 0  # a rate across a validation would be none
        if trainer.logger and trainer.is_global_zero and not self._has_layout:  # not before the run has its folder
            trainer.logger.experiment.add_custom_scalars(LAYOUT)
            self._has_layout = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        if (trainer.global_step + 1) % max(1, trainer.log_every_n_steps) == 0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._norm, self._lr = get_total_norm(gradients), optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        self._images += len(batch[1]) * trainer.world_size
        step = trainer.global_step
        if step == self._measured_at or step % max(1, trainer.log_every_n_steps):  # accumulated batches share a step
            return
        now, self._measured_at = time.perf_counter(), step
        measured = {"step/gradient_norm": float(self._norm), "step/lr": self._lr}
        if self._since is not None:
            measured["step/images_per_s"] = self._images / (now - self._since)
            pl_module.log("images/s", measured["step/images_per_s"], prog_bar=True, logger=False)
        self._since, self._images = now, 0
        if trainer.logger:
            trainer.logger.log_metrics(measured, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.logger and trainer.is_global_zero):
            return
        options = {"model": type(pl_module).__name__, **pl_module.hparams, **trainer.datamodule.hparams}
        for name in ("encoder", "triplet_loss"):
            part = getattr(pl_module, name, None)
            if part is not None:
                options[name] = type(part).__name__
        # Lightning notes by a leading underscore how it made the objects.
        options = {
            k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in options.items() if k[0] != "_"
        }
        metrics = {f"last/{k}": float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        trainer.logger.log_hyperparams(options, metrics, trainer.global_step)
