"""How long a command takes before it works, beside the import of pytorch_lightning alone: whole processes, in turn.

python -m benchmarks.startup
"""

import argparse
import subprocess
import sys
from functools import partial

from benchmarks.common import ROOT, Rows, in_turn, run, seconds, summary


def rows(options: argparse.Namespace) -> Rows:
    main, config = str(ROOT / "main.py"), str(ROOT / "configs" / "softmax_regression.yaml")
    commands = {
        "import pytorch_lightning": ["-c", "import pytorch_lightning"],
        "main.py --version": [main, "--version"],
        "main.py --help": [main, "--help"],
        "main.py fit --print_config": [main, "fit", "--config", config, "--print_config"],
    }

    def measure(command: list[str]) -> float:
        return seconds(lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True))

    found = in_turn({name: partial(measure, command) for name, command in commands.items()}, options.repetitions)
    return summary(found, "s", dict.fromkeys(found, "import pytorch_lightning"))


if __name__ == "__main__":
    run("benchmarks.startup")
