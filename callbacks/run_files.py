"""What every run leaves besides its checkpoints: its config, its untrained weights, and a note that it has ended."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from callbacks.checkpoints import FINISHED, STEP0
from callbacks.run_logger import RunLogger


class RunFiles(SaveConfigCallback):
    """Added to every run by the command line.

    Writes `config.yaml` once a run has started, never over another one; `checkpoints/step0.ckpt` before the first
    step; `finished.json` (seconds since the trainer was made, metrics, peak memory) when the fit has ended. Has the last step
    of a run that stops within an epoch (`max_steps`) validated and saved like an epoch's last.

    `started` is False until data, encoder and checkpoint have been accepted and the first file is due.
    """

    started = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._made = time.monotonic()
        self._made_by: dict | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's callback writes here, before the run's input has been accepted."""

    def _save(self, trainer: Trainer) -> None:
        self.started = True
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.start()
        if trainer.is_global_zero and trainer.logger:
            folder = Path(trainer.logger.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            names = (folder / f"config{k}.yaml" for k in ("", *(f"_{i}" for i in range(1, 10_000))))
            self.parser.save(self.config, next(n for n in names if not n.exists()), skip_none=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if trainer.logger and trainer.global_step == 0:
            trainer.save_checkpoint(Path(trainer.log_dir) / "checkpoints" / STEP0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._save(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """What made the checkpoint: the whole config and the packages' versions."""
        if self._made_by is None:  # once: a tenth of a second
            versions = {name: version(name) for name in ("torch", "pytorch-lightning", "torchmetrics", "torchvision")}
            self._made_by = {"config": self.parser.dump(self.config, skip_none=False), "versions": versions}
        checkpoint["made_by"] = self._made_by

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates when asked to stop, not when the steps run out

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.logger:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
            note = {"seconds": time.monotonic() - self._made, "steps": trainer.global_step, "metrics": metrics}
            note["peak_memory_mib"] = peak_memory()
            (Path(trainer.logger.log_dir) / FINISHED).write_text(json.dumps(note, indent=1) + "\n")


def peak_memory() -> dict[str, float]:
    """The most that this process has held so far, in MiB: of main memory, and of each GPU that it has used."""
    peaks = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["main memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks |= {f"cuda:{i}": torch.cuda.max_memory_reserved(i) / 2**20 for i in range(torch.cuda.device_count())}
    return {name: round(mib, 1) for name, mib in peaks.items() if mib}
