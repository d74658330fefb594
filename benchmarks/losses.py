"""Time and memory of losses and miners, forward and backward, beside pytorch-metric-learning's on the same embeddings.

    pip install -e '.[benchmarks]' && python -m benchmarks.losses              # B = 256 … 8192
    python -m benchmarks.losses --sizes 512 2048 --repetitions 3

Batches of ten classes, 128 dimensions; value and gradient of both sides must agree. The peer's column ends where its
index lists do not fit into four fifths of the free memory. Peak memory is what a call adds (Linux).
"""

import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

import pytorch_metric_learning
import torch
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning import miners

from benchmarks.common import arguments, exponent, machine, median_ratio, show
from lightning_modules.losses import (
    LMNNLoss,
    MultiNegativeLoss,
    PairwiseContrastiveLoss,
    PrototypicalLoss,
    SoftMarginTripletLoss,
    SupConLoss,
    TripletMarginLoss,
)
from lightning_modules.losses.distances import EuclideanDistance

MARGIN, CLASSES, WIDTH = 0.2, 10, 128
SPHERE = EuclideanDistance(normalize=True)


def pairs():
    """name → (ours, the peer's or None), each called as loss(z, labels)."""
    margin, soft = peers.TripletMarginLoss(MARGIN), peers.TripletMarginLoss(0, smooth_loss=True)
    semihard, hard = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard"), miners.BatchHardMiner()
    return {
        "triplet margin, all": (TripletMarginLoss("all", MARGIN, SPHERE), margin),
        "triplet margin, semihard": (
            TripletMarginLoss("semihard", MARGIN, SPHERE),
            lambda z, y: margin(z, y, semihard(z, y)),
        ),
        "triplet margin, hard": (TripletMarginLoss("hard", MARGIN, SPHERE), lambda z, y: margin(z, y, hard(z, y))),
        "triplet margin, random": (TripletMarginLoss("random", MARGIN, SPHERE), None),
        "soft margin, hard": (SoftMarginTripletLoss("hard", SPHERE), lambda z, y: soft(z, y, hard(z, y))),
        "multi-negative (its NTXentLoss)": (MultiNegativeLoss(0.1), peers.NTXentLoss(0.1)),
        "SupCon": (SupConLoss(0.1), peers.SupConLoss(0.1)),
        "pairwise contrastive": (PairwiseContrastiveLoss(0.1), None),
        "LMNN": (LMNNLoss(), None),
        "prototypical": (PrototypicalLoss(), None),
    }


def embeddings(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    return centres[labels] * 0.5 + torch.randn(size, WIDTH, generator=generator), labels


def step(loss, z: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor, float]:
    """(value, gradient, seconds) of one forward and backward."""
    z = z.clone().requires_grad_()
    start = time.perf_counter()
    value = loss(z, labels)
    value.backward()
    return float(value.detach()), z.grad, time.perf_counter() - start


def memory(name: str, file: str = "/proc/self/status") -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


def peak_mib(call) -> float | None:
    """What `call` adds to the memory held by this process, at most."""
    if sys.platform != "linux":
        call()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (proc(5))
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1024


def limit_memory() -> None:
    """Has an allocation of more than four fifths of what is free now fail, instead of the machine."""
    if sys.platform == "linux":
        import resource

        limit = 1024 * (memory("VmData") + memory("MemAvailable", "/proc/meminfo") * 4 // 5)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    options = parser.parse_args()
    limit_memory()
    rows, ours_by_size, too_large = [], {}, set()
    for size in options.sizes:
        z, labels = embeddings(size)
        step(SupConLoss(), z, labels)  # threads and buffers are made
        for name, (ours, theirs) in pairs().items():
            found = {}
            row = {"loss": name, "B": size, "added, MiB": peak_mib(lambda: found.update(ours=step(ours, z, labels)))}
            theirs = None if name in too_large else theirs
            row["theirs, MiB"] = row["largest difference"] = None
            if theirs:
                try:
                    row["theirs, MiB"] = peak_mib(lambda: found.update(theirs=step(theirs, z, labels)))
                except (RuntimeError, MemoryError) as error:
                    print(
                        f"{name}: pytorch-metric-learning does not fit at B = {size} ({str(error).splitlines()[0][:120]})"
                    )
                    too_large.add(name)
                    theirs = None
            if theirs:
                (value, gradient, _), (expected, its_gradient, _) = found["ours"], found["theirs"]
                row["largest difference"] = max(abs(value - expected), float((gradient - its_gradient).abs().max()))
            times = {"ours": [], "theirs": []}
            for _ in range(options.repetitions):
                times["ours"].append(step(ours, z, labels)[2])
                if theirs:
                    times["theirs"].append(step(theirs, z, labels)[2])
            ours_by_size.setdefault(name, {})[size] = statistics.median(times["ours"])
            row["ours, ms"] = 1e3 * ours_by_size[name][size]
            row["theirs, ms"] = 1e3 * statistics.median(times["theirs"]) if theirs else None
            row["ratio"] = median_ratio(times["theirs"], times["ours"]) if theirs else None
            rows.append(row)
    rows.sort(key=lambda row: list(ours_by_size).index(row["loss"]))
    for row in rows:
        sizes = {b: t for b, t in ours_by_size[row["loss"]].items() if b >= 512}
        row["∝ B^"] = exponent(list(sizes), list(sizes.values())) if len(sizes) > 1 else None
    print(machine(), f"pytorch-metric-learning {pytorch_metric_learning.__version__}")
    order = ["loss", "B", "ours, ms", "theirs, ms", "ratio", "added, MiB", "theirs, MiB", "largest difference", "∝ B^"]
    show([{key: row[key] for key in order} for row in rows], options.json)


if __name__ == "__main__":
    main()
