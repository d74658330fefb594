"""How long a command takes before it works, beside the import of pytorch_lightning alone: whole processes, in turn.

python -m benchmarks.startup
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import arguments, in_turn, machine, median_ratio, show

MAIN, CONFIGS = Path(__file__).parent.parent / "main.py", Path(__file__).parent.parent / "configs"


def main() -> None:
    options = arguments(__doc__).parse_args()
    config = ["--config", str(CONFIGS / "softmax_regression.yaml"), "--data=DigitsDataModule"]
    with tempfile.TemporaryDirectory() as folder:
        step = [
            *config,
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=0",
            f"--trainer.logger.save_dir={folder}",
        ]
        commands = {
            "import pytorch_lightning": ["-c", "import pytorch_lightning"],
            "main.py --version": [str(MAIN), "--version"],
            "main.py --help": [str(MAIN), "--help"],
            "main.py fit --print_config": [str(MAIN), "fit", *config, "--print_config"],
            "main.py fit, one step, its run written": [str(MAIN), "fit", *step],
        }

        def measure(command: list[str]) -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            return time.perf_counter() - start

        seconds = in_turn({name: (lambda c=c: measure(c)) for name, c in commands.items()}, options.repetitions)
    base = seconds["import pytorch_lightning"]
    rows = [
        {"": name, "seconds": statistics.median(s), "÷ the import": median_ratio(s, base)}
        for name, s in seconds.items()
    ]
    print(machine())
    show(rows, options.json)


if __name__ == "__main__":
    main()
