"""One folder for each run: claimed, resumed, written whole, and gone again where a command is refused."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from pytorch_lightning import Callback

from callbacks import LastCheckpoint
from checkpoint_file import load_checkpoint
from errors import InputError
from files import write
from run_folder import Run

STAGE = "softmax_regression"


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: Run.claim(tmp_path / "runs", "version"), range(40)))
    assert {run.folder.name for run in runs} == {f"version_{n}" for n in range(40)}
    assert Run.claim(tmp_path / "runs", "version", 7).folder.name == "version_7"


def test_discarding_removes_what_this_command_made_alone(tmp_path):
    events = f"events.out.tfevents.1.host.{os.getpid()}.0"
    run = Run.claim(tmp_path / "runs" / "stage", "version")
    for name in (events, "hparams.yaml"):
        (run.folder / name).write_text("")
    run.discard()
    assert not any(tmp_path.iterdir())

    started = Run.claim(tmp_path / "runs", "version")
    (started.folder / "config.yaml").write_text("")
    started.discard()
    assert started.config.is_file()

    resumed = Run(started.folder).resume()
    for name in (events, "events.out.tfevents.1.host.0.0", "of_another_process"):
        (resumed.folder / name).write_text("")
    resumed.discard()
    expected = {"config.yaml", "events.out.tfevents.1.host.0.0", "of_another_process"}
    assert {path.name for path in started.folder.iterdir()} == expected


@pytest.mark.parametrize("version", ["", "..", "a/b"])
def test_a_version_that_is_no_folder_is_refused_and_other_runs_stay(tmp_path, run, refused, version):
    run("fit", "softmax_regression")
    refused("fit", "softmax_regression", f"--trainer.logger.version={version}", words=["trainer.logger.version"])
    again = ["--trainer.logger.version=version_0", "--data.batch_size=0"]
    refused("fit", "softmax_regression", *again, words=["batch_size 0"])
    assert (tmp_path / "runs/softmax_regression/version_0/finished.json").is_file()


def test_best_and_last_mean_the_newest_run_whatever_its_name(tmp_path, run):
    def newest():
        return run("test", STAGE, "--ckpt_path=best").run.folder.parent.name

    run("fit", STAGE, "--trainer.logger.version=exp1")
    assert newest() == "exp1"
    run("fit", STAGE)
    assert newest() == "version_0"
    run("fit", STAGE, "--trainer.logger.version=a")
    run("fit", STAGE, "--trainer.logger.version=7")
    assert newest() == "version_7"
    run("fit", STAGE, "--trainer.logger.version=exp0")
    runs = tmp_path / "runs" / STAGE
    os.utime(runs / "version_7" / "config.yaml", (0, 0))  # as after a copy
    shutil.copytree(runs / "version_0", runs / "version_0_backup")
    assert [run.folder.name for run in Run.all(runs)] == ["exp1", "version_0", "version_7", "a", "exp0"]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    write(path, "whole\n")

    def fails(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(InputError, match="file: cannot be written .no space left"):
        write(path, fails)
    assert path.read_text() == "whole\n" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_with_one_byte_changed_is_refused(tmp_path, run, refused):
    run("fit", "softmax_regression")
    path = tmp_path / "runs/softmax_regression/version_0/checkpoints/last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.ckpt").write_bytes(content)
    for command in ("test", "fit"):
        changed = f"--ckpt_path={tmp_path / 'changed.ckpt'}"
        refused(command, "softmax_regression", changed, words=["changed.ckpt: damaged", "checksum"])


@pytest.mark.parametrize("option", ["--model.optimizer=adam", "--model.schedule=constant"])
def test_a_fit_resumes_with_its_own_optimiser_and_schedule(run, refused, option):
    run("fit", "softmax_regression")
    word = option.split(".")[1].split("=")[0]
    words = [f"the checkpoint's {word} is", "config.yaml"]
    refused("fit", "softmax_regression", option, "--ckpt_path=last", words=words)


def test_a_fit_resumed_for_more_epochs_follows_the_longer_schedule(run):
    run("fit", "softmax_regression", "--trainer.max_epochs=2")
    longer = run("fit", "softmax_regression", "--trainer.max_epochs=4", "--ckpt_path=last")
    assert longer.trainer.global_step == 16
    rates = [group["lr"] for group in longer.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.0, 0.0])  # of the step behind the last


def test_a_resumed_fit_takes_over_the_number_of_threads(tmp_path, run):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run("fit", "softmax_regression")
        last = Run(tmp_path / "runs/softmax_regression/version_0").last()
        assert load_checkpoint(last)["made_by"]["threads"] == 2
        torch.set_num_threads(1)
        run("fit", "softmax_regression", "--trainer.max_epochs=2", "--ckpt_path=last")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("option", ["--last_checkpoint.every_n_steps=3", "--trainer.callbacks=LastCheckpoint"])
def test_a_listed_callback_replaces_the_named_one_and_signals_are_as_before(run, option):
    before = signal.getsignal(signal.SIGINT)
    cli = run("fit", "softmax_regression", option)
    (last,) = (c for c in cli.trainer.callbacks if isinstance(c, LastCheckpoint))
    assert last.every_n_steps == (3 if "3" in option else 200)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.filterwarnings("ignore:.*barebones")  # that nothing is logged then
@pytest.mark.parametrize("option", ["--trainer.enable_checkpointing=false", "--trainer.barebones=true"])
def test_what_contradicts_an_option_of_the_trainer_is_left_out(tmp_path, run, option):
    cli = run("fit", "softmax_regression", option)
    assert cli.trainer.global_step == 4 and not list((tmp_path / "runs").rglob("last.ckpt"))


def test_null_precision_means_what_lightning_documents(run):
    assert run("fit", "triplet_encoder", "--trainer.precision=null", "--trainer.max_steps=1", "--pictures=false",
               "--model.encoder.widths=[8,8,8]").trainer.precision == "32-true"  # fmt: skip


def test_a_runs_own_config_builds_the_same_run(tmp_path, run):
    first = run(
        "fit", "softmax_regression", "--last_checkpoint.every_n_steps=3", "--inspection.bins=7", "--pictures=false"
    )
    config = tmp_path / "runs/softmax_regression/version_0/config.yaml"
    again = run("fit", "softmax_regression", f"--config={config}")
    assert again.run.folder.name == "version_1"
    options = [yaml.safe_load(path.read_text()) for path in (config, again.run.config)]
    assert options[0] == options[1] and options[0]["inspection"]["bins"] == 7
    assert [type(c) for c in again.trainer.callbacks] == [type(c) for c in first.trainer.callbacks]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made.*--trainer.logger.save_dir"):
        run("fit", "softmax_regression", f"--trainer.logger.save_dir={tmp_path / 'file'}")


def test_a_moved_run_keeps_its_best_checkpoint_when_resumed(tmp_path, run):
    options = ["--best_checkpoint.monitor=epoch", "--best_checkpoint.mode=min"]  # the first epoch stays the best
    run("fit", "softmax_regression", *options, "--trainer.max_epochs=2")
    moved = tmp_path / "moved" / "softmax_regression" / "version_0"
    shutil.move(tmp_path / "runs/softmax_regression/version_0", moved)
    best = Run(moved).best().name
    cli = run("fit", "softmax_regression", *options, "--trainer.max_epochs=4", f"--ckpt_path={moved}")
    assert best == "epoch=0-step=4.ckpt" and cli.run.folder == moved
    assert Run(moved).best().name == best and Run(moved).finished["best"] == best


class Crash(Callback):
    """Ends a fit as it starts its first or a later validation."""

    def __init__(self, at: int = 1) -> None:
        self.left = at

    def on_validation_start(self, trainer, pl_module) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("crashed")


# The second validation lies two steps into the second epoch of four steps.
ACROSS_EPOCHS = ["--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null", "--trainer.max_epochs=2"]


@pytest.mark.parametrize("at, every, rows", [(1, ["--trainer.val_check_interval=2"], 2), (2, ACROSS_EPOCHS, 4)])
def test_a_fit_that_died_before_a_validation_makes_up_for_it(run, at, every, rows):
    options = [*every, "--last_checkpoint.every_n_steps=1", "--model.schedule=constant"]
    whole = run("fit", "softmax_regression", *options)
    crash = ["--trainer.callbacks+=test_run_folder.Crash", f"--trainer.callbacks.at={at}"]
    with pytest.raises(RuntimeError, match="crashed"):
        run("fit", "softmax_regression", *options, *crash)
    resumed = run("fit", "softmax_regression", *options, "--ckpt_path=last")
    texts = [(cli.run.folder / "metrics.csv").read_text() for cli in (whole, resumed)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 1 + rows


def test_an_epoch_without_validations_has_its_checkpoints(run):
    every = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=2", "--trainer.max_steps=2"]
    last = run("fit", "softmax_regression", *every, "--model.schedule=constant").run.last()
    assert load_checkpoint(last)["global_step"] == 2


def test_validations_may_go_by_the_clock(run):
    assert run("fit", "softmax_regression", "--trainer.val_check_interval=00:00:01:00").run.finished["steps"] == 4
