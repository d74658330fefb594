"""The ladder on digits with few steps: its files, going on after a stop, and what it refuses."""

import json
import shutil
import signal

import pytest
from callbacks.checkpoints import load_checkpoint
from test_killed import in_a_process, killer
from test_report import Page

import reproduce
from callbacks import TSNE
from errors import InputError

STAGES = list(reproduce.REPORT)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A finished ladder of two seeds, two steps a stage."""
    out = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        short = {k: [*v, "--trainer.max_steps=2", "--trainer.accelerator=cpu"] for k, v in reproduce.DIGITS.items()}
        patch.setattr(reproduce, "DIGITS", short)
        patch.setattr(TSNE.__init__, "__defaults__", (60, 30.0))  # fewer samples, which take seconds
        reproduce.reproduce(["--data", "digits", "--seeds", "2", "--out", str(out)])
    return out


def test_results(ladder):
    rows = json.loads((ladder / "results.json").read_text())
    assert [row["stage"] for row in rows] == STAGES
    for row in rows:
        assert set(row) == {
            "stage",
            "val_accuracy",
            "test_accuracy",
            "val_std",
            "test_std",
            "seconds",
            "fit_seconds",
            "report",
        }
        assert (
            0 < row["val_accuracy"] <= 1 and 0 < row["test_accuracy"] <= 1 and 0 < row["fit_seconds"] < row["seconds"]
        )
        assert row["val_std"] >= 0 and row["test_std"] >= 0
        assert row["report"] is None  # the report's figures are CIFAR-10's
    table = (ladder / "results.md").read_text()
    assert all(f"| {stage} |" in table for stage in STAGES)
    assert (ladder / "results.png").read_bytes().startswith(b"\x89PNG")
    page = Page((ladder / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 3 and all(
        image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images
    )
    assert all(stage in page.text for stage in STAGES) and "TripletEncoder" in page.text
    assert f"python reproduce.py --data digits --seeds 2 --out {ladder}" in page.text


def test_means_deviations_and_the_reports_figures():
    one, two = (
        {stage: {"val": v, "test": v + 0.1, "seconds": 1.0, "fit_seconds": v} for stage in STAGES} for v in (0.4, 0.6)
    )
    row = reproduce.summarise([one, two], report=True)[0]
    assert row["val_accuracy"] == pytest.approx(0.5) and row["test_accuracy"] == pytest.approx(0.6)
    assert row["fit_seconds"] == pytest.approx(0.5)
    assert row["val_std"] == pytest.approx(0.2 / 2**0.5) and row["report"] == 0.803
    assert reproduce.summarise([one], report=True)[0]["test_std"] is None


def test_the_probes_read_the_runs_of_their_own_ladder(ladder):
    seed = ladder / "seed_1"
    triplet, supervised = (seed / name / "version_0" for name in ("triplet_encoder", "supervised_encoder"))
    read = {"random_encoder": triplet / "checkpoints/step0.ckpt", "supervised_probe": supervised}
    for name, encoder in {**read, **dict.fromkeys(("linear_probe", "mlp_probe", "fine_tune"), triplet)}.items():
        assert f"run: {encoder}\n" in (seed / name / "version_0" / "config.yaml").read_text()


def test_a_finished_ladder_is_not_run_again(ladder, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "main", lambda args: pytest.fail("ran a stage again"))
    reproduce.reproduce(["--data", "digits", "--seeds", "2", "--out", str(ladder)])
    assert capsys.readouterr().out.count("finished before") == 2 * len(STAGES)


def test_goes_on_at_the_first_stage_that_has_not_finished(ladder, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(ladder, out)
    rows_file = out / "seed_0" / "rows.json"
    rows = json.loads(rows_file.read_text())
    expected = rows.pop("triplet_encoder_linear_probe")
    rows_file.write_text(json.dumps(rows))
    shutil.rmtree(out / "seed_0" / "linear_probe")
    calls, real = [], reproduce.main

    def main(args):
        calls.append(args[0])
        return real([*args, "--trainer.max_steps=2", "--trainer.accelerator=cpu"])

    monkeypatch.setattr(reproduce, "main", main)
    reproduce.reproduce(["--data", "digits", "--seeds", "2", "--out", str(out)])
    assert calls == ["fit", "validate", "test"]
    again = json.loads(rows_file.read_text())["triplet_encoder_linear_probe"]
    assert (again["val"], again["test"]) == (expected["val"], expected["test"])


def test_goes_on_within_a_fit_that_was_killed(tmp_path, monkeypatch):
    often = [
        "--data.batch_size=128",
        "--trainer.max_epochs=3",
        "--trainer.callbacks+=LastCheckpoint",
        "--trainer.callbacks.every_n_steps=3",
    ]
    options = 0, ["--data=DigitsDataModule", "--trainer.accelerator=cpu"], {"softmax_regression": often}
    whole, killed = (reproduce.Ladder(tmp_path / name, *options) for name in ("whole", "killed"))
    expected = whole._classifier("softmax_regression")
    called, real = [], reproduce.main
    monkeypatch.setattr(reproduce, "main", called.append)
    with pytest.raises(AttributeError):  # what stands in for main returns no trainer
        killed._fit("softmax_regression", "softmax_regression")
    assert in_a_process([*called[0], *killer("step", 13, tmp_path / "log")]) == -signal.SIGKILL
    monkeypatch.setattr(reproduce, "main", lambda args: called.append(args) or real(args))
    assert killed._classifier("softmax_regression") == expected
    assert [args[0] for args in called] == ["fit", "fit", "validate", "test"] and called[1][-1] == "--ckpt_path=last"
    files = [next(ladder.out.glob("*/version_0/checkpoints/last.ckpt")) for ladder in (whole, killed)]
    one, two = (load_checkpoint(file)["state_dict"] for file in files)
    assert one["linear.weight"].equal(two["linear.weight"])


def test_results_of_other_data_are_not_mixed(ladder):
    before = (ladder / "results.json").read_text()
    with pytest.raises(InputError, match="give another --out"):
        reproduce.reproduce(["--data", "cifar10", "--out", str(ladder)])
    assert (ladder / "results.json").read_text() == before


@pytest.mark.parametrize("args", [["--seeds", "0"], ["--data", "mnist"], ["--no-such-option"]])
def test_impossible_options(args, tmp_path):
    with pytest.raises(InputError):
        reproduce.reproduce([*args, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
