"""Training beside other busy programs: as `main.py` chooses its threads, with one thread, and with all of them.

    python -m benchmarks.busy                                # half an hour on two cores without bfloat16
    python -m benchmarks.busy --beside alone --steps 60

Images/s of `main.py fit` with configs/triplet_encoder.yaml, alone and beside one and three programs that never pause,
of equal and of lower priority. Fresh processes, in turn: the threads are chosen at a program's start.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.common import Clock, Rows, fit_with, fresh, in_turn, run, summary

NEIGHBOURS = {"alone": (0, 0), "beside one": (1, 0), "beside three": (3, 0), "beside three of lower priority": (3, 15)}
DRY_RUN = {"steps": 12}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="of every fit (default: %(default)s)")
    parser.add_argument("--beside", nargs="+", choices=NEIGHBOURS, default=list(NEIGHBOURS), help="which neighbours")


def fitted(options: argparse.Namespace, *threads: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        given = ["--trainer.accelerator=cpu", f"--trainer.max_steps={options.steps}", "--pictures=false", "--quiet"]
        size = [] if options.dry_run else ["--data.batch_size=128"]
        cli, clock = fit_with(Clock, options, "triplet_encoder", folder, *given, *size, *threads)
    return clock.rate(cli.datamodule.batch_size)


def beside(programs: int, niceness: int, options: argparse.Namespace, *threads: str) -> float:
    """Images/s of a fit in a fresh process, while so many others run."""
    loop = [sys.executable, "-c", f"import os\nos.nice({niceness})\nwhile True: pass"]
    others = [subprocess.Popen(loop) for _ in range(programs)]
    try:
        return fresh(fitted, options, *threads)
    finally:
        for other in others:
            other.kill()
            other.wait()


def rows(options: argparse.Namespace) -> Rows:
    sides, peers = {}, {}
    for where in options.beside:
        programs, niceness = NEIGHBOURS[where]
        for name, threads in (("as chosen", None), ("one thread", 1), ("all threads", os.cpu_count())):
            given = [] if threads is None else [f"--threads={threads}"]
            sides[f"{name}, {where}"] = partial(beside, programs, niceness, options, *given)
        peers[f"as chosen, {where}"] = f"{'all threads' if where == 'alone' else 'one thread'}, {where}"
    return summary(in_turn(sides, options.repetitions), "images/s", peers)


if __name__ == "__main__":
    run("benchmarks.busy")
