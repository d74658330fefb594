"""Where the options of a command say that its files lie."""

import re
from pathlib import Path

from jsonargparse import Namespace
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from errors import local_path, require

RUNS = "runs"
PATHS = ("ckpt_path", "save_dir", "default_root_dir", "dirpath", "run")


def expand_paths(config: Namespace) -> None:
    """Expands `~` and `$VARIABLE` in every option that names a file or folder. The data's modules do so themselves."""
    for key, value in list(config.items()):
        for spec in value if isinstance(value, list) else ():
            if isinstance(spec, Namespace):
                expand_paths(spec)
        if key.rsplit(".", 1)[-1] in PATHS and isinstance(value, str | Path) and value not in ("best", "last"):
            config[key] = str(local_path(value))


def runs_folder(config: Namespace) -> Path:
    """`<save_dir>/<name>` of the first logger that is given a save_dir; without one, in `default_root_dir` or `runs`.
    The name defaults to the model's class, in snake case, or `label_free_encoder`. The class of an encoder that nobody
    trains comes before it."""
    named = [spec.init_args for spec in specs(config.trainer.logger) if spec.init_args.get("save_dir")]
    named.sort(key=lambda options: options.save_dir == RUNS)  # one that was given comes before the default
    logger, root = named[0] if named else {}, config.trainer.default_root_dir
    name, model = logger.get("name"), config.model.class_path.rsplit(".", 1)[-1]
    if name in (None, "lightning_logs"):  # Lightning's default
        name = snake_case(model)
        if name == "triplet_encoder" and config.model.init_args.get("positives") == "view":
            name = "label_free_encoder"
        if (encoder := config.frozen_encoder.encoder) is not None:
            name = f"{snake_case(encoder.class_path.rsplit('.', 1)[-1])}_{name}"
    folder = logger.get("save_dir") or RUNS
    folder = root if root is not None and folder == RUNS else folder
    require("://" not in str(folder), "trainer.logger.save_dir", folder, "a folder of this machine's file system")
    return Path(folder) / name


def write_into(folder: Path, logger: Logger, spec: Namespace | None) -> Logger:
    """The same logger for `folder`, where it is one that writes files. CSVLogger, which deletes what was in its folder
    before, gets a new one in there each time."""
    if isinstance(logger, TensorBoardLogger):
        place = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    elif isinstance(logger, CSVLogger):
        place = {"save_dir": str(folder), "name": "csv", "version": None}
    else:
        return logger
    return type(logger)(**{**({} if spec is None else spec.init_args.as_dict()), **place})


def specs(value: list | Namespace | bool | None) -> list[Namespace]:
    """The classes with their options that a config's key names, of which it may hold one or a list."""
    return [spec for spec in (value if isinstance(value, list) else [value]) if hasattr(spec, "class_path")]


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
