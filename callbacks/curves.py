"""`metrics.csv` and `curves.png`: loss and accuracy over the steps, train and validation in one picture."""

import csv
import time
from pathlib import Path

from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer


class Curves(Callback):
    """Writes a row of `metrics.csv` for every step at which something was measured, and `curves.png` after epochs.

    Drawing takes longer than an epoch of a small stage: the picture is drawn again only when the last drawing is
    `DRAW_EVERY` seconds ago, and at the end, when it goes to TensorBoard too. A resumed run adds to the rows there are.
    """

    DRAW_EVERY = 60.0

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self._drawn_at = -self.DRAW_EVERY

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._folder(trainer) / "metrics.csv" if trainer.logger else None
        if trainer.is_global_zero and path is not None and path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if int(row["step"]) <= trainer.global_step:
                        values = {k: float(v) for k, v in row.items() if v != "" and k != "step"}
                        self.rows[int(row["step"])] = {**values, "epoch": int(row["epoch"])}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, "train/", lr=trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.is_global_zero and trainer.logger:
            folder = self._folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            names = ["epoch", "lr", *sorted({k for row in self.rows.values() for k in row} - {"epoch", "lr"})]
            with (folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["step", *names], lineterminator="\n")
                writer.writeheader()
                writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))
            if time.monotonic() - self._drawn_at > self.DRAW_EVERY:
                self._figure().savefig(folder / "curves.png", dpi=120)
                self._drawn_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.logger and self.rows:
            figure = self._figure()
            figure.savefig(self._folder(trainer) / "curves.png", dpi=120)
            trainer.logger.experiment.add_figure("curves", figure, trainer.global_step)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.logger.log_dir)

    def _record(self, trainer: Trainer, prefix: str, **more: float) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        # An epoch counts from 1 here: `epoch 1` is what the first pass over the data has brought.
        self.rows.setdefault(trainer.global_step, {}).update(metrics, epoch=trainer.current_epoch + 1, **more)

    def _figure(self) -> Figure:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for split, style in (("train", "o-"), ("val", "s--")):
                points = [
                    (s, r[f"{split}/{quantity}"]) for s, r in sorted(self.rows.items()) if f"{split}/{quantity}" in r
                ]
                if points:
                    axes.plot(*zip(*points), style, markersize=3, label={"val": "validation"}.get(split, split))
            axes.set(xlabel="step", ylabel=quantity)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        return figure
