"""How many threads to compute with beside other programs.

OpenMP's threads wait for each other after every operation. Where another program takes one of their cores for a while,
all of them wait, and two threads are slower than one. So a process looks once, at its start, how much of the machine
others use, and leaves that to them.
"""

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

LEAST = 0.5  # seconds that a reading covers
OWN_CHOICE = ("OMP_", "GOMP_", "MKL_")  # not KMP_: scikit-learn sets two of those when it is imported


class Reading(NamedTuple):
    """A moment, and the seconds of CPU time used until then, by all programs on our CPUs and by this process alone."""

    at: float
    everyone: float
    own: float


def read() -> Reading | None:
    """Now; None where the system does not say (only Linux does)."""
    if not Path("/proc/stat").exists():
        return None
    ours = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, …, in hundredths of a second
    busy = sum(int(row[i]) for row in rows if row[0] in ours for i in (1, 2, 3, 6, 7))
    return Reading(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))


def leave_room(default: int, cpus: int, others: float) -> int:
    """Threads, at least 1 and at most `default`, beside programs that use `others` of the `cpus`."""
    return max(1, min(default, math.floor(cpus - others + 0.5)))


@cache
def chosen(before: Reading | None) -> int | None:
    """The number of threads, with a line, where it is to be below PyTorch's own; None where that stays.

    `before` is this process's first reading, or None where the user has decided.
    """
    import torch

    default = torch.get_num_threads()
    if before is None:
        return None
    time.sleep(max(0.0, LEAST - (time.monotonic() - before.at)))
    if (after := read()) is None:
        return None
    cpus = len(os.sched_getaffinity(0))
    others = (after.everyone - before.everyone - (after.own - before.own)) / (after.at - before.at)
    count = leave_room(default, cpus, others)
    if count == default:
        return None
    print(f"threads: {count} of {default}, since other programs use {others:.1f} of {cpus} CPUs; --threads N decides")
    return count


@cache
def first_reading() -> Reading | None:
    """This process's, taken when it is first asked for: before it has imported anything that takes long.

    None where the user has set the threads by the environment.
    """
    return None if any(name.startswith(OWN_CHOICE) for name in os.environ) else read()
