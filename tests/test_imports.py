"""Imports point one way, from main down to errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ERRORS, NETWORKS, FILES = {"errors"}, {"errors", "lightning_modules"}, {"errors", "files", "checkpoint_file"}
# What each room may import of the project.
ALLOWED = {
    "errors": set(),
    "threads": set(),
    "files": ERRORS,
    "checkpoint_file": {"files", *ERRORS},
    "pages": ERRORS,
    "datamodules": {"datamodules", *ERRORS},
    "lightning_modules": NETWORKS,
    "run_folder": FILES,
    "callbacks": {"callbacks", "run_folder", "pages", *FILES, *NETWORKS},
    "closing": {"callbacks", "datamodules", *NETWORKS},
    "places": ERRORS,
    "export": {"callbacks", "run_folder", "datamodules", *FILES, *NETWORKS},
    "cli": {"callbacks", "closing", "places", "run_folder", "threads", "datamodules", *FILES, *NETWORKS},
    "main": {"cli", "export", "threads", *ERRORS},
    "reproduce": {"main", "callbacks", "run_folder", "pages", *FILES},
}
# A module that a user names, and libraries that only some exports need.
IMPORTED_BY_NAME = {"callbacks/frozen_encoder.py": 1, "export.py": 1}


def files(room):
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_file_is_in_a_room():
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"benchmarks", "studies", "tests"} == ALLOWED.keys()


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    assert files(room)
    for path in files(room):
        found = {name.split(".")[0] for name in imported(path)} & ALLOWED.keys()
        assert found <= ALLOWED[room], f"{path.name} imports {sorted(found - ALLOWED[room])}"


@pytest.mark.parametrize("room", ALLOWED)
def test_modules_are_imported_by_statements(room):
    """A string would hide an import from the test above."""
    for path in files(room):
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name | ast.Attribute)]
        calls = sum(getattr(node, "id", getattr(node, "attr", "")) == "import_module" for node in names)
        assert calls <= IMPORTED_BY_NAME.get(path.relative_to(ROOT).as_posix(), 0), path


def test_callbacks_hold_callbacks_alone():
    """One a file, but for what several of them share."""
    for path in files("callbacks"):
        if path.stem not in ("__init__", "figures", "image_rate"):
            assert sum(isinstance(node, ast.ClassDef) for node in ast.parse(path.read_text()).body) == 1, path


def test_nothing_happens_at_import():
    """No style, warning filter, log level or environment variable is set."""
    code = """
import logging, os, warnings
import matplotlib.pyplot, pytorch_lightning, pytorch_lightning.cli, scipy.stats, sklearn.manifold, torchvision.datasets

def state():
    names = [name for name in logging.root.manager.loggerDict if "lightning" in name]
    levels = {name: logging.getLogger(name).level for name in names}
    return dict(os.environ), list(warnings.filters), levels, dict(matplotlib.rcParams)

before = state()
import cli, export, reproduce
for name, one, two in zip(("environment", "warnings", "log levels", "style"), before, state()):
    assert one == two, name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["encoders", "losses", "retrieval.py", "mining.py"])
def test_networks_and_losses_need_torch_alone(part):
    path = ROOT / "lightning_modules" / part
    for file in [path] if path.is_file() else sorted(path.glob("*.py")):
        others = {name.split(".")[0] for name in imported(file)} - {"torch", "torchvision", *NETWORKS}
        assert not others - sys.stdlib_module_names, (file, others)
        ours = [name for name in imported(file) if name.startswith("lightning_modules.")]
        assert all(name.split(".")[1] in ("encoders", "losses") for name in ours), (file, ours)


def test_version_is_told_without_importing_torch():
    code = (
        "import sys; sys.argv = ['main.py', '--version']; import runpy; runpy.run_path('main.py', run_name='__main__')"
    )
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".") == 2
