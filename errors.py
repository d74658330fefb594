"""What a user can mend, as one line: `main.py` and `reproduce.py` print it on stderr and exit with 2."""

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class InputError(ValueError):
    """Bad input. The message is one line that names the thing, what was expected, and what to do."""

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())  # what it quotes may have lines of its own, and be of any length
        return line if len(line) <= 1000 else f"{line[:700]} … {line[-250:]}"


def require(valid: bool, name: str, value: Any, expected: str) -> None:
    """Raises InputError unless `valid`: option `name` with its `value`, and what was `expected`."""
    if not valid:
        raise InputError(f"{name} {value}: must be {expected}")


def local_path(text: str | Path) -> Path:
    """A path of this machine, with a leading `~` and `$VARIABLE`s replaced.

    Raises InputError for a variable that is not set, and for the home of a user that there is not.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if not os.path.exists(path):  # these signs may be part of a name
        unset = re.search(r"\$(\w+|\{\w+\})", path)
        if unset is not None:
            raise InputError(f"{text}: the variable {unset[1].strip('{}')} is not set")
        if path.startswith("~"):
            raise InputError(f"{text}: there is no home of a user {Path(path).parts[0][1:]}")
    return Path(path)


def printable(text: str | Path) -> str:
    """A name as text in UTF-8: bytes that are none of any letter become escapes."""
    return str(text).encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What another library's exception says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


class OneLineParser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage; shows the description's lines as they are."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def one_line(program: str, function: Callable[[], Any]) -> int:
    """Calls `function`; an InputError becomes one line on stderr and exit code 2. DEBUG=1 shows its traceback.

    Of several processes that Lightning has started, one reports what all of them find. A sign that the output's
    encoding does not have is replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    starter = os.getppid()
    try:
        function()
    except InputError as error:
        if os.environ.get("DEBUG") == "1":
            raise
        if int(os.environ.get("LOCAL_RANK") or 0) > 0:
            for _ in range(70):  # seven seconds: the process that has started this one ends too, if it found the same
                if os.getppid() != starter:
                    return 2
                time.sleep(0.1)
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
