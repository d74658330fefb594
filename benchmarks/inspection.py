"""What looking costs: the share of the default encoder's fit that its monitors and figures take, and their event file.

    python -m benchmarks.inspection
    python -m benchmarks.inspection --short          # on digits: 60 epochs of a second, on two cores with bf16

Lightning's SimpleProfiler times every call of every callback in a whole fit of configs/triplet_encoder.yaml. The shares
are of the seconds of that one fit, not compared with another's.
"""

import argparse
import gc
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.common import Rows, fit, run
from run_folder import Run

LOOKING = ("Curves", "TrainingMonitor", "TSNE", "MiningMonitor", "RetrievalMonitor", "PredictionWriter", "Progress")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--short", action="store_true", help="a fit of short epochs")


def rows(options: argparse.Namespace) -> Rows:
    size = "--data.val_size=157", "--data.batch_size=128", "--trainer.max_epochs=60"
    short = ["--data=DigitsDataModule", *size] if options.short else []
    gc.freeze()  # as main.py does where it starts
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(options, "triplet_encoder", folder, "--trainer.profiler=SimpleProfiler", *short).trainer
        run_folder = Path(trainer.log_dir)
        whole = Run(run_folder).finished["seconds"]
        events = sum(file.stat().st_size for file in run_folder.glob("events*")) / 2**20
    spent: dict[str, float] = defaultdict(float)
    for action, durations in trainer.profiler.recorded_durations.items():
        if action.startswith("[Callback]"):
            spent[action.removeprefix("[Callback]").split(".")[0].split("{")[0]] += sum(durations)
    spent = {name: spent[name] for name in LOOKING if name in spent}
    spent |= {"all of these": sum(spent.values()), f"the fit, {trainer.precision}": whole}
    found = [{"name": name, "value": s, "unit": "s", "of the fit": s / whole} for name, s in spent.items()]
    return [*found, {"name": "event file", "value": events, "unit": "MiB"}]


if __name__ == "__main__":
    run("benchmarks.inspection")
