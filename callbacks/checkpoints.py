"""Finding, reading and writing checkpoints: one resolver for the command line and for the hand-over of the encoder."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from errors import InputError, first_line

FINISHED = "finished.json"  # written into a run's folder when its fit has ended
STEP0, LAST, PREVIOUS = "step0.ckpt", "last.ckpt", "previous.ckpt"  # untrained; to go on from; the one before that


def write_atomically(path: Path, write) -> None:
    """Calls `write(file)` with a binary file that takes the place of `path` once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is written whole or not at all, whenever the process is killed or the disk is full."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError where the disk is full
            raise InputError(
                f"{path}: the checkpoint cannot be written ({first_line(error)}); earlier ones are intact: make room and"
                " go on with --ckpt_path last"
            ) from error


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
    run in the folder `runs`; `start`, for a fit that goes on: `last`, or the untrained one where a run did not get
    farther. A damaged last checkpoint is warned of, and the one before it taken. Raises InputError where there is none."""
    if path in ("best", "last"):
        with_checkpoints = [p for p in run_folders(runs) if (p / "checkpoints").is_dir()]
        if not with_checkpoints:
            raise InputError(
                f"--ckpt_path {path}: no run with checkpoints in {runs}; fit first, or name a file or folder"
            )
        return _in_run(with_checkpoints[-1], "start" if (path, prefer) == ("last", "start") else path)
    if Path(path).is_file():
        return Path(path)
    if not Path(path).is_dir():
        raise InputError(f"checkpoint {path}: no such file or run folder")
    return _in_run(Path(path), prefer)


def run_folder(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint file lies in, or None."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def _in_run(run: Path, which: str) -> Path:
    kept = [run / "checkpoints" / name for name in ((LAST, PREVIOUS, STEP0) if which == "start" else (LAST, PREVIOUS))]
    kept = [path for path in kept if path.is_file()]
    if not kept:
        raise InputError(f"{run}: not a run folder with checkpoints/last.ckpt; name a checkpoint file, or fit first")
    while True:
        last = kept.pop(0)
        try:
            states = load_checkpoint(last).get("callbacks", {})
            break
        except InputError as error:
            if not kept:
                raise
            warnings.warn(f"{error}; {kept[0]} is used instead", stacklevel=2)
    if which != "best":
        return last
    monitors = [s for key, s in states.items() if key.startswith("ModelCheckpoint") and s["monitor"] is not None]
    best = monitors[0]["best_model_path"] if monitors else ""
    path = run / "checkpoints" / Path(best).name if best else last
    if not path.is_file():
        raise InputError(f"{path}: the best checkpoint of this run is gone; name another file")
    return path


def load_checkpoint(path: Path) -> dict:
    """Reads a Lightning checkpoint onto the CPU, tensors and plain types only (`weights_only=True`).

    Raises InputError where the file is damaged, claims more than it holds, or is not a checkpoint with weights.
    """
    try:
        # torch.save stores without compression: what unpacks to more than the file's size is made to fill the memory.
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise InputError(f"{path}: claims to hold more than the file's size; it is not loaded")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of storage that no checkpoint of ours has
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: damaged, or holds more than tensors and plain types; it is not loaded") from error
    except Exception as error:  # of whatever kind a damaged pickle leads torch's reader to
        raise InputError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path}: not a Lightning checkpoint (no state_dict in it)")
    for name, tensor in checkpoint["state_dict"].items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise InputError(f"{path}: its state_dict holds more than plain tensors ({str(name)[:80]}); fit again")
    if not _are_counts(checkpoint.get("loops", {})):
        raise InputError(f"{path}: its loops hold more than numbers of steps; fit again")
    return checkpoint


def _are_counts(value) -> bool:
    """Whether nested dicts and lists hold nothing but whole numbers from 0 on, which Lightning takes as they come."""
    if isinstance(value, dict | list):
        return all(map(_are_counts, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and 0 <= value < 2**63
