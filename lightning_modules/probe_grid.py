"""A grid of linear probes trained at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.probes import OnFrozenEncoder
from lightning_modules.stage import Stage


class LinearProbeGrid(OnFrozenEncoder, Stage):
    """Linear probes of several learning rates × weight decays at once, each trained as it would be alone.

    All read the same batches, through one matrix product. After every validation the setting with the highest accuracy
    there (of equals, the lowest loss) is `chosen`: its figures are `val/accuracy` and `val/loss`, the checkpoint carries
    the choice, and `test` and `predict` follow it. Each setting's validation accuracy is logged under `grid/`.

    Args:
        lr_factors: the learning rates, in units of `lr`.
        weight_decay_factors: the weight decays, in units of `weight_decay`.
    """

    def __init__(
        self,
        lr_factors: list[float] = [0.1, 0.3, 1.0, 3.0],
        weight_decay_factors: list[float] = [0.0, 1.0, 10.0, 100.0],
        num_classes: int = 10,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if not lr_factors or not all(f > 0 for f in lr_factors):
            raise InputError(f"model.lr_factors {lr_factors}: give one or more, all above 0")
        if not weight_decay_factors or not all(f >= 0 for f in weight_decay_factors):
            raise InputError(f"model.weight_decay_factors {weight_decay_factors}: give one or more, all 0 or more")
        if self.l2_lambda:
            raise InputError("model.l2_lambda: a grid has weight decays instead; give model.weight_decay_factors")
        self.encoder, self.searching = None, False
        self.settings = [[self.lr * a, self.weight_decay * b] for a in lr_factors for b in weight_decay_factors]
        self.register_buffer("chosen", torch.tensor(0))

    @property
    def identity(self) -> dict:
        return {**super().identity, "grid": self.settings}

    def setup(self, stage: str) -> None:
        self.searching = stage == "fit"
        if self.searching and self.trainer.gradient_clip_val:
            raise InputError(
                "trainer.gradient_clip_val: one norm over all settings of a grid would mix them; leave it out"
            )
        super().setup(stage)

    def build_head(self, feature_dim: int) -> nn.Module:
        return _Heads(len(self.settings), feature_dim, self.num_classes)

    def parameter_groups(self) -> list[dict]:
        if self.encoder_lr is not None:
            raise InputError("frozen_encoder.unfreeze_at_epoch: a grid shares its encoder; fine-tune with LinearProbe")
        groups = []
        for (lr, weight_decay), weight, bias in zip(self.settings, self.head.weights, self.head.biases):
            groups.append({"params": [weight], "lr": lr, "weight_decay": weight_decay})
            groups.append({"params": [bias], "lr": lr, "weight_decay": 0.0})
        return groups

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, settings, classes) in a fit, those of the chosen setting (B, classes) otherwise."""
        logits = super().forward(inputs)
        return logits if self.searching else logits[:, self.chosen]

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return _losses(output, labels).mean() if output.ndim == 3 else F.cross_entropy(output, labels)

    def predicted_classes(self, output: Tensor, labels: Tensor) -> Tensor:
        return (output[:, self.chosen] if output.ndim == 3 else output).argmax(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # The sum over the settings: each gets the gradient that it would have alone.
        return super().training_step(batch, batch_idx) * len(self.settings)

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(3, len(self.settings), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if not self.searching:
            return super().validation_step(batch, batch_idx)
        inputs, labels = batch
        logits = self(inputs)
        right = (logits.argmax(2) == labels[:, None]).sum(0)
        self._sums += torch.stack([right, _losses(logits, labels).sum(0), torch.full_like(right, len(labels))])
        return logits

    def on_validation_epoch_end(self) -> None:
        if self.searching:
            sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
            accuracies, losses = (sums[:2] / sums[2]).tolist()
            best = max(range(len(self.settings)), key=lambda i: (accuracies[i], -losses[i]))
            self.chosen.fill_(best)
            found = {"val/accuracy": accuracies[best], "val/loss": losses[best]}
            self.log_dict(found, prog_bar=True, sync_dist=True)
            names = (f"grid/lr_{lr:g}_weight_decay_{decay:g}" for lr, decay in self.settings)
            self.log_dict(dict(zip(names, accuracies)), sync_dist=True)
        self._log_choice()

    def on_test_epoch_end(self) -> None:
        self._log_choice()

    def _log_choice(self) -> None:
        lr, weight_decay = self.settings[int(self.chosen)]
        self.log_dict({"chosen/lr": lr, "chosen/weight_decay": weight_decay}, sync_dist=True)


class _Heads(nn.Module):
    """`settings` linear layers side by side: (B, D) → (B, settings, classes)."""

    def __init__(self, settings: int, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(classes, feature_dim) for _ in range(settings))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(settings))

    def forward(self, features: Tensor) -> Tensor:
        logits = F.linear(features, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.unflatten(1, (len(self.weights), -1))


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B, settings) of logits (B, settings, classes)."""
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")
