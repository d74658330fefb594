import os
from pathlib import Path

import numpy as np
import pytest

# Before torch counts the cores, here and in children: there is a worker for each core, and tests that compare bits want
# a fixed number of threads, whatever else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from errors import one_line
from main import main

CONFIGS = Path(__file__).parent.parent / "configs"
# An encoder's config with more of everything.
LARGER = sorted(p.stem for p in CONFIGS.glob("*_encoder_*.yaml"))
STAGES = sorted({p.stem for p in CONFIGS.glob("*.yaml")} - set(LARGER))


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    longest = ("test_distributed", "test_killed", "test_pretend_gpu", "test_trainer_arguments", "test_main")
    items.sort(key=lambda item: item.path.stem not in longest)


@pytest.fixture(autouse=True)
def ranks():
    """Takes back what Lightning's strategy ddp leaves in the environment. A later test that starts two processes would
    wait for the second one for ever: where there is a LOCAL_RANK, Lightning takes it for started by somebody else."""
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def tiny(tmp_path):
    """A folder with 300 training and 60 test images of the ten classes; each class has its own brightness."""
    return write_tiny(tmp_path / "data")


def write_tiny(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 300), ("test", 60)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 50, (count, 32, 32, 3)) + 20 * labels[:, None, None, None]
        np.savez(folder / f"cifar10_{name}.npz", images=images.astype(np.uint8), labels=labels)
    return folder


@pytest.fixture
def run(tmp_path, tiny):
    """Calls main(args) on the tiny images for a step, with runs in `tmp_path/runs`; returns the CLI."""

    def call(command, config, *more):
        return main([command, *arguments(tmp_path, config, *more)])

    return call


@pytest.fixture
def refused(tmp_path, tiny, capsys):
    """Asserts that a command ends with exit code 2, one line on stderr that has all of `words`, and no new file."""

    def call(command, config, *more, words):
        def files():
            return {p: p.is_dir() or p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}

        before = files()
        capsys.readouterr()
        code = one_line("main.py", lambda: main([command, *arguments(tmp_path, config, *more)]))
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("main.py: "), lines
        for word in words:
            assert word in lines[0], lines[0]
        assert files() == before

    return call


def arguments(tmp_path, config, *more):
    data = [f"--data.root={tmp_path / 'data'}", "--data.val_size=50", "--data.batch_size=60"]
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.logger.save_dir={tmp_path / 'runs'}"]
    return ["--config", str(CONFIGS / f"{config}.yaml"), *data, *trainer, *more]


@pytest.fixture(scope="session")
def cifar10():
    """The folder of the real CIFAR-10 as cifar10_train.npz and cifar10_test.npz."""
    folder = os.environ.get("CIFAR10_NPZ_DIR")
    if not folder:
        pytest.skip("set CIFAR10_NPZ_DIR to a folder with cifar10_train.npz and cifar10_test.npz to run this test")
    return Path(folder)
