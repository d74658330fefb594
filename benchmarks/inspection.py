"""What looking costs: the share of the default encoder's fit that its monitors and pictures take, and their event file.

    python -m benchmarks.inspection                        # a whole fit of configs/triplet_encoder.yaml
    python -m benchmarks.inspection --epochs 2

Lightning's SimpleProfiler times every call of every callback; the seconds of one fit, not compared with another's.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

from callbacks.checkpoints import FINISHED

from benchmarks.common import arguments, machine, show
from main import main as command

CONFIG = Path(__file__).parent.parent / "configs" / "triplet_encoder.yaml"
LOOKING = ("Curves", "TrainingMonitor", "TSNE", "MiningMonitor", "RetrievalMonitor", "PredictionWriter", "Progress")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, help="of the fit (default: the config's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--data.root={options.data_dir}", f"--trainer.logger.save_dir={folder}"]
        given += [f"--trainer.max_epochs={options.epochs}"] if options.epochs else []
        trainer = command(["fit", "--config", str(CONFIG), *given, "--trainer.profiler=SimpleProfiler"]).trainer
        run = Path(trainer.logger.log_dir)
        whole = json.loads((run / FINISHED).read_text())["seconds"]
        events = sum(file.stat().st_size for file in run.glob("events*")) / 2**20
    seconds: dict[str, float] = defaultdict(float)
    for action, durations in trainer.profiler.recorded_durations.items():
        if action.startswith("[Callback]"):
            seconds[action.removeprefix("[Callback]").split(".")[0].split("{")[0]] += sum(durations)
    rows = [
        {"": name, "seconds": seconds[name], "of the fit": seconds[name] / whole} for name in LOOKING if name in seconds
    ]
    total = sum(row["seconds"] for row in rows)
    rows += [
        {"": "all of these", "seconds": total, "of the fit": total / whole},
        {"": "the fit", "seconds": whole, "of the fit": 1.0},
    ]
    print(machine(), trainer.precision, f"event file {events:.1f} MiB")
    show(rows, options.json)


if __name__ == "__main__":
    main()
