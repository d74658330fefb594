"""Runs the benchmarks one after the other and writes what they print to benchmarks/RESULTS.md, and JSON to --out.

pip install -e '.[benchmarks]' && python -m benchmarks.all          # on an idle machine
python -m benchmarks.all startup probe                              # these alone; the others keep their results
"""

import argparse
import subprocess
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

NAMES = ("training", "losses", "probe", "regression", "evaluation", "startup", "scaling", "memory", "inspection")
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON files")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")

    options.out.mkdir(parents=True, exist_ok=True)
    sections = dict(part.split("\n", 1) for part in RESULTS.read_text().split("\n## ")[1:]) if RESULTS.is_file() else {}
    for name in options.names or NAMES:
        print(f"{name} …", flush=True)
        needs_data = (
            ["--data-dir", options.data_dir]
            if name in ("training", "probe", "regression", "scaling", "inspection")
            else []
        )
        command = ["-m", f"benchmarks.{name}", *needs_data]
        given = [*command, "--json", str(options.out / f"{name}.json")]
        printed = subprocess.run(
            [sys.executable, *given], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.splitlines()
        first = next(i for i, line in enumerate(printed) if line.startswith("| "))
        says = next(line for line in reversed(printed[:first]) if line)  # machine and versions
        table = [line for line in printed[first:] if line.startswith("|") or line.startswith("ratio")]
        table += ["", *(line for line in printed if "does not fit" in line)]
        title = import_module(f"benchmarks.{name}").__doc__.strip().split("\n\n")[0]
        text = [title, "", f"`python {' '.join(command)}`, {date.today()}: {says}", "", *table, ""]
        sections[name] = "\n".join(text)
        parts = [f"## {key}\n{sections[key]}" for key in NAMES if key in sections]
        head = "# Benchmarks\n\nMedians of repetitions in turn, written by `python -m benchmarks.all`.\n\n"
        RESULTS.write_text(head + "\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main()
