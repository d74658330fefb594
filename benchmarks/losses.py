"""Time and memory of losses and miners, forward and backward, beside pytorch-metric-learning's on the same embeddings.

    pip install -e '.[benchmarks]' && python -m benchmarks.losses              # B = 512 and 2048, then 4096 alone
    python -m benchmarks.losses --sizes 256 512 --repetitions 5

Prints a table of medians over alternating repetitions and their ratio, checks that value and gradient agree, and
writes it as JSON with --json FILE. The peer is left out (–) where its index lists exceed --limit triplets.
"""

import argparse
import json
import platform
import resource
import statistics
import time

import pytorch_metric_learning
import torch
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning import miners

from benchmarks.common import exponent
from lightning_modules.distances import EuclideanDistance
from lightning_modules.losses import SupConLoss, TripletMarginLoss

MARGIN, CLASSES, WIDTH = 0.2, 10, 128


def pairs():
    """name → (ours, the peer's), each called as loss(z, labels)."""
    sphere, theirs = EuclideanDistance(normalize=True), peers.TripletMarginLoss(MARGIN)
    semihard, hard = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard"), miners.BatchHardMiner()
    return {
        "triplet margin, all": (TripletMarginLoss("all", MARGIN, sphere), theirs),
        "triplet margin, semihard": (
            TripletMarginLoss("semihard", MARGIN, sphere),
            lambda z, y: theirs(z, y, semihard(z, y)),
        ),
        "triplet margin, hard": (TripletMarginLoss("hard", MARGIN, sphere), lambda z, y: theirs(z, y, hard(z, y))),
        "SupCon": (SupConLoss(0.1), peers.SupConLoss(0.1)),
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


def compare(size: int, repetitions: int, limit: float) -> list[dict]:
    z, labels = embeddings(size)
    triplets = size**3 / CLASSES * (1 - 1 / CLASSES)
    rows = []
    for name, (ours, theirs) in pairs().items():
        # The peer lists every triplet; batch-hard and SupCon work on the matrix as ours do.
        fits = triplets <= limit or name in ("triplet margin, hard", "SupCon")
        difference = None
        if fits:
            (value, gradient, _), (expected, expected_gradient, _) = step(ours, z, labels), step(theirs, z, labels)
            difference = max(abs(value - expected), float((gradient - expected_gradient).abs().max()))
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(repetitions):
            times["ours"].append(step(ours, z, labels)[2])
            if fits:
                times["peer"].append(step(theirs, z, labels)[2])
        seconds = {who: statistics.median(t) if t else None for who, t in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["peer"])) if fits else None
        rows.append({"loss": name, "batch": size, **seconds, "ratio": ratio, "difference": difference})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--limit", type=float, default=2e7, help="triplets that the peer may list (default: %(default).0e)")
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args()

    versions = f"torch {torch.__version__}, pytorch-metric-learning {pytorch_metric_learning.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {platform.machine()}; forward + backward, {WIDTH} dimensions")
    print("| loss | B | ours, ms | peer, ms | peer / ours | largest difference | peak memory added, MiB |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for size in options.sizes:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for row in compare(size, options.repetitions, options.limit):
            row["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            rows.append(row)
            peer = "– | – | –"
            if row["peer"] is not None:
                peer = f"{row['peer'] * 1e3:.1f} | {row['ratio']:.1f} | {row['difference']:.1e}"
            print(f"| {row['loss']} | {size} | {row['ours'] * 1e3:.1f} | {peer} | {row['peak_mib']:.0f} |", flush=True)
    sizes = [b for b in options.sizes if b >= 512]
    if len(sizes) > 1:
        for name in pairs():
            milliseconds = [row["ours"] for row in rows if row["loss"] == name and row["batch"] in sizes]
            print(f"| {name} | {min(sizes)}–{max(sizes)} | ∝ B^{exponent(sizes, milliseconds):.2f} | – | – | – | – |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
