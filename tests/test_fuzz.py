"""Mutated .npz, checkpoint and config files: accepted or refused in one line, within seconds, and nothing written.

FUZZ=N mutates N files of each kind instead of 30. "Past the header" are files that the reader of their format opens.
"""

import copy
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import STAGES

from checkpoint_file import load_checkpoint
from datamodules.arrays import read_npz
from errors import InputError
from main import main

ROOT = Path(__file__).parent.parent
COUNT = int(os.environ.get("FUZZ", 30))
# As errors, warnings would look like refusals.
pytestmark = pytest.mark.filterwarnings("ignore")


class Odd:
    """Pickled, it makes its reader write the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def mutated(rng, data):
    """`data` with a few bytes flipped, cut, repeated, inserted or set to their extremes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, n = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 100))
        match rng.randrange(6):
            case 0:
                data[i] ^= 1 << rng.randrange(8)
            case 1:
                del data[i : i + n]
            case 2:
                data[i:i] = data[i : i + n]
            case 3:
                data[i:i] = rng.randbytes(n)
            case 4:
                data[i : i + n] = rng.choice((b"\x00", b"\xff", b"\x7f")) * n
            case 5:
                del data[max(i, 1) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def mutated_member(rng, data, ending):
    """A zip archive in which one member is mutated, or missing, or there twice; its checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        chosen = rng.choice([n for n in names if n.endswith(ending)])
        for name in names:
            content = source.read(name)
            if name == chosen:
                if rng.random() < 0.1:
                    continue
                head = 128 if rng.random() < 0.5 else len(content)
                content = mutated(rng, content[:head]) + content[head:]
            target.writestr(name, content)
    return out.getvalue()


def odd_value(rng, outside):
    return rng.choice(
        [None, True, -1, 0, 10**30, 2.5, float("nan"), "", "x" * 10_000, "é\n", [], [1, "a"], {}, {"a": 1}, outside]
    )


def with_odd_value(rng, tree, outside):
    """A copy of nested dicts and lists in which one value at any depth is another, missing, or under another key."""
    tree = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    inner = tree[key]
    if isinstance(inner, (dict, list)) and len(inner) and rng.random() < 0.85:
        tree[key] = with_odd_value(rng, inner, outside)
    elif rng.random() < 0.15:
        del tree[key]
    elif isinstance(tree, dict) and rng.random() < 0.1:
        tree[rng.choice(("x", "__class__", "a.b"))] = tree.pop(key)
    else:
        tree[key] = odd_value(rng, outside)
    return tree


def outcome(call, forged=False):
    """`accepted`, or the line of an InputError; anything else that is raised fails the test, unless the file is an
    intact archive with a `forged` state. Seconds and memory bounded."""
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        call()
        line = "accepted"
    except InputError as error:
        line = str(error)
        assert 10 < len(line) <= 1000 and len(line.splitlines()) == 1
    except Exception as error:
        if not forged:
            raise
        line = f"raised {type(error).__name__}"
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000
    return line


def counted(kind, lines):
    past = sum("damaged or not" not in line and "cannot be read" not in line for line in lines)
    print(f"{kind}: {len(lines)} files, {past} past the header, {lines.count('accepted')} accepted")
    return past


def test_npz(tmp_path):
    rng, path, lines = random.Random(0), tmp_path / "x.npz", []
    np.savez(path, images=np.zeros((40, 32, 32, 3), np.uint8), labels=np.arange(40) % 10)
    good = path.read_bytes()
    for _ in range(COUNT):
        path.write_bytes(mutated(rng, good) if rng.random() < 0.3 else mutated_member(rng, good, ".npy"))
        lines.append(outcome(lambda: read_npz(path, num_classes=10)))
        assert lines[-1] == "accepted" or str(path) in lines[-1]
    assert counted("npz", lines) >= 0.3 * COUNT


@pytest.fixture
def fitted(tmp_path, run):
    """Checkpoints of a softmax regression and of an encoder."""
    run("fit", "softmax_regression")
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,8]")
    paths = (
        tmp_path / "runs" / stage / "version_0/checkpoints/last.ckpt"
        for stage in ("softmax_regression", "triplet_encoder")
    )
    return [shutil.copy(path, tmp_path / f"{path.parts[-4]}.ckpt") for path in paths]


def test_checkpoint_bytes(tmp_path, fitted):
    rng, path, lines = random.Random(0), tmp_path / "x.ckpt", []
    for i in range(COUNT):
        good = Path(fitted[i % 2]).read_bytes()
        path.write_bytes(
            mutated(rng, good) if rng.random() < 0.3 else mutated_member(rng, good, ("pkl", "/0", "version"))
        )
        lines.append(outcome(lambda: load_checkpoint(path)))
        assert lines[-1] == "accepted" or str(path) in lines[-1]
    counted("checkpoint, bytes", lines)


def test_checkpoints_of_odd_values(tmp_path, run, fitted):
    rng, path, lines = random.Random(0), tmp_path / "x.ckpt", []
    good = [torch.load(p, weights_only=True) for p in fitted]
    for _ in range(COUNT):
        commands = [
            (0, ("test", "softmax_regression", f"--ckpt_path={path}")),
            (0, ("fit", "softmax_regression", f"--ckpt_path={path}", "--trainer.max_epochs=2")),
            (1, ("fit", "linear_probe", f"--frozen_encoder.run={path}")),
        ]
        which, command = rng.choice(commands)
        torch.save(with_odd_value(rng, good[which], Odd(tmp_path / "executed")), path)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        lines.append(outcome(lambda: run(*command), forged=True))
        assert lines[-1] == "accepted" or not (tmp_path / "runs").exists(), lines[-1]
    assert counted("checkpoint, odd values", lines) >= 0.3 * COUNT and not (tmp_path / "executed").exists()


def mutated_config(rng, text):
    if rng.random() < 0.4:
        return mutated(rng, text.encode())
    return yaml.safe_dump(with_odd_value(rng, yaml.safe_load(text), "os.system"), allow_unicode=True).encode()


def small(tmp_path, tiny):
    """Options that keep what a mutated config may ask for small; given behind it."""
    data = [f"--data.root={tiny}", "--data.val_size=50", "--data.batch_size=30", "--data.download=false"]
    trainer = [
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.max_time=00:00:00:20",
    ]
    return [*data, *trainer, f"--trainer.logger.save_dir={tmp_path / 'runs'}"]


@pytest.mark.parametrize("config", STAGES)
def test_configs(tmp_path, tiny, run, config):
    rng, path, lines = random.Random(config), tmp_path / "x.yaml", []
    text = (ROOT / "configs" / f"{config}.yaml").read_text().replace("[32, 64, 256]", "[8, 8, 8]")
    start = {"linear_probe": "triplet_encoder", "mlp_probe": "triplet_encoder", "fine_tune": "linear_probe"}.get(config)
    encoder = [f"--frozen_encoder.run={tmp_path / 'start' / start / 'version_0'}"] if start else []
    for stage in ("triplet_encoder", "linear_probe") if start else ():
        small_encoder = ["--model.encoder.init_args.widths=[8,8,8]"] if stage == "triplet_encoder" else []
        run("fit", stage, *small_encoder, f"--trainer.logger.save_dir={tmp_path / 'start'}")
    for _ in range(-(-COUNT // 7)):
        path.write_bytes(mutated_config(rng, text))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        lines.append(outcome(lambda: main(["fit", "--config", str(path), *small(tmp_path, tiny), *encoder])))
        # A fit may end by itself: a rate that another network needs, a metric to monitor that it turns out not to log.
        ended = any(part in lines[-1] for part in ("accepted", "the loss is", "could not find the monitored key"))
        assert ended or not (tmp_path / "runs").exists(), lines[-1]
    counted(config, lines)


@pytest.mark.slow
def test_fifty_through_the_real_command(tmp_path, tiny, fitted):
    rng, good = (
        random.Random(0),
        {"npz": (tiny / "cifar10_train.npz").read_bytes(), "ckpt": Path(fitted[0]).read_bytes()},
    )
    text, codes = (ROOT / "configs/softmax_regression.yaml").read_text(), []
    shutil.rmtree(tmp_path / "runs")
    for i in range(50):
        npz, checkpoint, config = tmp_path / "x.npz", tmp_path / "x.ckpt", tmp_path / "x.yaml"
        npz.write_bytes(mutated_member(rng, good["npz"], ".npy") if i % 3 == 0 else good["npz"])
        checkpoint.write_bytes(mutated_member(rng, good["ckpt"], ("pkl", "/0")) if i % 3 == 1 else good["ckpt"])
        config.write_bytes(mutated_config(rng, text) if i % 3 == 2 else text.encode())
        command = [
            "fit",
            "--config",
            config,
            *small(tmp_path, tiny),
            f"--data.train_npz={npz}",
            "--trainer.max_epochs=2",
        ]
        command += [f"--ckpt_path={checkpoint}"] if i % 3 == 1 else []
        done = subprocess.run(
            [sys.executable, "main.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        codes.append(done.returncode)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
        if done.returncode == 2:
            assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists(), done.stderr
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    print(f"through the command: 50 files, {codes.count(2)} refused, {codes.count(0)} accepted")
