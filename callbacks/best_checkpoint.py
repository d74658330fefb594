"""The checkpoint of the best validation."""

from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from run_folder import shared_folder


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with this project's settings: one file, written after a validation.

    Where a fit has no accuracy of classes, as with `positives: view`, `val/loss` decides in place of `val/accuracy`.

    Args:
        monitor: the metric that decides; null: the last validation is kept.
        mode: whether the largest or the smallest value is the best.
        save_top_k: how many checkpoints are kept; -1 for all.
        filename: their names; a resumed run writes the same ones.
    """

    def __init__(
        self,
        monitor: str | None = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        filename: str = "{epoch}-{step}",
    ) -> None:
        once = {"enable_version_counter": False, "save_on_train_epoch_end": False}
        super().__init__(monitor=monitor, mode=mode, save_top_k=save_top_k, filename=filename, **once)
        self._others = {"save_top_k": save_top_k, "filename": filename}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.monitor == "val/accuracy" and getattr(pl_module, "accuracy_name", "accuracy") != "accuracy":
            BestCheckpoint.__init__(self, "val/loss", "min", **self._others)
        folder = shared_folder(trainer)
        if self.dirpath is None and folder is not None:  # Lightning would take the first logger's
            self.dirpath = str(folder / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets the best where the folder's name differs, as after a move: the files count, not their names.
        best = Path(self.dirpath or "", Path(state_dict["best_model_path"]).name)
        if state_dict["best_model_path"] and best.is_file():
            here = {k: str(best.with_name(Path(v).name)) for k, v in state_dict.items() if k.endswith("_path") and v}
            scores = {str(best.with_name(Path(k).name)): v for k, v in state_dict["best_k_models"].items()}
            state_dict = {**state_dict, **here, "best_k_models": scores, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


def best_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps a run's best checkpoint: ours, or the first ModelCheckpoint that monitors something."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return next((c for c in found if isinstance(c, BestCheckpoint)), found[0] if found else None)
