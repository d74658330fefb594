"""A fit killed at any point and gone on with ends as one that was never killed, bit for bit."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killer import PHASES, quiet_main

from checkpoint_file import WholeCheckpointIO, load_checkpoint
from errors import InputError

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
CONFIGS = ROOT / "configs"
STAGES = ("softmax_regression", "triplet_encoder", "linear_probe", "mlp_probe", "fine_tune", "label_free_encoder")
EPOCHS, STEPS_PER_EPOCH = 3, 8


def arguments(stage, runs, *more):
    common = ["--data", "DigitsDataModule", "--data.batch_size=128", f"--trainer.max_epochs={EPOCHS}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    often = ["--last_checkpoint.every_n_steps=3"]
    special = ["--model.dropout=0.3"] if stage == "mlp_probe" else []
    if stage == "label_free_encoder":
        special = ["--model.encoder.init_args.widths=[8,8,16]"]
    start = {"linear_probe": "triplet_encoder", "mlp_probe": "triplet_encoder", "fine_tune": "linear_probe"}.get(stage)
    special += [f"--frozen_encoder.run={runs.parent / 'start' / start / 'version_0'}"] if start else []
    config = ["--config", str(CONFIGS / f"{stage}.yaml")]
    return ["fit", *config, *common, *quiet, *often, *special, f"--trainer.logger.save_dir={runs}", *more]


def processes(count):
    return [f"--trainer.devices={count}"]


def killer(phase, step, log):
    options = {"phase": phase, "step": step, "log_file": log}
    return ["--trainer.callbacks+=killer.Killer", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def in_a_process(args):
    """Runs main(args) in a process forked from one that has everything imported already; its exit code."""
    # Not forked from this one: OpenMP's threads, once there are any, do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cli"])
    process = context.Process(target=quiet_main, args=(args,))
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode


def by_command(args):
    """Runs main.py with `args`, and ends what the killed process leaves behind; its exit code."""
    process = subprocess.Popen(
        [sys.executable, "main.py", *args], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    code = process.wait(300)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return code


def state(runs, stage):
    """All that a run has come to: its last checkpoint, without what Lightning does not restore, and its figures."""
    folder = runs / stage / "version_0"
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    parts = {k: checkpoint[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "stage", "data")}
    for name, values in checkpoint["callbacks"].items():
        own = {"dirpath", "current_score", "best_model_path", "kth_best_model_path", "best_k_models", "last_model_path"}
        parts[name.split("{")[0]] = {k: v for k, v in values.items() if k not in own}
    files = sorted(p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("."))
    return {**parts, "files": files, "metrics.csv": (folder / "metrics.csv").read_text()}


def differences(a, b, path=""):
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts, by stage and number of processes, made when first asked for."""
    base = tmp_path_factory.mktemp("whole")
    for stage in ("triplet_encoder", "linear_probe"):  # what probes and fine-tuning start from
        assert in_a_process(arguments(stage, base / "start", "--trainer.max_epochs=1")) == 0
    made = {}

    def get(stage, devices):
        if (stage, devices) not in made:
            runs = base / f"{stage}_{devices}"
            call = in_a_process if devices == 1 else by_command
            assert call(arguments(stage, runs, *processes(devices))) == 0
            made[stage, devices] = state(runs, stage)
        return made[stage, devices]

    get.base = base
    return get


def killed_and_resumed(whole, stage, phase, step, devices, log):
    runs = whole.base / f"{stage}_{phase}_{step}_{devices}"
    call = in_a_process if devices == 1 else by_command
    args = arguments(stage, runs, *processes(devices))
    code = call([*args, *killer(phase, step, log)])
    # Of two processes one may see that the other is gone before it is killed itself.
    assert code == -signal.SIGKILL or (devices == 2 and code not in (0, 2)), code
    assert call([*args, "--ckpt_path=last"]) == 0
    return differences(whole(stage, devices), state(runs, stage))


@pytest.mark.parametrize(
    "stage, phase, step",
    [("triplet_encoder", "backward", 0), ("triplet_encoder", "step", 13), ("triplet_encoder", "validation", 8),
     ("triplet_encoder", "checkpoint", 12), ("fine_tune", "epoch_end", 16), ("mlp_probe", "step", 5),
     ("label_free_encoder", "step", 14)],
)  # fmt: skip
def test_killed_fit_ends_as_if_not_killed(tmp_path, whole, stage, phase, step):
    assert not killed_and_resumed(whole, stage, phase, step, 1, tmp_path / "log")


def test_killed_fit_on_two_processes_ends_as_if_not_killed(tmp_path, whole):
    assert not killed_and_resumed(whole, "triplet_encoder", "step", 11, 2, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_fifty_random_kills(tmp_path, whole, stage):
    """Ten of them."""
    draw = random.Random(0)
    steps = {(s, p, d): draw.randrange(EPOCHS * STEPS_PER_EPOCH) for s in STAGES for p in PHASES for d in (1, 2)}
    log, failed = tmp_path / "log", []
    for phase in PHASES:
        for devices in (1, 2):
            step = steps[stage, phase, devices]
            found = killed_and_resumed(whole, stage, phase, step, devices, log)
            print(stage, phase, step, devices, found or "identical", flush=True)
            failed += found
    assert not failed and len(log.read_text().splitlines()) == 10


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_fit_with_a_checkpoint_to_go_on_from(tmp_path, whole, number, code):
    args = arguments(
        "softmax_regression",
        tmp_path / "runs",
        "--trainer.callbacks+=killer.Signal",
        f"--trainer.callbacks.number={int(number)}",
    )
    done = subprocess.run([sys.executable, "main.py", *args], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("main.py")]
    assert f"stopped by {number.name} at step 11" in line and "--ckpt_path last" in line
    assert in_a_process([*arguments("softmax_regression", tmp_path / "runs"), "--ckpt_path=last"]) == 0
    assert not differences(whole("softmax_regression", 1), state(tmp_path / "runs", "softmax_regression"))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, whole):
    """A limit on the size of files stands in for a full disk: it lets step0.ckpt through, and no trained one."""
    runs, limit = (
        tmp_path / "runs",
        "import errors, resource, sys, main; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));",
    )
    program = limit + "sys.exit(errors.one_line('main.py', lambda: main.main(sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments("softmax_regression", runs)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("main.py")]
    assert done.returncode == 2 and "cannot be written" in line and "--ckpt_path last" in line, done.stderr
    folder = runs / "softmax_regression" / "version_0" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step0.ckpt"]
    assert in_a_process([*arguments("softmax_regression", runs), "--ckpt_path=last"]) == 0


def test_a_file_where_the_run_folder_should_be(tmp_path, refused):
    (tmp_path / "runs").write_text("")
    refused("fit", "softmax_regression", words=[str(tmp_path / "runs"), "cannot be made"])


def test_a_truncated_last_checkpoint_is_named_and_the_one_before_it_used(tmp_path, run):
    run("fit", "softmax_regression", "--trainer.max_epochs=2")
    folder = tmp_path / "runs" / "softmax_regression" / "version_0" / "checkpoints"
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"last\.ckpt: damaged.*previous\.ckpt is used instead"):
        resumed = run("fit", "softmax_regression", "--trainer.max_epochs=3", "--ckpt_path=last")
    assert resumed.trainer.global_step == 12


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    WholeCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    before = path.read_bytes()

    def fails(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(InputError, match="x.ckpt: the checkpoint cannot be written .No space left on device."):
        WholeCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
