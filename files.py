"""Files that are whole or not there, whenever the process is killed or the disk is full."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from errors import InputError, first_line, require


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
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
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


def read_json(path: Path) -> dict:
    """Reads an object from a JSON file. Raises InputError where it is damaged or may not be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or not readable ({first_line(error)}); remove it") from error
    require(isinstance(found, dict), f"{path}:", str(found)[:80], "a JSON object; remove it")
    return found
