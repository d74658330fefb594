"""The one exception for what a user can mend: `main.py` and `reproduce.py` print it as one line and exit with 2."""


class InputError(ValueError):
    """Bad input. The message is one line that names the thing, what was expected, and what to do."""
