"""A TensorBoard logger whose run folder appears only once a run really starts."""

from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment


class RunLogger(TensorBoardLogger):
    """Writes to `<save_dir>/<name>/version_N`.

    Lightning asks for the event file before the data has been read; here it does not exist until `start`, which RunFiles
    calls once data, encoder and checkpoint have been accepted, or the first metrics. A refused run leaves nothing.

    Args:
        save_dir: folder of all runs.
        name: the stage's folder in it.
        version: N; null for the next free one.
    """

    def __init__(self, save_dir: str = "runs", name: str = "run", version: int | None = None) -> None:
        super().__init__(save_dir, name=name, version=version, default_hp_metric=False)
        self._started, self._waiting = False, []

    def write_into(self, folder: Path) -> None:
        """Uses `folder` (…/<name>/<version>) instead of the next free version."""
        self._root_dir, self._name, self._version = str(folder.parent.parent), folder.parent.name, folder.name

    @property
    @rank_zero_experiment
    def experiment(self):
        if not self._started:
            raise AttributeError("the run has not started")  # hasattr(logger, "experiment") is False until then
        return super().experiment

    def start(self) -> None:
        """Has the run's folder made, with what was logged before."""
        self._started = True
        waiting, self._waiting = self._waiting, []  # what is logged along with them comes back here
        for args, kwargs in waiting:
            super().log_hyperparams(*args, **kwargs)

    def log_hyperparams(self, *args, **kwargs) -> None:
        self._waiting.append((args, kwargs))  # Lightning's call comes before it restores a checkpoint
        if self._started:
            self.start()

    def log_metrics(self, *args, **kwargs) -> None:
        self.start()
        super().log_metrics(*args, **kwargs)

    def save(self) -> None:
        if self._started:
            super().save()
