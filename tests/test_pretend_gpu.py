"""The program on a pretend GPU, and on two under NCCL's rules: see pretend_gpu.py. Needs g++."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pretend_gpu
import pytest
import yaml
from conftest import CONFIGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint_file import load_checkpoint
from main import main

ROOT, HERE = Path(__file__).parent.parent, Path(__file__).parent
# Of torch.use_deterministic_algorithms' documentation: what throws on CUDA, and what sums in any order without it.
NO_DETERMINISTIC_KERNEL = {"adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "nll_loss2d_forward"}
NO_DETERMINISTIC_KERNEL |= {"reflection_pad2d_backward", "upsample_bilinear2d_backward", "histc", "put_", "median"}
ANY_ORDER = {"embedding_dense_backward", "index_add_", "index_add", "index_put_", "_index_put_impl_"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("install g++ to build the pretend GPU")
    path = tmp_path_factory.mktemp("pretend") / "libpretend.so"
    pretend_gpu.build(path)
    return str(path)


def start(library, *args, **options):
    given = [sys.executable, str(HERE / "pretend_gpu.py"), library, *map(str, args)]
    return subprocess.Popen(given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def found(library, tmp_path_factory):
    """What a part of pretend_jobs.py has found; each runs once."""
    done = {}

    def call(part):
        if part not in done:
            file = tmp_path_factory.mktemp("found") / "found.json"
            process = start(library, "jobs", part, file)
            out, error = process.communicate(timeout=500)
            assert process.returncode == 0, (out + error)[-5000:]
            done[part] = json.loads(file.read_text())
        return done[part]

    return call


@pytest.fixture
def commands(found):
    return found("every_stage")["found"]


@pytest.mark.parametrize("device", ["pretend", "travelling"])
def test_every_stage_has_a_cpus_metrics_in_float64(commands, device):
    assert len(commands["cpu"]) == 30 and len(commands[device]) == (30 if device == "pretend" else 6)
    for name, found in commands[device].items():
        expected = commands["cpu"][name]
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, dict) else expected) and found, name


def test_a_gpus_precisions_end_well(commands):
    names = [f"{precision} triplet_encoder" for precision in ("bf16-mixed", "16-mixed", "32-true")]
    for name in [*names, "32-true test"]:
        assert all(value == value for value in commands[name].values()) and commands[name], name


def test_every_loss_is_a_cpus(found):
    losses = found("every_loss")["found"]
    assert len(losses) >= 36 and max(loss["difference"] for loss in losses.values()) < 1e-12, losses


def test_a_host_waits_for_no_loss_and_once_for_its_measurements(found):
    assert {name: loss["waits"] for name, loss in found("every_loss")["found"].items() if loss["waits"] != [0, 1]} == {}


def test_a_host_waits_at_one_point_between_two_measurements(found):
    waits = found("waiting")["found"]
    assert len(waits) == 6 + 2
    for name, seen in waits.items():
        early = [wait for wait in seen if wait[0] % 5 or not wait[3]]
        assert not early, (name, early[:5])
        assert {wait[0] for wait in seen} == {10, 15, 20}, name  # the counter sees some


def test_weights_after_a_loss_that_is_not_finite_are_in_no_checkpoint(found):
    ends = found("not_finite")["found"]
    first = {"at max_steps": 12, "before a validation": 2, "in the last step": 16}
    first |= {"every step's checkpoint": 3, "every step's weights": 4, "at an exception": 5}
    assert ends.keys() == first.keys()
    for name, end in ends.items():
        # OnExceptionCheckpoint gets the error again, before it is told which checkpoint is good.
        last = "clip_val$" if name == "at an exception" else "step0.ckpt$"
        assert re.match(rf"the loss is not finite at step {first[name]} .*{last}", end), (name, end)


def kernels():
    """Of torch's own table: for each operator, the devices and groups that have a kernel for it."""
    folder = Path(importlib.util.find_spec("torchgen").origin).parent / "packaged/ATen/native"
    table, delegates = {}, {}
    for entry in yaml.safe_load((folder / "native_functions.yaml").read_text(encoding="utf-8")):
        name = entry["func"].split("(")[0]
        name = name if "." in name else f"{name}.default"
        devices = {part.strip() for key in entry.get("dispatch", {}) for part in key.split(",")}
        table[name] = devices or {"CompositeImplicitAutograd"}
        if "structured_delegate" in entry:
            delegates[name] = entry["structured_delegate"]
    return {name: devices | table.get(delegates.get(name, ""), set()) for name, devices in table.items()}


