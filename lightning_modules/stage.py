"""What every stage shares: its metrics, its optimiser, and what its checkpoint says of itself."""

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from errors import InputError
from lightning_modules.distributed import gather_objects, share_batch_norm
from lightning_modules.restorable import fits, restorable

SPLITS = ("train", "val", "test")


class Stage(LightningModule):
    """A training stage: `forward(images) → output`, `loss(output, labels)`, `predicted_classes(output, labels)`.

    Logs `<split>/loss` and `<split>/accuracy` for train, val and test: exact means over the images of an epoch.

    Args:
        num_classes: number of classes; linked to the data by the command line.
        lr: learning rate, the peak one for the triangular schedule.
        optimizer: SGD (with Nesterov momentum where `momentum` > 0), Adam or AdamW.
        momentum: SGD's momentum.
        weight_decay: the optimiser's, on weights of two or more dimensions.
        l2_lambda: λ of ½λ‖W‖² added to the training loss over the same weights (logged losses are without it).
        schedule: `constant`; `triangular`: linearly up over the share `warmup` of all steps, then down to zero;
            `plateau`: × `plateau_factor` after `plateau_patience` validations without a lower loss.
    """

    def __init__(
        self,
        num_classes: int = 10,
        lr: float = 0.1,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        l2_lambda: float = 0.0,
        schedule: Literal["constant", "triangular", "plateau"] = "constant",
        warmup: float = 0.2,
        plateau_factor: float = 0.6,
        plateau_patience: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder", "loss"])
        for name, value, valid, expected in (
            ("num_classes", num_classes, num_classes >= 2, "at least 2"),
            ("lr", lr, lr > 0, "above 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("l2_lambda", l2_lambda, l2_lambda >= 0, "0 or more"),
            ("warmup", warmup, 0 <= warmup < 1, "in [0, 1)"),
            ("plateau_factor", plateau_factor, 0 < plateau_factor < 1, "in (0, 1)"),
            ("plateau_patience", plateau_patience, plateau_patience >= 0, "0 or more"),
        ):
            if not valid:
                raise InputError(f"model.{name} {value}: must be {expected}")
        self.num_classes, self.lr, self.l2_lambda = num_classes, lr, l2_lambda
        self.optimizer, self.momentum, self.weight_decay = optimizer, momentum, weight_decay
        self.schedule, self.warmup = schedule, warmup
        self.plateau = {"factor": plateau_factor, "patience": plateau_patience}
        self.class_names: list[str] | None = None
        self._resumed: dict[str, Any] | None = None  # the checkpoint that a fit goes on from
        self._resumed_metrics: dict[str, dict[str, Tensor]] = {}
        # The labels were checked when they were read; a check at every step would wait for the GPU.
        accuracy = partial(MulticlassAccuracy, average="micro", validate_args=False)
        self.accuracy = nn.ModuleDict({f"{s}/accuracy": accuracy(num_classes) for s in SPLITS})
        # NaN stays NaN: by default it is left out of the mean, and with "disable" the weights are (torchmetrics 1.9).
        self.mean_loss = nn.ModuleDict({f"{s}/loss": MeanMetric(nan_strategy=float("nan")) for s in SPLITS})

    def initialize(self, images: Tensor) -> None:
        """Fills the buffers computed from the training split before the first step of a fit."""
        raise NotImplementedError

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def predicted_classes(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(1)

    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        if datamodule is None:
            raise InputError(
                f"{type(self).__name__} needs a data module, such as CIFAR10DataModule or DigitsDataModule"
            )
        if self.num_classes != datamodule.num_classes:
            raise InputError(f"model.num_classes {self.num_classes}: the data has {datamodule.num_classes} classes")
        self.class_names = datamodule.class_names
        if stage == "fit":
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
            self.initialize(datamodule.split("train").images)
            share_batch_norm(self)

    def on_fit_start(self) -> None:
        # Before Lightning restores them: an optimiser and a schedule take whatever a checkpoint holds.
        for name, own in restorable(self.trainer).items() if self._resumed is not None else ():
            if not fits(self._resumed.get(name), own):
                raise InputError(
                    f"the checkpoint's {name} are not what this command's model.optimizer and model.schedule leave; start"
                    " from the run's own --config RUN/config.yaml"
                )
        self._resumed = None

    def on_train_start(self) -> None:
        self._registered = False
        for name, states in self._resumed_metrics.items():
            for key, value in states.items():
                setattr(self._train_metrics[name], key, value.to(self.device))
            self._train_metrics[name]._update_count = 1

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # Whatever is drawn in a step depends on the step alone: the same on every process and after a resume.
        key = (self._seed, self.current_epoch, batch_idx)
        self._step_seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        # Not torch.manual_seed: for every device that is not in use it keeps the seed and a stack trace, step by step.
        torch.default_generator.manual_seed(self._step_seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(self._step_seed)

    def probabilities(self, output: Tensor) -> Tensor:
        """Class probabilities (B, num_classes) of what `forward` gives."""
        return output.float().softmax(1)

    def _step(self, split: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        output = self(inputs)
        loss = self.loss(output, labels)
        accuracy, mean_loss = self.accuracy[f"{split}/accuracy"], self.mean_loss[f"{split}/loss"]
        if len(labels):  # a process may have no images of its own in an evaluation
            accuracy.update(self.predicted_classes(output.detach(), labels), labels)
            mean_loss.update(loss.detach(), len(labels))
        # The metrics sum up by themselves: Lightning has to hear of them once an epoch, and a call for every batch costs
        # more than a probe's whole step. (A run resumed inside an epoch does not start at batch 0.)
        if batch_idx == 0 or not self._registered:
            self._registered = True
            options = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": len(labels)}
            self.log(f"{split}/loss", mean_loss, **options)
            self.log(f"{split}/accuracy", accuracy, **options)
        return loss, output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._step("train", batch, batch_idx)
        if batch_idx % max(1, self.trainer.log_every_n_steps) == 0:
            self.log("loss", loss, prog_bar=True, logger=False)
        if self.l2_lambda:
            loss = loss + self.l2_lambda / 2 * sum(w.square().sum() for w in self._trained() if w.ndim > 1)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step("val", batch, batch_idx)[1]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step("test", batch, batch_idx)[1]

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes)."""
        return self.probabilities(self(batch[0]))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's: weights of two or more dimensions decay, biases and scales do not."""
        return [
            {"params": [p for p in self._trained() if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in self._trained() if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        groups = self.parameter_groups()
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        else:
            kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(groups, lr=self.lr)
        if self.schedule == "triangular":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Triangle(self.total_steps, self.warmup))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **self.plateau)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
        return {"optimizer": optimizer}

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole fit. (Trainer.estimated_stepping_batches would set the loaders up too early.)"""
        limit, batches = self.trainer.limit_train_batches, len(self.trainer.datamodule.train_dataloader())
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        by_epochs = -(-batches // self.trainer.accumulate_grad_batches) * (self.trainer.max_epochs or 1000)
        limits = [n for n in (by_epochs, self.trainer.max_steps) if n > 0]
        if not limits:
            raise InputError("the triangular schedule needs an end: give --trainer.max_epochs or --trainer.max_steps")
        return min(limits)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the module that loads it; plain types."""
        return {"module": type(self).__name__, "class_names": self.class_names}

    @property
    def _train_metrics(self) -> dict[str, Metric]:
        return {"loss": self.mean_loss["train/loss"], "accuracy": self.accuracy["train/accuracy"]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = self.identity
        checkpoint["data"] = self.trainer.datamodule.fingerprint
        if self.trainer.state.fn == "fit" and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # What each process has summed up in an epoch that is not over.
            states = {k: {s: v.cpu() for s, v in m.metric_state.items()} for k, m in self._train_metrics.items()}
            checkpoint["train_metrics"] = gather_objects(states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            self._resumed = checkpoint
            ranks, own = checkpoint.get("train_metrics"), {k: m.metric_state for k, m in self._train_metrics.items()}
            if fits(ranks, [own] * self.trainer.world_size):
                self._resumed_metrics = ranks[self.global_rank]
        # Runs before the weights are loaded: one line here instead of a page of size mismatches there.
        saved, trained_on = (
            x if isinstance(x, dict) else {} for x in (checkpoint.get("stage"), checkpoint.get("data"))
        )
        hint = "start from the run's own --config RUN/config.yaml"
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise InputError(f"the checkpoint's {name} is {saved.get(name)}, this command's is {value}; {hint}")
        for name, value in self.trainer.datamodule.fingerprint.items():
            if trained_on.get(name) != value:
                raise InputError(
                    f"the checkpoint's data.{name} is {trained_on.get(name)}, this command's is {value}; {hint}"
                )
        shapes, own = ({k: tuple(v.shape) for k, v in d.items()} for d in (checkpoint["state_dict"], self.state_dict()))
        for name in [*own, *shapes]:
            if shapes.get(name) != own.get(name):
                found, expected = shapes.get(name, "missing"), own.get(name, "no such tensor")
                raise InputError(f"the checkpoint's {name} is {found}, this command's model expects {expected}; {hint}")


class Triangle:
    """Learning rate factor at step s of `total`: 0 → 1 over the share `warmup`, then 1 → 0; never 0 itself."""

    def __init__(self, total: int, warmup: float) -> None:
        self.total, self.peak = total, warmup * total

    def __call__(self, step: int) -> float:
        rising = (step + 1) / self.peak if step + 1 < self.peak else 1.0
        return min(rising, (self.total - step) / max(self.total - self.peak, 1.0))
