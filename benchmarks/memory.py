"""Training steps with and without `main.keep_freed_memory`, glibc's default being the peer.

    python -m benchmarks.memory                    # the default encoder; 5 pairs of fresh processes, alternating

Prints images/s of forward, backward and optimiser step on a batch already in place, page faults and peak memory, as
medians over the processes, and the ratio of the rates.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from lightning_modules import FastEncoder, PrototypicalLoss, TripletEncoder
from main import keep_freed_memory

BATCH, WARMUP, STEPS = 256, 5, 25


def measure() -> None:
    """Prints images/s, page faults a step and peak MiB of this process."""
    torch.manual_seed(0)
    model = TripletEncoder(FastEncoder(), PrototypicalLoss())
    images = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    times = []
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            z = model(images)
        loss = model.triplet_loss(F.normalize(z.float(), dim=1), labels, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(BATCH / statistics.median(times[WARMUP:]), (usage.ru_minflt - faults) / STEPS, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="file to write the medians to")
    parser.add_argument("--process", choices=["default", "kept"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        if options.process == "kept":
            keep_freed_memory()
        return measure()
    found = {"default": [], "kept": []}
    for _ in range(options.repetitions):
        for name, rows in found.items():
            command = [sys.executable, "-m", "benchmarks.memory", "--process", name]
            rows.append([float(x) for x in subprocess.check_output(command, text=True).split()])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.repetitions}\n")
    print("| freed memory | images/s | page faults a step | peak MiB |\n|---|---|---|---|")
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}
    for name, (rate, faults, peak) in medians.items():
        print(f"| {name} | {rate:,.0f} | {faults:,.0f} | {peak:,.0f} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(medians, file, indent=1)
    print(f"\nratio of the rates: {medians['kept'][0] / medians['default'][0]:.2f}")


if __name__ == "__main__":
    main()