def test_apples_gpus_have_a_kernel_for_every_operator(found):
    table, used = kernels(), {name for part in ("every_stage", "waiting") for name in found(part)["operators"]}
    assert len(used) > 100 and "MPS" not in table["take.default"]
    general = {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd"}
    general |= {"CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutogradNestedTensor"}
    # Written for the pretend device alone, in place of a kernel that each device has under its own name.
    own = {"convolution_overrideable.default", "convolution_backward_overrideable.default"}
    own.add("cumsum of floats")
    missing = {name for name in used - own if not table.get(name, set()) & general}
    assert not missing


def test_a_fit_makes_no_float64_numbers_on_apples_gpus(found):
    assert found("waiting")["float64"] == [] and found("every_loss")["float64"]


def test_no_operator_is_without_a_deterministic_kernel(found):
    trained = {name.split(".")[0] for name in found("waiting")["operators"]}
    assert "max_pool2d_with_indices_backward" in trained and not trained & NO_DETERMINISTIC_KERNEL
    assert "cumsum.default" in found("every_stage")["operators"]
    assert "cumsum of floats" not in found("every_stage")["operators"]
    # In evaluations some sums are in any order, as docs/distributed.md says.
    assert not {name.split(".")[0] for name in found("every_loss")["operators"]} & ANY_ORDER


def test_two_processes_under_ncclss_rules(library, tmp_path):
    given = ["--config", CONFIGS / "triplet_encoder.yaml", "--data=DigitsDataModule", "--data.batch_size=64", "--quiet"]
    given += ["--model.encoder.init_args.widths=[8,8,16]", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]
    given += ["--trainer.precision=64-true", "--pictures=false"]
    options = ["--trainer.accelerator=cpu", f"--trainer.logger.save_dir={tmp_path / 'one'}"]
    one = [main([*map(str, words), *map(str, given), *options]) for words in (["fit"], ["test", "--ckpt_path=best"])]
    options = ["--trainer.accelerator=pretend", "--trainer.strategy=pretend_ddp", "--trainer.devices=2"]
    options.append(f"--trainer.logger.save_dir={tmp_path / 'two'}")
    for words in (["fit"], ["test", "--ckpt_path=best"]):
        process = start(library, "main", *words, *given, *options)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, (out + error)[-5000:]
    first, second = (tmp_path / name / "triplet_encoder" / "version_0" for name in ("one", "two"))
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    (file,) = (second / "test_0").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    expected = {name: float(value) for name, value in one[1].trainer.callback_metrics.items()}
    assert {name: events.Scalars(name)[-1].value for name in expected} == pytest.approx(expected, rel=1e-6)


def test_one_process_of_two_that_sees_a_loss_that_is_not_finite_ends_both(library, tmp_path):
    given = ["--config", CONFIGS / "softmax_regression.yaml", "--data=DigitsDataModule", "--data.batch_size=16"]
    given += ["--trainer.accelerator=pretend", "--trainer.strategy=pretend_ddp", "--trainer.devices=2", "--quiet"]
    poison = ["--trainer.callbacks+=pretend_jobs.Poison", "--trainer.callbacks.step=43", "--trainer.callbacks.rank=1"]
    poison += [f"--trainer.callbacks.file={tmp_path / 'poisoned'}"]
    given += [
        *poison,
        "--last_checkpoint.every_n_steps=20",
        f"--trainer.logger.save_dir={tmp_path}",
        "--pictures=false",
    ]
    process = start(library, "main", "fit", *given, env={**os.environ, "PYTHONPATH": str(HERE)})
    out, error = process.communicate(timeout=60)
    assert time.time() - (tmp_path / "poisoned").stat().st_mtime < 10
    folder = tmp_path / "softmax_regression" / "version_0" / "checkpoints"
    assert process.returncode == 2 and error.count("the loss is not finite at step 4") == 1, error[-3000:]
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "previous.ckpt", "step0.ckpt"]
    assert all(x.isfinite().all() for x in load_checkpoint(folder / "last.ckpt")["state_dict"].values())
