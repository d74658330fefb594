"""What every run leaves besides its checkpoints: its config, its untrained weights, and a note that it has ended."""

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from callbacks.best_checkpoint import best_checkpoint
from checkpoint_file import STEP0
from files import write
from run_folder import FINISHED, folder_of, shared_folder


class RunFiles(SaveConfigCallback):
    """Added to every run by the command line.

    Writes `config.yaml` once a run has started, never over another one. Writes `checkpoints/step0.ckpt` before the
    first step, and `finished.json` (seconds since the trainer was made, those of a resumed fit's earlier parts added;
    steps, metrics, best checkpoint, peak memory) at the fit's end. A run that stops within an epoch (`max_steps`) is
    validated and saved there as at an epoch's end. A resumed fit prints which options differ from the checkpoint's.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._made = time.monotonic()
        self._made_by: dict | None = None
        self._earlier: dict = {}  # what made the checkpoint that is resumed from

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
            if isinstance(before := self._earlier.get("config"), str):
                if changed := differences(before, self.parser.dump(self.config, skip_none=False)):
                    print(f"changed since the checkpoint: {', '.join(changed)}")
        folder = shared_folder(trainer)
        if folder is not None and trainer.checkpoint_callbacks and trainer.global_step == 0:
            trainer.save_checkpoint(folder / "checkpoints" / STEP0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._save(trainer)

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """What made the checkpoint: the whole config, the packages' versions, the number of threads."""
        if self._made_by is None:  # once: a tenth of a second
            versions = {name: version(name) for name in ("torch", "pytorch-lightning", "torchmetrics", "torchvision")}
            self._made_by = {"config": self.parser.dump(self.config, skip_none=False), "versions": versions}
        checkpoint["made_by"] = {**self._made_by, "threads": torch.get_num_threads(), "seconds": self._seconds()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if trainer.state.fn == "fit" and isinstance(checkpoint.get("made_by"), dict):
            self._earlier = checkpoint["made_by"]

    def _seconds(self) -> float:
        before = self._earlier.get("seconds")
        return time.monotonic() - self._made + (before if isinstance(before, float) else 0.0)

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates when asked to stop, not when the steps run out

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if folder is not None and (folder / FINISHED).exists():
            print(f"nothing is left to train: the fit ended at step {trainer.global_step}; raise --trainer.max_epochs")
        elif folder is not None and trainer.global_step:
            best = getattr(best_checkpoint(trainer), "best_model_path", "")
            note = {"seconds": self._seconds(), "steps": trainer.global_step}
            note["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
            note |= {"best": Path(best).name or None, "peak_memory_mib": peak_memory()}
            write(folder / FINISHED, json.dumps(note, indent=1) + "\n")


def differences(before: str, now: str) -> list[str]:
    """The options of model, data, trainer and seed that differ between two configs in YAML, as `name old → new`."""
    try:
        old, new = (dict(flat(yaml.safe_load(text))) for text in (before, now))
    except (yaml.YAMLError, RecursionError):  # a checkpoint may hold any text
        return []
    kept = ("model", "data", "trainer", "seed_everything", "frozen_encoder")
    names = [k for k in {**old, **new} if k.startswith(kept) and not k.startswith("trainer.logger")]
    return [f"{k} {old.get(k)} → {new.get(k)}" for k in names if old.get(k) != new.get(k)]


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name, as the command line spells them."""
    if not isinstance(config, dict):
        yield prefix, config
        return
    for key, value in config.items():
        yield from flat(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip("."))


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
