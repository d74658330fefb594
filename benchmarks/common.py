"""What the benchmarks share: repetitions in turn, medians and ratios, tables, and where they were measured."""

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path


def arguments(doc: str, **defaults) -> argparse.ArgumentParser:
    """A parser with --repetitions, --data-dir and --json; `defaults` replaces their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of every side, in turn (default: %(default)s)")
    parser.add_argument("--data-dir", default="data", help="folder with cifar10_train.npz (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.set_defaults(**defaults)
    return parser


def in_turn(sides: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """What each side returns, called one after the other, over and over: a slow minute hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            found[name].append(side())
    return found


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of the repetitions, each pair measured side by side."""
    return statistics.median(a / b for a, b in zip(over, under))


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The slope of log cost over log size, by least squares: cost ~ size^slope."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def machine() -> str:
    """Processor, cores and versions, in a line."""
    import torch

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0] if models else name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {cores}, {device}, Python {platform.python_version()}, torch {torch.__version__}"


def show(rows: list[dict], file: Path | None = None) -> None:
    """Prints the rows as a Markdown table, their keys as its head, and writes them as JSON where a file is given."""
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row.values())} |")
    print(flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def _cell(value) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.3g}"
        if abs(value) < 0.1 or abs(value) >= 10
        else f"{value:.4f}"
    )
