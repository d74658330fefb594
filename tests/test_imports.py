"""Dependencies point one way: main → cli → {callbacks, datamodules, lightning_modules}, never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"main", "cli", "reproduce", "callbacks", "datamodules", "lightning_modules", "errors"}
# What each room may import of the project, and, where it is limited, of other packages.
ALLOWED = {
    "errors": set(),
    "main": {"cli", "errors"},
    "cli": {"callbacks", "datamodules", "lightning_modules", "errors"},
    "reproduce": {"main", "callbacks", "errors"},
    "callbacks": {"callbacks", "lightning_modules", "errors"},
    "datamodules": {"datamodules", "errors"},
    "lightning_modules": {"lightning_modules", "errors"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        found = {name.split(".")[0] for name in imported(path)} & OURS
        assert found <= ALLOWED[room], f"{path.name} imports {sorted(found - ALLOWED[room])}"


@pytest.mark.parametrize(
    "name", ["encoders", "fast_encoder", "losses", "functional", "distances", "triplets", "retrieval"]
)
def test_networks_and_losses_need_torch_alone(name):
    names = set(imported(ROOT / "lightning_modules" / f"{name}.py"))
    others = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names and n.split(".")[0] != "torch"}
    ours = {f"lightning_modules.{part}" for part in ("distances", "encoders", "functional", "triplets")}
    assert others <= {"errors", *ours}, others


def test_version_is_told_without_importing_torch():
    code = (
        "import sys; sys.argv = ['main.py', '--version']; import runpy; runpy.run_path('main.py', run_name='__main__')"
    )
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".") == 2
