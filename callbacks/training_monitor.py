"""What TensorBoard shows of every fit: speed, gradients and learning rate, curves in pairs, and runs side by side."""

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.nn.utils import get_total_norm

from callbacks.figures import tensorboards
from callbacks.image_rate import ImageRate


class TrainingMonitor(Callback):
    """Logs `step/images_per_s`, `step/gradient_norm` (before clipping) and `step/lr` every `log_every_n_steps` steps.

    Puts training and validation curves into one chart on the custom scalars page. After a fit, the options of model and
    data and the metrics of the last validation go to the HParams page, where runs are compared and sorted.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = trainer.global_step
        self._rate = ImageRate()
        # The custom scalars page: training and validation in one chart.
        quantities = "loss", getattr(pl_module, "accuracy_name", "accuracy")
        charts = {q: ["Multiline", [f"train/{q}", f"val/{q}"]] for q in quantities}
        for logger in tensorboards(trainer):
            logger.experiment.add_custom_scalars({"training": charts})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate.restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._rate.restart()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._norm, self._lr = get_total_norm(gradients), optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        self._rate.add(len(batch[1]) * trainer.world_size)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not every or step % every or step == self._measured_at:  # accumulated batches share a step
            return
        self._measured_at = step
        measured = {"step/gradient_norm": float(self._norm), "step/lr": self._lr}
        if (rate := self._rate.measure()) is not None:
            measured["step/images_per_s"] = rate
        for logger in trainer.loggers:
            logger.log_metrics(measured, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options = {"model": type(pl_module).__name__, **pl_module.hparams, **trainer.datamodule.hparams}
        parts = {"encoder": "encoder", "loss": "loss_function"}
        options |= {k: type(getattr(pl_module, name)).__name__ for k, name in parts.items() if hasattr(pl_module, name)}
        # Lightning notes by a leading underscore how it made the objects.
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in options.items() if k[0] != "_"}
        metrics = {f"last/{k}": float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        for logger in tensorboards(trainer):
            logger.log_hyperparams(plain, metrics, trainer.global_step)
