"""What the studies share: results of fits that are kept, and the encoder that a study looks at."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import fit
from files import write
from run_folder import Run


class Fits:
    """Results in `<--out>/fits.json`: a study called again does only the fits that are missing there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.file = options, options.out, options.out / "fits.json"
        self.found: dict[str, dict] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}

    def get(self, key: str, fitted: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `fitted` returned for that key (plain types). It gets a folder for its runs."""
        if key not in self.found:
            self.found[key] = fitted(self.out / f"fit_{len(self.found)}")
            write(self.file, json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
            print(f"{key}: {self.found[key]['val_accuracy']:.4f}", flush=True)
        return self.found[key]


def encoder_run(options: argparse.Namespace) -> str:
    """--encoder, or the newest finished run; in a dry run, one fitted now."""
    if options.dry_run and not options.encoder:
        return fit(options, "triplet_encoder", options.out, "--quiet").trainer.log_dir
    return options.encoder or str(Run.newest(Path("runs/triplet_encoder")).folder)
