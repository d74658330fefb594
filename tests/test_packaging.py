"""The wheel holds the program whole: what it installs into an empty folder runs there."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_fits_the_digits_from_an_empty_folder(tmp_path):
    site, source = tmp_path / "site", tmp_path / "source"  # a copy, since building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "data", "runs", "build", "*.egg-info"))
    run("-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert not {path.name for path in site.iterdir()} & {"tests", "benchmarks", "studies", "docs"}
    assert run(site / "main.py", "--version", cwd=tmp_path).strip() == wheel.name.split("-")[1]
    config = site / "configs" / "softmax_regression.yaml"
    options = ["--data", "DigitsDataModule", "--trainer.max_epochs", "1", "--pictures", "false"]
    run(site / "main.py", "fit", "--config", config, *options, cwd=tmp_path)
    assert (tmp_path / "runs/softmax_regression/version_0/finished.json").is_file()
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import cli, export, reproduce; print(reproduce.__file__)"
    assert run("-c", code, cwd=tmp_path).strip() == str(site / "reproduce.py")
