"""What the triplets of a batch look like while an encoder trains, and a sentence when something is wrong with them."""

import math

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from errors import InputError
from lightning_modules.losses import BatchLoss
from lightning_modules.triplets import active_counts, pair_masks

LARGEST = 8192  # of a larger batch, the first so many embeddings are measured


class MiningMonitor(Callback):
    """Measures `pl_module.last_embeddings` in every so many steps of a fit, for TensorBoard and the progress bar.

    `mining/active`: share of the batch's triplets that violate the loss's margin (0 where it has none);
    `mining/misordered`: share whose negative is nearer than the positive, a half by chance; `mining/ignored`: the same among
    the active ones, which semi-hard mining leaves out;
    `mining/positive`, `mining/negative`: mean distances d(a, p), d(a, n) (histograms: `mining/d_ap`, `mining/d_an`);
    `mining/norm`: mean norm of the embeddings; `mining/spread`: mean standard deviation of a dimension (histogram:
    `mining/spread_by_dimension`); `mining/effective_rank`: see `effective_rank`. Says once what `diagnose` finds wrong.

    Args:
        every_n_steps: steps between two measurements.
        patience: measurements that must find the same thing wrong before it is said, each that does not taking one off
            (four times as many for `misordered` and `ignored`).
        stop: also stop the fit then.
    """

    def __init__(self, every_n_steps: int = 50, patience: int = 3, stop: bool = False) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise InputError(f"MiningMonitor {name} {value}: must be at least 1")
        self.every_n_steps, self.patience, self.stop = every_n_steps, patience, stop
        self._times: dict[str, int] = {}  # measurements that found it, less those that did not, never below 0
        self._said: set[str] = set()
        self._measured_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "triplet_loss"):
            raise InputError(f"MiningMonitor watches triplet encoders; {type(pl_module).__name__} is none")

    def state_dict(self) -> dict:
        return {"times": self._times, "said": sorted(self._said), "measured_at": self._measured_at}

    def load_state_dict(self, state: dict) -> None:
        self._times, self._said, self._measured_at = state["times"], set(state["said"]), state["measured_at"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self._measured_at or step % self.every_n_steps:  # accumulated batches share a step
            return
        self._measured_at = step
        z, labels = (x[:LARGEST] for x in pl_module.last_embeddings)
        loss = float(pl_module.last_loss)
        if not (z.isfinite().all() and math.isfinite(loss)):
            return  # LastCheckpoint ends such a fit
        measured, histograms = measure(pl_module.triplet_loss, z.float(), labels)
        pl_module.log_dict(
            {"active": measured["active"], "rank": measured["effective_rank"]}, prog_bar=True, logger=False
        )
        if trainer.logger:
            trainer.logger.log_metrics({f"mining/{name}": value for name, value in measured.items()}, step)
            if trainer.is_global_zero:
                for name, values in histograms.items():
                    trainer.logger.experiment.add_histogram(f"mining/{name}", values, step)
        self._judge(trainer, diagnose(pl_module.triplet_loss, measured, loss))

    def _judge(self, trainer: Trainer, found: dict[str, str]) -> None:
        # One measurement without it does not start its count anew: a batch is a small sample.
        counts = {kind: self._times.get(kind, 0) + (1 if kind in found else -1) for kind in self._times | found}
        self._times = {kind: n for kind, n in counts.items() if n > 0}
        for kind, what in found.items():
            # At the start of every fit many triplets are in the wrong order, and semi-hard mining leaves out as many.
            patience = self.patience * (4 if kind in ("misordered", "ignored") else 1)
            if self._times[kind] < patience or kind in self._said:
                continue
            self._said.add(kind)
            sentence = f"step {trainer.global_step}: {what}"
            rank_zero_warn(sentence)
            if trainer.logger and trainer.is_global_zero:
                trainer.logger.experiment.add_text("mining/diagnosis", sentence, trainer.global_step)
            if self.stop:
                trainer.should_stop = True


@torch.no_grad()
def measure(loss: BatchLoss, z: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers and histograms' values of embeddings `z` (B, D), `labels` (B,), under the loss's own distance."""
    distances = loss.distance.matrix(z)
    positive, negative = pair_masks(labels)
    triplets = (positive.sum(1) * negative.sum(1)).sum()
    violating = active_counts(distances, labels, loss.margin or 0.0).clamp_min(0).sum()
    misordered = active_counts(distances, labels, 0.0).clamp_min(0).sum() if loss.margin else violating
    histograms = {"d_ap": distances[positive], "d_an": distances[negative], "spread_by_dimension": z.std(0)}
    measured = {
        "triplets": triplets,
        "active": violating / triplets.clamp_min(1),
        "misordered": misordered / triplets.clamp_min(1),
        "positive": distances[positive].sum() / positive.sum().clamp_min(1),
        "negative": distances[negative].sum() / negative.sum().clamp_min(1),
        "norm": z.norm(dim=1).mean(),
        "spread": histograms["spread_by_dimension"].mean(),
        # Between 0 (all embeddings alike) and 1 (their mean is the origin).
        "relative_spread": z.var(0, correction=0).sum().sqrt() / z.square().sum(1).mean().sqrt().clamp_min(1e-30),
        "effective_rank": effective_rank(z),
    }
    if getattr(loss, "triplets", None) == "semihard":
        measured["ignored"] = misordered / violating.clamp_min(1)
    return {name: float(value) for name, value in measured.items()}, histograms


def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred z (B, D): between 1 and min(B, D), and 0
    where all rows are alike (O. Roy & M. Vetterli, "The Effective Rank", 2007)."""
    z = (z - z.mean(0)).cpu().double()  # some devices have no float64
    values = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()
    total = values.sum()
    shares = values / total.clamp_min(1e-300)
    return torch.special.entr(shares).sum().exp() * (total > 0)


def diagnose(loss: BatchLoss, measured: dict[str, float], value: float) -> dict[str, str]:
    """What is wrong with a batch: by kind, a sentence that says what to change. `value` is the loss."""
    name, margin, temperature, pinned = type(loss).__name__, loss.margin, loss.temperature, loss.pinned_at
    positive, negative = measured["positive"], measured["negative"]
    easier = "lower model.lr, or choose easier triplets (all or random instead of hard), or PrototypicalLoss"
    found = {}
    if not measured["triplets"]:
        return {"triplets": "the batch has no triplets (one class, or no class twice): raise data.batch_size"}
    if measured["relative_spread"] < 0.02:
        spread = f"spread {measured['relative_spread']:.1e} of their norm, loss {value:.3g}"
        found["collapsed"] = f"collapsed: all embeddings are nearly alike ({spread}): {easier}"
    elif measured["effective_rank"] < 1.5:
        rank = f"effective rank {measured['effective_rank']:.2f}"
        found["collapsed"] = f"collapsed: the embeddings lie on a line ({rank}): {easier}"
    elif pinned is not None and abs(value - pinned) < 0.02 * pinned and abs(positive - negative) < 0.05 * negative:
        where = "ln 2" if margin is None else f"the margin {margin:g}"
        found["pinned"] = f"the loss is pinned at {where}: positives are as far away as negatives: {easier}"
    if measured.get("ignored", 0) > 0.4 and measured["active"] > 0.1:
        found["ignored"] = (
            f"semi-hard mining leaves out {measured['ignored']:.0%} of the triplets that violate the margin, whose negative is nearer"
            " than the positive: classes that lie on each other stay so; choose triplets: all, or PrototypicalLoss"
        )
    elif not found and measured["misordered"] > 0.35:
        found["misordered"] = (
            f"{measured['misordered']:.0%} of all triplets have the negative nearer than the positive, where chance gives a half:"
            " the embeddings hardly tell classes apart; lower model.lr (or raise it, if it is tiny), or choose PrototypicalLoss"
        )
    if margin is not None and measured["active"] == 0:
        found["inactive"] = (
            f"nothing is active any more: every negative is farther away than every positive by more than {margin:g}; raise"
            " the margin of model.loss, or stop here"
        )
    elif margin is not None and not 0.005 * negative <= margin <= 10 * negative:
        found["margin"] = (
            f"margin {margin:g} of {name} is out of range: negatives are {negative:.2g} away on average; give a margin"
            " between a tenth of that and that"
        )
    if temperature is not None and not 0.01 <= temperature <= 1:
        what = "all pairs weigh alike" if temperature > 1 else "only the single hardest pair of each anchor has a gradient"
        found["temperature"] = f"temperature {temperature:g} of {name} is out of range ({what}): give one in 0.05 … 0.5"
    return found
