"""Checkpoint files: written whole, and read safely wherever they come from."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from errors import InputError, first_line
from files import write

STEP0, LAST, PREVIOUS = "step0.ckpt", "last.ckpt", "previous.ckpt"  # untrained; to resume from; the one before that


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints by `load_checkpoint` and `write`."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        try:
            write(path, lambda file: torch.save(checkpoint, file), keep=PREVIOUS if path.name == LAST else None)
        except (InputError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
            cause = first_line(error.__cause__ or error)
            why = f"{path}: the checkpoint cannot be written ({cause}); earlier ones are intact"
            raise InputError(f"{why}: make room and resume with --ckpt_path last") from error

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = None) -> dict:
        if Path(path).name == ".temp.ckpt":  # the weights that a process of `ddp_spawn` hands back
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_checkpoint(Path(path))


def check_archive(path: Path) -> None:
    """Raises InputError where a checkpoint file is damaged: a byte differs from its checksum, or it claims too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save stores without compression: what unpacks to more than the file's size is made to fill memory.
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise InputError(f"{path}: claims to hold more than the file's size; it is not loaded")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: damaged ({damaged} differs from its checksum)")
    except InputError:
        raise
    except Exception as error:  # of whatever kind damaged bytes lead zipfile to
        raise InputError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error


def load_checkpoint(path: Path) -> dict:
    """Reads a Lightning checkpoint onto the CPU, tensors and plain types only (`weights_only=True`).

    Raises InputError where the file is damaged, claims more than it holds, or is not a checkpoint with weights.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of storage that no checkpoint of ours has
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
    return checkpoint
