"""A grid of linear probes trained at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, require
from lightning_modules.means import Mean
from lightning_modules.probe import Probe
from lightning_modules.stage import Batch


class LinearProbeGrid(Probe):
    """Linear probes of several learning rates × weight decays at once, each trained as it would be alone.

    All read the same batches, through one matrix product. After every validation the setting with the highest accuracy
    there (of equals, the lowest loss) is `chosen`: its figures are `val/accuracy` and `val/loss`, the checkpoint holds
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
        factors, decays = lr_factors, weight_decay_factors
        require(bool(factors) and min(factors) > 0, "model.lr_factors", factors, "one or more, all above 0")
        require(bool(decays) and min(decays) >= 0, "model.weight_decay_factors", decays, "one or more, all 0 or more")
        if self.l2_lambda:
            raise InputError("model.l2_lambda: a grid has weight decays instead; give model.weight_decay_factors")
        self.searching = False
        self.settings = [[self.lr * a, self.hparams.weight_decay * b] for a in factors for b in decays]
        self.register_buffer("chosen", torch.tensor(0))
        self.found = Mean(2 * len(self.settings))  # accuracies and losses of the settings in a validation

    @property
    def identity(self) -> dict:
        return {**super().identity, "grid": self.settings}

    def setup(self, stage: str) -> None:
        self.searching = stage == "fit"
        if self.searching and self.trainer.gradient_clip_val:
            raise InputError("trainer.gradient_clip_val: one norm over a grid would mix its settings; leave it out")
        if self.searching and not self.trainer.datamodule.val_size:
            raise InputError("data.val_size 0: a grid chooses by validation images; hold some out, or fit LinearProbe")
        super().setup(stage)

    def build_head(self, feature_dim: int) -> nn.Module:
        return _Heads(len(self.settings), feature_dim, self.num_classes)

    def parameter_groups(self) -> list[dict]:
        groups = []
        for (lr, weight_decay), weight, bias in zip(self.settings, self.head.weights, self.head.biases):
            groups.append({"params": [weight], "lr": lr, "weight_decay": weight_decay})
            groups.append({"params": [bias], "lr": lr, "weight_decay": 0.0})
        return groups

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, settings, classes) in a fit, those of the chosen setting (B, classes) otherwise."""
        logits = super().forward(inputs)
        return logits if self.searching else self._of_chosen(logits)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return _losses(output, labels).mean() if output.ndim == 3 else F.cross_entropy(output, labels)

    def predicted_classes(self, output: Tensor) -> Tensor:
        return (self._of_chosen(output) if output.ndim == 3 else output).argmax(1)

    def _of_chosen(self, output: Tensor) -> Tensor:
        # output[:, self.chosen] would ask a GPU for the number.
        return output.index_select(1, self.chosen.view(1)).squeeze(1)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        # The sum over the settings: each gets the gradient that it would have alone.
        found = super().training_step(batch, batch_idx)
        return {**found, "loss": found["loss"] * len(self.settings)}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if not self.searching:
            return super().validation_step(batch, batch_idx)
        inputs, labels, *_ = batch
        logits = self(inputs)
        right = (logits.argmax(2) == labels[:, None]).sum(0)
        self.found.update(torch.cat([right, _losses(logits, labels).sum(0)]), len(labels))
        return {"output": logits}

    def on_validation_epoch_end(self) -> None:
        if self.searching:
            accuracies, losses = self.found.compute().view(2, -1).tolist()
            self.found.reset()
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

    def prediction_head(self) -> nn.Module:
        weight, bias = self.head.weights[int(self.chosen)], self.head.biases[int(self.chosen)]
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        return head


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
    # As (B · settings, classes): of the other order, a GPU has no deterministic kernel.
    labels = labels[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
