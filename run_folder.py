"""The folder of a run: what lies where, which checkpoint a name means, whole-or-nothing writing, safe reading."""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Trainer
from torch import Tensor

from errors import InputError, first_line, require

FINISHED = "finished.json"  # written when a fit has ended
STEP0, LAST, PREVIOUS = "step0.ckpt", "last.ckpt", "previous.ckpt"  # untrained; to resume from; the one before that


def write(path: Path, content: str | bytes | Callable[[BinaryIO], object], keep: str | None = None) -> None:
    """Writes a file whole or not at all, whenever the process is killed or the disk is full; text as UTF-8.

    `content` may be a function that writes into the open file. `keep`: the name that a file already there gets.
    Raises InputError where the disk is full or may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(path.with_name(keep))
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every system can open a folder, or sync one
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name too
            finally:
                os.close(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        return load_checkpoint(Path(path))


def folder_of(trainer: Trainer) -> Path | None:
    """The folder that this process writes its files into: none in a `fast_dev_run`, without a logger that has one, and
    on all processes but the first."""
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return None
    return next((Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir), None)


def shared_folder(trainer: Trainer) -> Path | None:
    """`folder_of` the first process, on every process. All of them have to call it."""
    return trainer.strategy.broadcast(folder_of(trainer))


class Run:
    """`folder` is `<runs>/version_N`. A command claims it, and discards it where it is refused before it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints, self.config = folder, folder / "checkpoints", folder / "config.yaml"
        self.step0 = self.checkpoints / STEP0
        self._made: list[Path] = []  # folders that did not exist before this command
        self._found: set[str] = set()  # what was in the folder before it

    @classmethod
    def all(cls, runs: Path) -> list["Run"]:
        """The runs in the folder `runs`, oldest first."""
        found = [p for p in runs.glob("version_*") if p.is_dir() and p.name[8:].isdigit()]
        return [cls(p) for p in sorted(found, key=lambda p: int(p.name[8:]))]

    @classmethod
    def newest(cls, runs: Path) -> "Run":
        """The newest run in `runs` whose fit has ended. Raises InputError where there is none."""
        finished = [run for run in cls.all(runs) if run.finished is not None]
        if not finished:
            raise InputError(f"{runs}: no finished run there; fit that stage first, or name a run folder or checkpoint")
        return finished[-1]

    @classmethod
    def of(cls, checkpoint: Path) -> "Run | None":
        """The run that a checkpoint file belongs to."""
        run = cls(checkpoint.parent.parent)
        return run if checkpoint.parent.name == "checkpoints" and run.config.is_file() else None

    @classmethod
    def claim(cls, parent: Path, stem: str, number: int | str | None = None) -> "Run":
        """Makes the folder `<stem>_N` in `parent`, N the next free number: of two processes that ask at once, each gets
        its own. With `number`, that folder, whether it is there or not. Raises InputError where it cannot be made."""
        taken = [int(p.name[len(stem) + 1 :]) for p in parent.glob(f"{stem}_*") if p.name[len(stem) + 1 :].isdigit()]
        n, name = max(taken, default=-1) + 1, number if isinstance(number, str) else f"{stem}_{number}"
        plain = Path(name).name == name and name not in ("", "..")
        require(number is None or plain, "trainer.logger.version", number, "the name of a folder")
        while True:
            run = cls(parent / (f"{stem}_{n}" if number is None else name))
            run._made = [p for p in (run.folder, *run.folder.parents) if not p.exists()]
            try:
                run.folder.mkdir(parents=True, exist_ok=number is not None)
                return run.resume()
            except FileExistsError:
                n += 1
            except OSError as error:
                why = f"{run.folder}: cannot be made ({error.strerror})"
                raise InputError(f"{why}; give --trainer.logger.save_dir") from error

    def resume(self) -> "Run":
        """Claims the folder as it is."""
        self._found = {path.name for path in self.folder.iterdir()}
        return self

    def discard(self) -> None:
        """Removes what this process's loggers have written since the folder was claimed, and the folder if it was made
        then. Does nothing where the command has started, that is, has written its config."""
        new = [path for path in self.folder.iterdir() if path.name not in self._found]
        if any(path.match("config*.yaml") for path in new):
            return
        for path in new:
            own = path.match(f"events.out.tfevents.*.{os.getpid()}.*")
            if own or (path.name == "hparams.yaml" and self.folder in self._made):
                path.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: another run is in it
                folder.rmdir()

    @property
    def finished(self) -> dict | None:
        """What the fit noted when it ended; None where it has not."""
        try:
            return json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # damaged, but there
            return {}

    def last(self, untrained: bool = False) -> Path:
        """The checkpoint to resume from. A damaged one is warned of, and the one before it taken; with `untrained`, the
        one of step 0 too. Raises InputError where there is none."""
        kept = [self.checkpoints / name for name in (LAST, PREVIOUS, *([STEP0] if untrained else []))]
        kept = [path for path in kept if path.is_file()]
        if not kept:
            raise InputError(
                f"{self.folder}: not a run folder with checkpoints/last.ckpt; name a checkpoint file, or fit first"
            )
        for path, following in zip(kept, [*kept[1:], None]):
            try:
                check_archive(path)
                return path
            except InputError as error:
                if following is None:
                    raise
                warnings.warn(f"{error}; {following} is used instead", stacklevel=2)

    def best(self) -> Path:
        """The best checkpoint by validation, or the last where none was. Raises InputError where it is gone."""
        best = (self.finished or {}).get("best")
        if best is None:
            last = self.last()
            states = load_checkpoint(last).get("callbacks", {})
            kept = [s for key, s in states.items() if "Checkpoint{" in key and s.get("monitor") is not None]
            best = Path(kept[0]["best_model_path"]).name if kept and kept[0]["best_model_path"] else last.name
        path = self.checkpoints / best
        if not path.is_file():
            raise InputError(f"{path}: the best checkpoint of this run is gone; name another file")
        return path


def resolve_checkpoint(path: str, runs: Path, resume: bool = False) -> Path:
    """The checkpoint file that `path` means: a file, a run folder (its best one), or `best` / `last` of the newest run
    in the folder `runs`. To `resume` a fit, a folder or `last` mean its last one, or the untrained one where the run
    got no farther. Raises InputError where there is none."""
    if path in ("best", "last"):
        found = [run for run in Run.all(runs) if run.checkpoints.is_dir()]
        if not found:
            raise InputError(
                f"--ckpt_path {path}: no run with checkpoints in {runs}; fit first, or name a file or folder"
            )
        return found[-1].best() if path == "best" else found[-1].last(untrained=resume)
    if Path(path).is_file():
        return Path(path)
    if not Path(path).is_dir():
        raise InputError(f"checkpoint {path}: no such file or run folder")
    return Run(Path(path)).last(untrained=True) if resume else Run(Path(path)).best()


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
