"""What the studies share: results of fits that are kept, so that a study called again does only what is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_folder import write


class Fits:
    """Results in `<out>/fits.json`, by the options that they were fitted with."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "fits.json"
        self.found: dict[str, dict] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}

    def get(self, key: str, fit: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `fit` returned for that key (plain types). It gets a folder for its runs."""
        if key not in self.found:
            self.found[key] = fit(self.out / f"fit_{len(self.found)}")
            write(self.file, json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
            print(f"{key}: {self.found[key]['val_accuracy']:.4f}", flush=True)
        return self.found[key]
