"""`metrics.csv` and `curves.png`: loss and accuracy over the steps of a fit."""

import csv
import io
import time

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from callbacks.figures import DRAW_EVERY, draw_curves, save
from files import write
from run_folder import folder_of


class Curves(Callback):
    """Writes `metrics.csv`, a row for every step at which something was measured, after every epoch.

    Draws `curves.png` every two minutes and at the end of the fit, when it goes to TensorBoard too. A resumed run keeps
    the rows that are there.

    Args:
        pictures: false: no `curves.png`.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, self._drawn_at = folder_of(trainer), time.monotonic()
        if folder is not None and (path := folder / "metrics.csv").is_file():
            text = path.read_bytes()
            rows, damaged = read_rows(text.decode(errors="replace"))
            self.rows = {step: row for step, row in rows.items() if step <= trainer.global_step}
            if damaged:
                write(kept := path.with_name("metrics_damaged.csv"), text)
                rank_zero_warn(f"{path}: damaged lines are dropped ({damaged}); {kept} keeps the file as it was")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, "train/", lr=trainer.optimizers[0].param_groups[0]["lr"])
        if (folder := folder_of(trainer)) is not None:
            names = sorted({name for row in self.rows.values() for name in row} - {"epoch", "lr"})
            text = io.StringIO()
            writer = csv.DictWriter(text, ["step", "epoch", "lr", *names], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))
            write(folder / "metrics.csv", text.getvalue())
        if self.pictures and folder_of(trainer) is not None and time.monotonic() - self._drawn_at > DRAW_EVERY:
            save(trainer, draw_curves(self.rows), "curves.png")
            self._drawn_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pictures and self.rows and folder_of(trainer) is not None:
            save(trainer, draw_curves(self.rows), "curves.png", "curves")

    def _record(self, trainer: Trainer, prefix: str, **more: float) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        # An epoch counts from 1 here: `epoch 1` is what the first pass over the data has brought.
        self.rows.setdefault(trainer.global_step, {}).update(metrics, epoch=trainer.current_epoch + 1, **more)


def read_rows(text: str) -> tuple[dict[int, dict[str, float]], int]:
    """The rows of a `metrics.csv` by step, and the number of lines that cannot be read."""
    rows, damaged = {}, 0
    head, *lines = text.splitlines(keepends=True) or [""]
    for line in lines:
        try:
            if not line.endswith("\n"):
                raise ValueError("cut short, maybe within a number")
            (row,) = csv.DictReader([head, line], strict=True)
            step, epoch = int(row.pop("step")), int(row.pop("epoch"))
            rows[step] = {"epoch": epoch, **{name: float(value) for name, value in row.items() if value != ""}}
        except (KeyError, TypeError, ValueError, csv.Error):
            damaged += 1
    return rows, damaged
