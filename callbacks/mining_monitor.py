"""What the triplets of a batch look like while an encoder trains, and a warning when something is wrong with them."""

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from callbacks.figures import tensorboards
from errors import require
from lightning_modules import TripletEncoder
from lightning_modules.mining import diagnose, measure

LARGEST = 8192  # of a larger batch, the first so many embeddings are measured


class MiningMonitor(Callback):
    """Measures the embeddings of a TripletEncoder's batch every so many steps, for the loggers.

    - `mining/loss`: the loss of that batch.
    - `mining/active`: share of the batch's triplets that violate the loss's margin (0 where it has none).
    - `mining/misordered`: share of them whose negative is nearer than the positive, a half by chance; `mining/ignored`:
      the same share of the active ones, which semi-hard mining leaves out.
    - `mining/positive`, `mining/negative`: mean distances d(a, p), d(a, n); histograms `mining/d_ap`, `mining/d_an`.
    - `mining/norm`: mean norm; `mining/spread`: mean standard deviation of a dimension, with histogram
      `mining/spread_by_dimension`; `mining/effective_rank`: see `effective_rank`.

    Warns once of what `diagnose` finds wrong. Does nothing for other stages.

    Args:
        every_n_steps: steps between two measurements.
        patience: measurements that must agree before a warning (four times as many for `misordered` and `ignored`); one
            that finds nothing lowers the count by one.
        stop: also stop the fit then.
    """

    def __init__(self, every_n_steps: int = 50, patience: int = 3, stop: bool = False) -> None:
        require(every_n_steps >= 1, "mining_monitor.every_n_steps", every_n_steps, "at least 1")
        require(patience >= 1, "mining_monitor.patience", patience, "at least 1")
        self.every_n_steps, self.patience, self.stop = every_n_steps, patience, stop
        self._times: dict[str, int] = {}  # measurements that found it, less those that did not, never below 0
        self._said: set[str] = set()
        self._measured_at = 0

    def state_dict(self) -> dict:
        return {"times": self._times, "said": sorted(self._said), "measured_at": self._measured_at}

    def load_state_dict(self, state: dict) -> None:
        self._times, self._said, self._measured_at = state["times"], set(state["said"]), state["measured_at"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if not isinstance(pl_module, TripletEncoder) or step == self._measured_at or step % self.every_n_steps:
            return  # accumulated batches share a step
        self._measured_at = step
        z, labels = outputs["embeddings"][:LARGEST].float(), outputs["labels"][:LARGEST]
        measured, histograms = measure(pl_module.loss_function, z, labels, outputs["logged_loss"])
        for logger in trainer.loggers if measured else ():  # FiniteLoss ends the fit otherwise
            logger.log_metrics({f"mining/{name}": value for name, value in measured.items()}, step)
        for logger in tensorboards(trainer):
            for name, values in histograms.items():
                logger.experiment.add_histogram(f"mining/{name}", values, step)
        views = pl_module.positives == "view"
        found = diagnose(pl_module.loss_function, measured, views, trainer.current_epoch == 0) if measured else {}
        self._judge(trainer, found)

    def _judge(self, trainer: Trainer, found: dict[str, str]) -> None:
        # One measurement without it does not start its count anew: a batch is a small sample.
        counts = {kind: self._times.get(kind, 0) + (1 if kind in found else -1) for kind in self._times | found}
        self._times = {kind: n for kind, n in counts.items() if n > 0}
        new = False
        for kind, what in found.items():
            # At the start of every fit many triplets are in the wrong order, and semi-hard mining leaves out as many.
            patience = self.patience * (4 if kind in ("misordered", "ignored") else 1)
            if self._times[kind] < patience or kind in self._said:
                continue
            self._said.add(kind)
            new = True
            sentence = f"step {trainer.global_step}: {what}"
            rank_zero_warn(sentence)
            for logger in tensorboards(trainer):
                logger.experiment.add_text("mining/diagnosis", sentence, trainer.global_step)
        # Without global mining each process looks at its own batch, and one that stopped alone would be waited for.
        if self.stop and trainer.strategy.reduce_boolean_decision(new, all=False):
            trainer.should_stop = True
