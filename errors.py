"""The one exception for what a user can mend: `main.py` and `reproduce.py` print it as one line and exit with 2."""


class InputError(ValueError):
    """Bad input. The message is one line that names the thing, what was expected, and what to do."""

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())  # what it quotes may have lines of its own, and be of any length
        return line if len(line) <= 1000 else f"{line[:700]} … {line[-250:]}"


def first_line(error: Exception) -> str:
    """What another library's exception says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
