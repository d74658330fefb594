"""Finding and reading checkpoints: one resolver for the command line and for the hand-over of the encoder."""

import pickle
import zipfile
from pathlib import Path

import torch

from errors import InputError

FINISHED = "finished.json"  # written into a run's folder when its fit has ended


def run_folders(runs: Path) -> list[Path]:
    """The folders `version_N` in `runs`, oldest first."""
    found = [p for p in runs.glob("version_*") if p.is_dir() and p.name[8:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[8:]))


def newest_finished(runs: Path) -> Path:
    """The newest run in `runs` whose fit has ended. Raises InputError where there is none."""
    finished = [p for p in run_folders(runs) if (p / FINISHED).is_file()]
    if not finished:
        raise InputError(f"{runs}: no finished run there; fit that stage first, or name a run folder or checkpoint")
    return finished[-1]


def resolve_checkpoint(path: str, runs: Path, prefer: str = "best") -> Path:
    """The checkpoint file that `path` means: a file, a run folder (its `prefer` one), or `best` / `last` of the newest
    run in the folder `runs`. Raises InputError where it does not exist."""
    if path in ("best", "last"):
        with_checkpoints = [p for p in run_folders(runs) if (p / "checkpoints").is_dir()]
        if not with_checkpoints:
            raise InputError(f"--ckpt_path {path}: no run with checkpoints in {runs}; fit first, or name a file or folder")
        return _in_run(with_checkpoints[-1], path)
    if Path(path).is_file():
        return Path(path)
    if not Path(path).is_dir():
        raise InputError(f"checkpoint {path}: no such file or run folder")
    return _in_run(Path(path), prefer)


def run_folder(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint file lies in, or None."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def _in_run(run: Path, which: str) -> Path:
    last = run / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise InputError(f"{run}: not a run folder with checkpoints/last.ckpt; name a checkpoint file, or fit first")
    if which == "last":
        return last
    states = load_checkpoint(last).get("callbacks", {})
    monitors = [s for key, s in states.items() if key.startswith("ModelCheckpoint") and s["monitor"] is not None]
    best = monitors[0]["best_model_path"] if monitors else ""
    path = last.with_name(Path(best).name) if best else last
    if not path.is_file():
        raise InputError(f"{path}: the best checkpoint of this run is gone; name another file")
    return path


def load_checkpoint(path: Path) -> dict:
    """Reads a Lightning checkpoint onto the CPU, tensors and plain types only (`weights_only=True`).

    Raises InputError where the file is damaged, or is not a checkpoint with weights.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: damaged, or holds more than tensors and plain types; it is not loaded") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path}: not a Lightning checkpoint (no state_dict in it)")
    return checkpoint
