"""A fit that resumes: finished or not, with more or fewer epochs, other batches, another rate, a damaged record."""

import csv
import json
import shutil

import pytest

PLAIN = "--pictures=false"
STAGE = "softmax_regression"


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def fitted(tmp_path, run):
    """The folder of a finished fit of two epochs of four steps."""
    return run("fit", STAGE, PLAIN, "--trainer.max_epochs=2").run.folder


def test_more_epochs_follow_the_longer_schedule_and_a_line_reports_it(fitted, run, capsys):
    seconds = json.loads((fitted / "finished.json").read_text())["seconds"]
    cli = run("fit", STAGE, PLAIN, "--trainer.max_epochs=6", "--ckpt_path=last")
    assert cli.run.folder == fitted and cli.trainer.global_step == 24
    rates = [float(row["lr"]) for row in rows(fitted)]
    assert len(rates) == 6 and all(rate > 0 for rate in rates[2:5])
    said = capsys.readouterr().out
    assert "resumed at step 8 of 24, learning rate 0." in said
    assert "changed since the checkpoint: trainer.max_epochs 2 → 6" in said
    finished = json.loads((fitted / "finished.json").read_text())
    assert finished["steps"] == 24 and finished["seconds"] > seconds  # of both parts


def test_the_first_resumed_step_has_the_rate_of_the_longer_schedule(fitted, run):
    cli = run("fit", STAGE, PLAIN, "--trainer.max_epochs=6", "--trainer.max_steps=9", "--ckpt_path=last")
    whole = run("fit", STAGE, PLAIN, "--trainer.max_epochs=6", "--trainer.max_steps=9")
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == whole.trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_fit_with_nothing_left_to_train_says_so_and_keeps_its_record(fitted, run, capsys, epochs):
    kept = {name: (fitted / name).read_bytes() for name in ("finished.json", "metrics.csv", "checkpoints/last.ckpt")}
    run("fit", STAGE, PLAIN, f"--trainer.max_epochs={epochs}", "--ckpt_path=last")
    assert "nothing is left to train: the fit ended at step 8" in capsys.readouterr().out
    assert kept == {name: (fitted / name).read_bytes() for name in kept}


def test_another_batch_size_continues_at_an_epochs_end_and_never_with_rate_0(fitted, run):
    run("fit", STAGE, PLAIN, "--trainer.max_epochs=4", "--data.batch_size=120", "--ckpt_path=last")
    rates = [float(row["lr"]) for row in rows(fitted)]
    assert [int(row["step"]) for row in rows(fitted)] == [4, 8, 10, 12]
    assert rates[2] > 0 and rates[3] == 0


def test_another_batch_size_within_an_epoch_is_refused(run, refused):
    run("fit", STAGE, PLAIN, "--trainer.max_epochs=2", "--trainer.max_steps=5")
    words = ["1 of 4 steps into an epoch", "2 steps", "data.batch_size"]
    refused("fit", STAGE, PLAIN, "--trainer.max_epochs=2", "--data.batch_size=120", "--ckpt_path=last", words=words)


@pytest.mark.parametrize("schedule", ["constant", "triangular", "plateau"])
def test_a_resumed_fit_takes_this_commands_rate_and_momentum(run, schedule, capsys):
    options = [PLAIN, f"--model.schedule={schedule}", "--trainer.max_epochs=4"]
    run("fit", STAGE, *options, "--trainer.max_steps=4", "--model.lr=0.1")
    changed = ["--ckpt_path=last", "--trainer.max_steps=8", "--model.lr=0.01", "--model.momentum=0.5"]
    group = run("fit", STAGE, *options, *changed).trainer.optimizers[0].param_groups[0]
    assert group["initial_lr"] == 0.01 and 0 <= group["lr"] <= 0.01 and group["momentum"] == 0.5
    assert "model.lr 0.1 → 0.01" in capsys.readouterr().out


def test_an_earlier_checkpoint_starts_a_run_of_its_own(fitted, run):
    kept = (fitted / "metrics.csv").read_bytes()
    last = fitted / "checkpoints" / "last.ckpt"
    earlier = fitted / "checkpoints" / "earlier.ckpt"
    shutil.copy(last, earlier)
    run("fit", STAGE, PLAIN, "--trainer.max_epochs=3", "--ckpt_path=last")
    cli = run("fit", STAGE, PLAIN, "--trainer.max_epochs=4", f"--ckpt_path={earlier}")
    assert cli.run.folder.name == "version_1" and cli.trainer.global_step == 16
    assert (fitted / "metrics.csv").read_bytes().startswith(kept) and len(rows(fitted)) == 3


@pytest.mark.parametrize("name", ["metrics.csv", "finished.json"])
@pytest.mark.parametrize("content", [b"", b"step,epo", b"\xff\xfe\x00", b"[]", b'{"best": 3, "seconds": "x"}'])
def test_a_damaged_record_does_not_stop_a_resumed_fit(fitted, run, name, content, recwarn):
    (fitted / name).write_bytes(content)
    cli = run("fit", STAGE, PLAIN, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert cli.trainer.global_step == 12
    assert json.loads((fitted / "finished.json").read_text())["steps"] == 12
    run("validate", STAGE, PLAIN, "--ckpt_path=best")


def test_a_damaged_metrics_file_is_kept_aside(fitted, run):
    damaged = (fitted / "metrics.csv").read_bytes()[:-25]
    (fitted / "metrics.csv").write_bytes(damaged)
    with pytest.warns(UserWarning, match="damaged lines are dropped"):
        run("fit", STAGE, PLAIN, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert (fitted / "metrics_damaged.csv").read_bytes() == damaged and len(rows(fitted)) == 2


def test_csv_loggers_record_survives_a_resume(tmp_path, run):
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'runs'}"]
    folder = run("fit", STAGE, PLAIN, *logger).run.folder
    first = (folder / "csv" / "version_0" / "metrics.csv").read_bytes()
    run("fit", STAGE, PLAIN, *logger, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert (folder / "csv" / "version_0" / "metrics.csv").read_bytes() == first
    assert (folder / "csv" / "version_1" / "metrics.csv").is_file() and len(rows(folder)) == 2
