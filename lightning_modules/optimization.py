"""The optimiser of every stage and its learning rate, in a fit that starts and in one that resumes."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn

from errors import InputError, require
from lightning_modules.finite_loss import FiniteLoss
from lightning_modules.muon import Muon


class Optimization(FiniteLoss):
    """Optimiser, weight decay and schedule.

    A resumed fit has its own options: the schedule is that of its own length, and its learning rates, momentum and
    weight decay replace the checkpoint's. A line reports the step and the learning rate.

    Args:
        lr: learning rate, the peak one for the triangular schedule.
        optimizer: SGD (with Nesterov momentum where `momentum` > 0), Adam, AdamW, or Muon for the filters of
            convolutions and SGD for all else. Muon scales each filter, so a BatchNorm must follow, as in FastEncoder.
        momentum: SGD's momentum.
        weight_decay: the optimiser's, on weights of two or more dimensions, but for those that Muon steps.
        schedule: `constant`; `triangular`: linearly up over the share `warmup` of all steps, then down to zero;
            `plateau`: × `plateau_factor` after `plateau_patience` validations without a lower loss.
        muon_lr: Muon's learning rate; it follows the same schedule.
        muon_momentum: Muon's.
    """

    def __init__(
        self,
        lr: float = 0.1,
        optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "triangular", "plateau"] = "constant",
        warmup: float = 0.2,
        plateau_factor: float = 0.6,
        plateau_patience: int = 20,
        muon_lr: float = 0.1,
        muon_momentum: float = 0.6,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder", "loss"])
        require(lr > 0, "model.lr", lr, "above 0")
        require(0 <= momentum < 1, "model.momentum", momentum, "in [0, 1)")
        require(weight_decay >= 0, "model.weight_decay", weight_decay, "0 or more")
        require(0 <= warmup < 1, "model.warmup", warmup, "in [0, 1)")
        require(0 < plateau_factor < 1, "model.plateau_factor", plateau_factor, "in (0, 1)")
        require(plateau_patience >= 0, "model.plateau_patience", plateau_patience, "0 or more")
        require(muon_lr > 0, "model.muon_lr", muon_lr, "above 0")
        require(0 <= muon_momentum < 1, "model.muon_momentum", muon_momentum, "in [0, 1)")
        self.lr = lr
        self._offset = 0  # steps by which the first epochs were longer than this fit's, as with another batch size

    def decaying(self) -> list[nn.Parameter]:
        """The weights that `weight_decay` and `l2_lambda` are about; of these, those of two or more dimensions."""
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's: weights of two or more dimensions decay, biases and scales do not."""
        return [
            {"params": [p for p in self.decaying() if p.ndim > 1], "weight_decay": self.hparams.weight_decay},
            {"params": [p for p in self.decaying() if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.hparams
        groups = self.parameter_groups()
        if not any(group["params"] for group in groups):
            raise InputError(f"{type(self).__name__}: no weight in it can be trained; choose another encoder or a head")
        if options.optimizer == "muon":
            own = any("lr" in group for group in groups)
            require(not own, "model.optimizer", "muon", f"another: a part of {type(self).__name__} has its own rate")
            filters = [p for group in groups for p in group["params"] if p.ndim == 4]
            require(filters, "model.optimizer", "muon", "one of the others: nothing here has filters of convolutions")
            groups = [{**group, "params": [p for p in group["params"] if p.ndim != 4]} for group in groups]
            plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
            groups.append({"params": filters, "lr": options.muon_lr, "muon_momentum": options.muon_momentum, **plain})
        groups = [{"lr": self.lr, **group} for group in groups]
        for group in groups:
            group["initial_lr"] = group["lr"]  # saved with the group: a resumed fit compares it with its own
        if options.optimizer in ("sgd", "muon"):
            momentum, kind = options.momentum, torch.optim.SGD if options.optimizer == "sgd" else Muon
            optimizer = kind(groups, lr=self.lr, momentum=momentum, nesterov=momentum > 0)
        else:
            kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
            # PyTorch's own eps, 1e-8, is 0 in float16, and 0 / 0 no step.
            optimizer = kind(groups, lr=self.lr, eps=max(1e-8, torch.finfo(groups[0]["params"][0].dtype).tiny))
        if options.schedule == "triangular":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle(self.total_steps, options.warmup))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if options.schedule == "plateau":
            factor, patience = options.plateau_factor, options.plateau_patience
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
        return {"optimizer": optimizer}

    def epoch_steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch. (Trainer.estimated_stepping_batches would set the loaders up too early.)"""
        limit, batches = self.trainer.limit_train_batches, self.trainer.datamodule.batches_per_epoch
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        varying = self._accumulation
        of_epoch = varying.get_accumulate_grad_batches(epoch) if varying else self.trainer.accumulate_grad_batches
        return -(-batches // of_epoch)

    @property
    def _accumulation(self) -> GradientAccumulationScheduler | None:
        return next((c for c in self.trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)

    def _spans(self) -> Iterator[tuple[int, float, int]]:
        """Epochs of equal length: the first one, the one after the last one, the steps of each."""
        starts = self._accumulation.epochs if self._accumulation else [0]
        for first, end in zip(starts, [*starts[1:], math.inf]):
            yield first, end, self.epoch_steps(first)

    def steps_of(self, epochs: int) -> int:
        """Optimiser steps of the first so many epochs."""
        return sum(max(0, min(end, epochs) - first) * length for first, end, length in self._spans())

    def epochs_of(self, steps: int) -> int:
        """How many whole epochs so many optimiser steps are."""
        return sum(
            min(end - first, max(0, steps - self.steps_of(first)) // max(1, length))
            for first, end, length in self._spans()
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole fit, those before a resumed one included."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if epochs == steps == -1:
            raise InputError("the triangular schedule needs an end: give --trainer.max_epochs or --trainer.max_steps")
        by_epochs = self._offset + self.steps_of(epochs)
        return steps if epochs == -1 or -1 < steps < by_epochs else by_epochs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        step = self.trainer.global_step - self._offset
        epochs = self.epochs_of(step)
        place = {"epochs": epochs, "within": step - self.steps_of(epochs), "length": self.epoch_steps(epochs)}
        checkpoint["schedule"] = place

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where the epochs of the fit that resumes start. Raises InputError within an epoch of another length."""
        saved, step = checkpoint.get("schedule"), checkpoint.get("global_step")
        places = [saved.get(k) for k in ("epochs", "within", "length")] if isinstance(saved, dict) else [None]
        valid = all(type(n) is int for n in (step, *places))
        require(valid, "the checkpoint's step and schedule", (step, *places), "whole numbers")
        epochs, within, length = places
        if within and length != self.epoch_steps(epochs):
            raise InputError(
                f"the checkpoint is {within} of {length} steps into an epoch, and this command's epochs have"
                f" {self.epoch_steps(epochs)} steps: resume with the same data.batch_size and trainer options, or from"
                " a checkpoint of an epoch's end"
            )
        self._offset = step - within - self.steps_of(epochs)

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self.trainer
        if self._accumulation:  # sets it where an epoch starts, and a fit may resume within one
            trainer.accumulate_grad_batches = self._accumulation.get_accumulate_grad_batches(trainer.current_epoch)
        if not trainer.ckpt_path or not trainer.global_step:
            return
        if len(trainer.optimizers) == 1 and "initial_lr" in trainer.optimizers[0].param_groups[0]:
            self._take_options(trainer.optimizers[0])
        rates = sorted({group["lr"] for o in trainer.optimizers for group in o.param_groups}, reverse=True)
        of = f" of {self.total_steps}" if trainer.max_epochs != -1 or trainer.max_steps > 0 else ""
        self.print(f"resumed at step {trainer.global_step}{of}, learning rate {', '.join(f'{x:.4g}' for x in rates)}")

    def _take_options(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimiser that a checkpoint was loaded into the options of this command."""
        fresh = self.configure_optimizers()["optimizer"]
        for group, own in zip(optimizer.param_groups, fresh.param_groups):
            if group["initial_lr"] != own["initial_lr"]:
                group["lr"] *= own["initial_lr"] / group["initial_lr"]  # a plateau's reductions stay
            group.update({key: value for key, value in own.items() if key not in ("params", "lr")})
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(scheduler := config.scheduler, torch.optim.lr_scheduler.LambdaLR):
                scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
                for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas):
                    group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def triangle(total: int, warmup: float) -> Callable[[int], float]:
    """Learning rate factor at step s of `total`: 0 → 1 over the share `warmup`, then 1 → 0; within them never 0.

    A function, of which LambdaLR saves nothing: a resumed fit follows the schedule of its own length.
    """
    peak = warmup * total

    def factor(step: int) -> float:
        rising = (step + 1) / peak if step + 1 < peak else 1.0
        return max(0.0, min(rising, (total - step) / max(total - peak, 1.0)))

    return factor
