"""Time and memory of losses and miners, forward and backward, beside pytorch-metric-learning's on the same embeddings.

    pip install -e '.[benchmarks]' && python -m benchmarks.losses              # B = 256 … 8192

Batches of ten classes, 128 dimensions; value and gradient of both sides must agree. The peer's column ends where its
index lists do not fit into four fifths of the free memory. Peak memory is what a call adds (Linux).
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning import miners

from benchmarks.common import Rows, clusters, exponent, in_turn, median_ratio, run
from lightning_modules import losses
from lightning_modules.losses.distances import EuclideanDistance

MARGIN = 0.2
SPHERE = EuclideanDistance(normalize=True)
DRY_RUN = {"sizes": [64]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])


def pairs() -> dict:
    """name → (ours, the peer's or None), each called as loss(z, labels)."""
    margin, soft = peers.TripletMarginLoss(MARGIN), peers.TripletMarginLoss(0, smooth_loss=True)
    semihard, hard = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard"), miners.BatchHardMiner()
    ours = partial(losses.TripletMarginLoss, margin=MARGIN, distance=SPHERE)
    return {
        "triplet margin, all": (ours("all"), margin),
        "triplet margin, semihard": (ours("semihard"), lambda z, y: margin(z, y, semihard(z, y))),
        "triplet margin, hard": (ours("hard"), lambda z, y: margin(z, y, hard(z, y))),
        "triplet margin, random": (ours("random"), None),
        "soft margin, hard": (losses.SoftMarginTripletLoss("hard", SPHERE), lambda z, y: soft(z, y, hard(z, y))),
        "multi-negative (its NTXentLoss)": (losses.MultiNegativeLoss(0.1), peers.NTXentLoss(0.1)),
        "SupCon": (losses.SupConLoss(0.1), peers.SupConLoss(0.1)),
        "pairwise contrastive": (losses.PairwiseContrastiveLoss(0.1), None),
        "LMNN": (losses.LMNNLoss(), None),
        "prototypical": (losses.PrototypicalLoss(), None),
    }


def step(loss, z: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor, float]:
    """(value, gradient, seconds) of one forward and backward."""
    z = z.clone().requires_grad_()
    start = time.perf_counter()
    value = loss(z, labels)
    value.backward()
    return float(value.detach()), z.grad, time.perf_counter() - start


def memory(name: str, file: str = "/proc/self/status") -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


def with_peak(call) -> tuple:
    """What `call` returns, and the MiB that it adds to the memory held by this process, at most."""
    if sys.platform != "linux":
        return call(), None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (proc(5))
    before = memory("VmRSS")
    return call(), (memory("VmHWM") - before) / 1024


def limit_memory() -> None:
    """Lets an allocation of more than four fifths of what is free now fail, instead of the machine."""
    if sys.platform == "linux":
        import resource

        limit = 1024 * (memory("VmData") + memory("MemAvailable", "/proc/meminfo") * 4 // 5)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def compare(name: str, ours, theirs, size: int, repetitions: int) -> dict:
    """The row of a loss at a batch size."""
    z, labels = clusters(size, 128, apart=0.5)
    (value, gradient, _), added = with_peak(lambda: step(ours, z, labels))
    row = {"name": name, "B": size, "value": None, "unit": "ms", "theirs": None, "ratio": None, "added, MiB": added}
    sides = {"ours": lambda: step(ours, z, labels)[2]}
    if theirs:
        try:
            (expected, its_gradient, _), row["theirs, MiB"] = with_peak(lambda: step(theirs, z, labels))
            row["largest difference"] = max(abs(value - expected), float((gradient - its_gradient).abs().max()))
            sides["theirs"] = lambda: step(theirs, z, labels)[2]
        except (RuntimeError, MemoryError):
            row["theirs"] = "does not fit"
    times = in_turn(sides, repetitions)
    row["value"] = 1e3 * statistics.median(times["ours"])
    if "theirs" in times:
        row["theirs"] = 1e3 * statistics.median(times["theirs"])
        row["ratio"] = median_ratio(times["theirs"], times["ours"])
    return row


def rows(options: argparse.Namespace) -> Rows:
    limit_memory()
    step(losses.SupConLoss(), *clusters(512, 128, apart=0.5))  # threads and buffers are made
    found = []
    for name, (ours, theirs) in pairs().items():
        of_loss = []
        for size in options.sizes:
            of_loss.append(compare(name, ours, theirs, size, options.repetitions))
            theirs = None if of_loss[-1]["theirs"] == "does not fit" else theirs
        large = {row["B"]: row["value"] for row in of_loss if row["B"] >= 512}
        slope = exponent(list(large), list(large.values())) if len(large) > 1 else None
        found += [{**row, "∝ B^": slope} for row in of_loss]
    return found


if __name__ == "__main__":
    run("benchmarks.losses")
