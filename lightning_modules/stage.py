"""What every stage shares: its steps, its means, and what its checkpoint says of itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from errors import InputError, first_line, require
from lightning_modules.distributed import share_batch_norm
from lightning_modules.identity import agree, check_shapes
from lightning_modules.means import Mean
from lightning_modules.optimization import Optimization

# Images (B, 3, 32, 32), in training (B · V, 3, S, S) or a list of such for several sizes of views; labels (B,). In an
# evaluation of views, two of each image (2 B, 3, S, S) too.
Batch = tuple[Tensor | list[Tensor], Tensor] | tuple[Tensor, Tensor, Tensor]


class Stage(Optimization):
    """A training stage: `forward(images) → output`, `loss(output, labels)`, `predicted_classes(output)`.

    Logs `<split>/loss` and `<split>/accuracy` for train, val and test: exact means over the images of an epoch.

    Args:
        num_classes: number of classes; linked to the data by the command line.
        l2_lambda: λ of ½λ‖W‖² added to the training loss over the weights that `weight_decay` is about (logged
            losses are without it).
    """

    def __init__(self, num_classes: int = 10, l2_lambda: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise InputError(f"model.num_classes {num_classes}: expected at least 2; {self.needs_labels}")
        require(l2_lambda >= 0, "model.l2_lambda", l2_lambda, "0 or more")
        self.num_classes, self.l2_lambda = num_classes, l2_lambda
        self.class_names: list[str] | None = None
        self.means = nn.ModuleDict(
            {f"{s}/{name}": Mean() for s in ("train", "val", "test") for name in ("loss", "accuracy")}
        )
        self._kept_means: dict[str, list[Tensor]] = {}  # those of an epoch that a checkpoint was saved in
        self._announced = True  # whether Lightning knows of this epoch's training means

    accuracy_name = "accuracy"  # as it is logged

    @property
    def needs_labels(self) -> str:
        """Why this command needs labelled training images; '' where it does not."""
        return f"{type(self).__name__} needs them, and an encoder with model.positives view does not"

    def in_float32(self) -> AbstractContextManager:
        """What classifiers compute logits in: no autocast in evaluation, whose figures are published."""
        return nullcontext() if self.training else torch.autocast(self.device.type, enabled=False)

    def initialize(self, images: Tensor) -> None:
        """Fills the buffers computed from the training split before the first step of a fit."""
        raise NotImplementedError

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """The mean over a batch."""
        raise NotImplementedError

    def predicted_classes(self, output: Tensor) -> Tensor:
        """Classes (B,) of what `forward` gives."""
        return output.argmax(1)

    def probabilities(self, output: Tensor) -> Tensor:
        """Class probabilities (B, num_classes) of what `forward` gives."""
        return output.float().softmax(1)

    def predictor(self, features: bool = False) -> nn.Module:
        """Images (B, 3, 32, 32) in [0, 1] → class probabilities (B, num_classes), or features (B, D) where this stage
        has nothing else or `features` asks for them: a module that torch.export can trace. Shares the stage's weights.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        if datamodule is None:
            raise InputError(
                f"{type(self).__name__} needs a data module, such as CIFAR10DataModule or DigitsDataModule"
            )
        if not datamodule.labelled and self.needs_labels:
            raise InputError(f"{datamodule.train_place}: no labels; {self.needs_labels}")
        if datamodule.labelled and self.num_classes != datamodule.num_classes:
            raise InputError(f"model.num_classes {self.num_classes}: the data has {datamodule.num_classes} classes")
        self.class_names = datamodule.class_names
        if stage == "fit":
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
            for view in datamodule.views:
                takes_size(getattr(self, "encoder", self), view.size)
            self.initialize(datamodule.split("train").images)
            share_batch_norm(self)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._announced = False
        for name, (sums, count) in self._kept_means.items():
            self.means[name].update(sums.to(self.device), count.to(self.device))
        self._kept_means = {}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Whatever is drawn in a step depends on the step alone: the same on every process and after a resume.
        key = (self._seed, self.current_epoch, batch_idx)
        self.step_seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        # Not torch.manual_seed: for every device that is not in use it keeps the seed and a stack trace, step by step.
        torch.default_generator.manual_seed(self.step_seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(self.step_seed)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        views, labels = batch
        output = of_views(self, views, len(labels))
        labels = labels.repeat_interleave(len(output) // len(labels))
        loss = self.loss(output, labels)
        self.record("train", batch_idx, loss, self.predicted_classes(output.detach()) == labels)
        return {"loss": loss + self.l2_penalty(), "logged_loss": loss.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluation_step("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluation_step("test", batch, batch_idx)

    def evaluation_step(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels, *_ = batch
        output = self(images)
        self.record(split, batch_idx, self.loss(output, labels), self.predicted_classes(output) == labels)
        return {"output": output}

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes)."""
        return self.probabilities(self(batch[0]))

    def record(self, split: str, batch_idx: int, loss: Tensor, correct: Tensor) -> None:
        """Adds a batch to the split's means: its mean loss, and which of its images are classified right, (B,)."""
        if split == "train":
            self.note_loss(loss)
        images, names = len(correct), (f"{split}/loss", f"{split}/accuracy")
        if images:  # a process may have no images of its own in an evaluation
            for name, total in zip(names, (loss.detach().to(self.means[names[0]].sums.dtype) * images, correct.sum())):
                self.means[name].update(total, images)
        # The means sum up by themselves: Lightning has to hear of them once an epoch, and a call for every batch costs
        # more than a probe's whole step. (A run resumed inside an epoch does not start at batch 0.)
        if batch_idx == 0 or not self._announced:
            self._announced = True
            for name, shown in zip(names, (names[0], f"{split}/{self.accuracy_name}")):
                self.log(shown, self.means[name], on_step=False, on_epoch=True, prog_bar=True, batch_size=images)

    def l2_penalty(self) -> Tensor | float:
        """½λ‖W‖² of `l2_lambda`."""
        if not self.l2_lambda:
            return 0.0
        return self.l2_lambda / 2 * sum(w.square().sum() for w in self.decaying() if w.ndim > 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the module that loads it; plain types."""
        return {"module": type(self).__name__, "class_names": self.class_names}

    @property
    def training_identity(self) -> dict[str, Any]:
        """What it must agree on besides where a fit resumes from it."""
        return {name: self.hparams[name] for name in ("optimizer", "schedule")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = {**self.identity, **self.training_identity}
        checkpoint["data"] = self.trainer.datamodule.fingerprint
        super().on_save_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit" and not self.trainer.is_last_batch:
            # What all processes have summed up in an epoch that is not over; the first one takes it back.
            reduce = self.trainer.strategy.reduce
            checkpoint["train_means"] = {
                name: [reduce(x, reduce_op="sum").cpu() for x in (mean.sums.clone(), mean.count.clone())]
                for name, mean in self.means.items()
                if name.startswith("train/")
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Runs before the weights are loaded: one line here instead of a page of size mismatches there.
        identity = self.identity
        if self.trainer.state.fn == "fit":
            identity |= self.training_identity
            if self.trainer.is_global_zero:
                self._kept_means = checkpoint.get("train_means", {})
        agree("", identity, checkpoint.get("stage"))
        agree("data.", self.trainer.datamodule.fingerprint, checkpoint.get("data"))
        if self.trainer.state.fn == "test" and isinstance(seen := checkpoint.get("seen_images"), Tensor):
            if count := self.trainer.datamodule.seen_in("test", seen):
                rank_zero_warn(f"{count} of the test images are among those that the encoder was trained on")
        check_shapes(self, checkpoint["state_dict"])
        if self.trainer.state.fn == "fit":
            super().on_load_checkpoint(checkpoint)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes over a checkpoint of this class outside a Trainer: class names and every weight; for evaluation.

        Raises InputError where it is one of another class, or its weights do not fit.
        """
        agree("", {"module": type(self).__name__}, checkpoint.get("stage"))
        check_shapes(self, checkpoint["state_dict"])
        self.load_state_dict(checkpoint["state_dict"])
        self.class_names = checkpoint["stage"].get("class_names")
        self.eval()


def of_views(network: Callable[[Tensor], Tensor], views: Tensor | list[Tensor], images: int) -> Tensor:
    """What `network` gives for a batch's views of so many `images`: (B · V, …), an image's views behind each other.

    Views of several sizes take a pass each, the first size the last one: a BatchNorm with a large momentum remembers
    mostly that.
    """
    if isinstance(views, Tensor):
        return network(views)
    found = [network(x).unflatten(0, (images, -1)) for x in reversed(views)]
    return torch.cat(found[::-1], dim=1).flatten(0, 1)


def takes_size(network: nn.Module, size: int) -> None:
    """Raises InputError where `network` does not take images of that side."""
    if size == 32:
        return
    training = network.training
    try:
        with torch.no_grad():
            device = next(chain(network.parameters(), network.buffers())).device
            network.eval()(torch.zeros(1, 3, size, size, device=device))
    except RuntimeError as error:
        name = type(network).__name__
        raise InputError(f"data.small_size {size}: {name} does not take such images ({first_line(error)})") from error
    finally:
        network.train(training)
