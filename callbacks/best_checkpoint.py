"""The checkpoint of the best validation."""

from typing import Literal

from pytorch_lightning.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with this project's settings: one file, written after a validation.

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
