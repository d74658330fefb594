"""Runs the benchmarks one after the other, each in a process of its own, and writes benchmarks/RESULTS.md.

pip install -e '.[benchmarks]' && python -m benchmarks.all          # on an idle machine
python -m benchmarks.all startup probe                              # these alone; the others keep their results
python -m benchmarks.all --dry-run                                  # whether all of them work; writes no results
"""

import json
import subprocess
import sys
import tempfile
from datetime import date
from importlib import import_module
from pathlib import Path

from benchmarks.common import arguments, table
from errors import InputError, one_line

NAMES = ("training", "losses", "probe", "regression", "evaluation", "startup", "scaling", "inspection")
ON_REQUEST = ("gpu",)
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = arguments("benchmarks.all", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES + ON_REQUEST)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES + ON_REQUEST):
        raise InputError(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES + ON_REQUEST)}")
    given = ["--dry-run"] if options.dry_run else [f"--repetitions={options.repetitions}"]
    found = {}
    for name in options.names or NAMES:
        print(f"{name} …", flush=True)
        found[name] = measured(name, [*given, *([] if options.dry_run else ["--data-dir", options.data_dir])])
        if not options.dry_run:
            write(name, f"python -m benchmarks.{name} {' '.join(given)}", **found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measured(name: str, given: list[str]) -> dict:
    """`machine` and `rows` of a benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *given, "--json", str(file)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def write(name: str, command: str, machine: str, rows: list[dict]) -> None:
    """Puts a benchmark's section into RESULTS.md, in place of the one there."""
    head, *parts = RESULTS.read_text(encoding="utf-8").split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    title = import_module(f"benchmarks.{name}").__doc__.strip().split("\n\n")[0]
    sections[name] = f"{title}\n\n`{command}`, {date.today()}: {machine}\n\n{table(rows)}\n"
    parts = [f"## {key}\n{sections[key].rstrip()}\n" for key in NAMES + ON_REQUEST if key in sections]
    RESULTS.write_text("\n".join([head.rstrip() + "\n", *parts]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(one_line("python -m benchmarks.all", main))
