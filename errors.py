"""What a user can mend, as one line: `main.py` and `reproduce.py` print it on stderr and exit with 2."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
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
    """Calls `function`; an InputError becomes one line on stderr and exit code 2. DEBUG=1 shows its traceback."""
    try:
        function()
    except InputError as error:
        if os.environ.get("DEBUG") == "1":
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
