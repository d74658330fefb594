"""What contrast buys: five questions, each answered by the same rivals at equal encoder seconds.

    python -m studies.buys labels --data-dir data              # how few labels?
    python -m studies.buys noise --data-dir data --seeds 1     # how wrong may they be?
    python -m studies.buys shift --data-dir data               # how far may the images change?
    python -m studies.buys unknown --data-dir data             # does it know what it does not know?
    python -m studies.buys coarse --data-dir data              # does it learn more than it is told?
    python -m studies.buys labels --data digits --seeds 1      # offline, as a trial

A question writes JSON, a Markdown table and a figure into --out. All keep their fits there, and share them. Called
again, a question does what is missing, and goes on within a fit that was interrupted. Accuracies are on test images.
Every choice is made on validation images, of which there are at most as many as training images have labels.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks.common import table
from callbacks.figures import COLOURS
from errors import OneLineParser, one_line, require
from files import write
from studies.questions import Found, coarse, labels, noise, shift, unknown
from studies.rivals import ENTROPY, FREE, Study

QUESTIONS = {f.__name__: f for f in (labels, noise, shift, unknown, coarse)}


def interval(values: list[float]) -> float:
    """Half the 95 % interval of a mean (Student's t); 0 of a single value."""
    if len(values) < 2:
        return 0.0
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def gathered(found: list[Found]) -> list[dict[str, str]]:
    """A row for each rival, a column for each condition: the mean over draws, and half its 95 % interval."""
    columns, rivals = (list(dict.fromkeys(x)) for x in zip(*((f.column, f.rival) for f in found)))

    def cell(values: list[float], sign: str = "") -> str | None:
        if not values:
            return None
        return f"{statistics.fmean(values):{sign}.4f}" + (f" ± {interval(values):.4f}" if len(values) > 1 else "")

    by = {}
    for f in found:
        by.setdefault((f.rival, f.column), {})[f.draw] = f.value
    rows = [{"": rival, **{c: cell([*by.get((rival, c), {}).values()]) for c in columns}} for rival in rivals]
    ahead = {}
    for c in columns:
        free, entropy = by.get((FREE, c), {}), by.get((ENTROPY, c), {})
        ahead[c] = cell([value - entropy[draw] for draw, value in free.items() if draw in entropy], "+")
    return [*rows, {"": "label-free probe − cross-entropy, paired", **ahead}]


def drawn(found: list[Found], title: str) -> Figure:
    """A line for each rival over the conditions, with 95 % intervals."""
    columns, rivals = (list(dict.fromkeys(x)) for x in zip(*((f.column, f.rival) for f in found)))
    figure = Figure(figsize=(max(7, 0.9 * len(columns) + 4), 4.5), layout="constrained")
    axes = figure.subplots()
    for colour, rival in zip(COLOURS, rivals):
        cells = {c: [f.value for f in found if (f.column, f.rival) == (c, rival)] for c in columns}
        cells = {c: values for c, values in cells.items() if values}
        means, errors = [statistics.fmean(v) for v in cells.values()], [interval(v) for v in cells.values()]
        axes.errorbar([columns.index(c) for c in cells], means, errors, fmt="o-", color=colour, label=rival, capsize=2)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set(title=title, ylabel="AUROC or accuracy" if "AUROC" in title else "accuracy, test images")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def main() -> None:
    parser = OneLineParser(prog="python -m studies.buys", description=__doc__)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10")
    parser.add_argument("--data-dir", default="data", help="folder with CIFAR-10 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/buys"), help="(default: %(default)s)")
    options = parser.parse_args()
    require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")
    name = f"{options.question}_{options.data}"
    found = list(QUESTIONS[options.question](Study(options)))
    rows = gathered(found)
    write(options.out / f"{name}.json", json.dumps([f._asdict() for f in found], indent=1, ensure_ascii=False) + "\n")
    write(options.out / f"{name}.md", f"{table(rows)}\n")
    title = "AUROC of what is unknown" if options.question == "unknown" else f"What contrast buys: {options.question}"
    write(options.out / f"{name}.png", lambda file: drawn(found, title).savefig(file, dpi=120))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(one_line("python -m studies.buys", main))
