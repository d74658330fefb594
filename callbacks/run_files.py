"""What every run leaves besides its checkpoints: its config, its untrained weights, and a note that it has ended."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from callbacks.best_checkpoint import best_checkpoint
from run_folder import FINISHED, STEP0, folder_of, shared_folder, write


class RunFiles(SaveConfigCallback):
    """Added to every run by the command line.

    Writes `config.yaml` once a run has started, never over another one. Writes `checkpoints/step0.ckpt` before the
    first step, and `finished.json` (seconds since the trainer was made, steps, metrics, best checkpoint, peak memory)
    at the fit's end. A run that stops within an epoch (`max_steps`) is validated and saved there as at an epoch's end.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._made = time.monotonic()
        self._made_by: dict | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's callback writes here, before the run's input has been accepted."""

    def _save(self, trainer: Trainer) -> None:
        if folder := folder_of(trainer):
            names = (folder / f"config{k}.yaml" for k in ("", *(f"_{i}" for i in range(1, 10_000))))
            write(next(n for n in names if not n.exists()), self.parser.dump(self.config, skip_none=False))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if folder := folder_of(trainer):
            (folder / FINISHED).unlink(missing_ok=True)  # of the fit that is resumed
        folder = shared_folder(trainer)
        if folder is not None and trainer.checkpoint_callbacks and trainer.global_step == 0:
            trainer.save_checkpoint(folder / "checkpoints" / STEP0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._save(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """What made the checkpoint: the whole config, the packages' versions, the number of threads."""
        if self._made_by is None:  # once: a tenth of a second
            versions = {name: version(name) for name in ("torch", "pytorch-lightning", "torchmetrics", "torchvision")}
            self._made_by = {"config": self.parser.dump(self.config, skip_none=False), "versions": versions}
        checkpoint["made_by"] = {**self._made_by, "threads": torch.get_num_threads()}

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates when asked to stop, not when the steps run out

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if folder := folder_of(trainer):
            best = getattr(best_checkpoint(trainer), "best_model_path", "")
            note = {"seconds": time.monotonic() - self._made, "steps": trainer.global_step}
            note["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
            note |= {"best": Path(best).name or None, "peak_memory_mib": peak_memory()}
            write(folder / FINISHED, json.dumps(note, indent=1) + "\n")


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
