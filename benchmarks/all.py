"""Runs the benchmarks one after the other, each in a process of its own, and writes benchmarks/RESULTS.md.

pip install -e '.[benchmarks]' && python -m benchmarks.all          # on an idle machine
python -m benchmarks.all startup probe                              # these alone; the others keep their results
python -m benchmarks.all --dry-run                                  # whether all of them work; writes no results
"""

import sys
from datetime import date
from importlib import import_module
from pathlib import Path

from benchmarks.common import Rows, arguments, fresh, machine, measured, save, table
from errors import InputError, one_line

NAMES = ("training", "views", "losses", "probe", "regression", "evaluation", "startup", "scaling", "inspection", "busy")
NAMES += ("to_accuracy", "gpu")  # hours; a GPU
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = arguments("benchmarks.all", __doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all but the last two)"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        raise InputError(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    given = [f"--data-dir={options.data_dir}", f"--repetitions={options.repetitions}"]
    found = {}
    for name in options.names or NAMES[:-2]:
        found[name] = fresh(measured, f"benchmarks.{name}", ["--dry-run"] if options.dry_run else given)
        if not options.dry_run:
            put(name, given[-1], found[name])
    save(options, found)


def put(name: str, option: str, rows: Rows) -> None:
    """Puts a benchmark's section in place of the one in RESULTS.md."""
    head, *parts = RESULTS.read_text(encoding="utf-8").split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    title = import_module(f"benchmarks.{name}").__doc__.strip().split("\n\n")[0]
    command = f"`python -m benchmarks.{name} {option}`, {date.today()}: {machine()}"
    sections[name] = f"{title}\n\n{command}\n\n{table(rows)}\n"
    parts = [f"## {key}\n{sections[key].rstrip()}\n" for key in NAMES if key in sections]
    RESULTS.write_text("\n".join([head.rstrip() + "\n", *parts]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(one_line("python -m benchmarks.all", main))
