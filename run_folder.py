"""The folder of a run: what lies where, who has claimed it, which checkpoint a name means."""

import contextlib
import os
import warnings
from itertools import accumulate
from pathlib import Path

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger

from checkpoint_file import LAST, PREVIOUS, STEP0, check_archive, load_checkpoint
from errors import InputError, first_line, require
from files import read_json

FINISHED = "finished.json"  # written when a fit has ended


class FolderLogger(Logger):
    """Logs nothing. Tells Lightning and the callbacks a run's folder, whatever other loggers there are: none, or some
    that write elsewhere. None on all processes but the first."""

    log_dir = save_dir = None
    name = version = ""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        if folder is not None:
            self.log_dir, self.save_dir = str(folder), str(folder.parent.parent)
            self.name, self.version = folder.parent.name, folder.name

    def log_metrics(self, *args, **kwargs) -> None:
        pass

    log_hyperparams = log_metrics


def folder_of(trainer: Trainer) -> Path | None:
    """The folder that this process writes its files into: none in a `fast_dev_run`, without a logger that has one, and
    on all processes but the first."""
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return None
    folders = [logger.log_dir for logger in trainer.loggers if logger.log_dir]
    return Path(folders[-1]) if folders else None  # the last one: FolderLogger's, where there is one


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
        """The runs in the folder `runs`, oldest first: those of a number by it, those of another name by their time. A
        copy such as `version_0_backup` is none."""
        folders = [p for p in runs.glob("*") if p.is_dir()]
        numbered = [p for p in folders if p.name.startswith("version_") and p.name[8:].isdigit()]
        numbered.sort(key=lambda p: int(p.name[8:]))
        times = accumulate((cls(p).started for p in numbered), max)  # a copied folder's may be in any order
        named = [p for p in folders if not p.name.startswith("version_") and (p / "checkpoints").is_dir()]
        dated = [*((cls(p).started, p) for p in named), *zip(times, numbered)]
        return [cls(p) for _, p in sorted(dated, key=lambda pair: pair[0])]

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
        made = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                run = cls(parent / (f"{stem}_{n}" if number is None else name))
                run._made = made if run.folder.exists() else [run.folder, *made]
                try:
                    run.folder.mkdir(exist_ok=number is not None)
                    return run.resume()
                except FileExistsError:
                    if number is not None:
                        raise
                    n += 1
        except OSError as error:
            why = f"{parent / (name if number is not None else stem)}: cannot be made ({first_line(error)})"
            raise InputError(f"{why}; give another --trainer.logger.save_dir") from error

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
    def started(self) -> float:
        """When its newest fit started, in seconds since 1970; 0 where nothing says so."""
        times = [0.0]
        for path in self.folder.glob("config*.yaml"):
            with contextlib.suppress(OSError):  # another command has just discarded its folder
                times.append(path.stat().st_mtime)
        return max(times)

    @property
    def finished(self) -> dict | None:
        """What the fit noted when it ended; None where it has not."""
        if not (self.folder / FINISHED).exists():
            return None
        try:
            return read_json(self.folder / FINISHED)
        except InputError:  # damaged, but there
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
        if not isinstance(best, str):
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
