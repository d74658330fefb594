"""The ladder on digits with few steps: its files, resuming after a stop, and what it refuses."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
from test_killed import in_a_process, killer
from test_report import Page

import reproduce
from checkpoint_file import load_checkpoint
from errors import InputError
from reproduce import LADDER, PLAIN, Ladder, Step

STAGES = [step.name for step in LADDER]
SHORT = ("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--quiet")
SMALL = {"triplet_encoder": ("--tsne.samples=60",), "supervised_encoder": (), "label_free_encoder": ()}
SECOND = ("triplet_encoder_knn", "triplet_encoder_linear_probe")


def short(step):
    small = ("--model.encoder.init_args.widths=[8,8,16]", *SMALL[step.config]) if step.config in SMALL else ()
    return replace(step, digits=(*step.digits, *SHORT, *small))


def run(out, seeds, steps=LADDER):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "LADDER", tuple(short(step) for step in steps))
        reproduce.reproduce(["--data", "digits", "--seeds", str(seeds), "--out", str(out)])


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A finished ladder of one seed, two training steps a stage."""
    out = tmp_path_factory.mktemp("ladder")
    run(out, 1)
    return out


@pytest.fixture(scope="module")
def two_seeds(ladder, tmp_path_factory):
    """That ladder with a second seed for some of its stages."""
    out = tmp_path_factory.mktemp("two") / "copy"
    shutil.copytree(ladder, out)
    run(out, 2, [step for step in LADDER if step.name in SECOND])
    return out


def test_results(ladder):
    rows = json.loads((ladder / "results.json").read_text())
    assert [row["stage"] for row in rows] == STAGES
    numbers = {"val_accuracy", "test_accuracy", "val_std", "test_std", "seconds", "fit_seconds", "training_seconds"}
    for row in rows:
        assert set(row) == {"stage", "report", *numbers}
        assert 0 < row["val_accuracy"] <= 1 and 0 < row["test_accuracy"] <= 1
        assert 0 < row["fit_seconds"] < row["seconds"] and row["fit_seconds"] <= row["training_seconds"]
        assert row["val_std"] is None and row["test_std"] is None
        assert row["report"] is None  # the report's figures are CIFAR-10's
    table = (ladder / "results.md").read_text()
    assert all(f"| {stage} |" in table for stage in STAGES)
    assert (ladder / "results.png").read_bytes().startswith(b"\x89PNG")
    page = Page((ladder / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 3
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert all(stage in page.text for stage in STAGES) and "TripletEncoder" in page.text
    assert f"python reproduce.py --data digits --seeds 1 --out {ladder}" in page.text


def test_several_seeds_have_deviations(two_seeds):
    rows = json.loads((two_seeds / "results.json").read_text())
    assert [row["stage"] for row in rows] == [stage for stage in STAGES if stage in SECOND]
    assert all(row["val_std"] >= 0 and row["test_std"] >= 0 for row in rows)
    assert "±" in (two_seeds / "results.md").read_text()


def test_means_deviations_and_the_reports_figures():
    one, two = (
        {stage: {"val": v, "test": v + 0.1, "seconds": 1.0, "fit_seconds": v} for stage in STAGES} for v in (0.4, 0.6)
    )
    row = reproduce.summarise([one, two], report=True)[0]
    assert row["val_accuracy"] == pytest.approx(0.5) and row["test_accuracy"] == pytest.approx(0.6)
    assert row["fit_seconds"] == pytest.approx(0.5)
    assert row["val_std"] == pytest.approx(0.2 / 2**0.5) and row["report"] == 0.803
    assert reproduce.summarise([one], report=True)[0]["test_std"] is None


def test_training_seconds_are_those_of_all_fits_that_a_stage_rests_on():
    fits = dict(zip(STAGES, (2.0**k for k in range(len(STAGES)))))
    ladder = {stage: {"val": 1.0, "test": 1.0, "seconds": 1.0, "fit_seconds": fits[stage]} for stage in STAGES}
    found = {row["stage"]: row["training_seconds"] for row in reproduce.summarise([ladder], report=False)}
    encoder, probe = fits["triplet_encoder_knn"], fits["triplet_encoder_linear_probe"]
    assert found["softmax_regression"] == fits["softmax_regression"] and found["triplet_encoder_knn"] == encoder
    assert found["random_encoder_linear_probe"] == fits["random_encoder_linear_probe"]
    assert found["triplet_encoder_linear_probe"] == encoder + probe
    assert found["fine_tuned_encoder"] == encoder + probe + fits["fine_tuned_encoder"]
    supervised = fits["supervised_encoder"] + fits["supervised_encoder_linear_probe"]
    assert found["supervised_encoder_linear_probe"] == supervised


def test_the_probes_read_the_runs_of_their_own_ladder(ladder, two_seeds):
    seed = ladder / "seed_0"
    names = ("triplet_encoder", "linear_probe", "supervised_encoder", "label_free_encoder", "label_free_probe")
    triplet, probe, supervised, label_free, label_free_probe = (seed / name / "version_0" for name in names)
    read = {
        "random_encoder": triplet / "checkpoints/step0.ckpt", "linear_probe": triplet, "mlp_probe": triplet,
        "fine_tune": probe, "supervised_probe": supervised,
        "random_all_blocks": label_free / "checkpoints/step0.ckpt",
        "label_free_probe": label_free, "label_free_mlp_probe": label_free, "label_free_fine_tuned": label_free_probe,
    }  # fmt: skip
    runs = {seed / name / "version_0": encoder for name, encoder in read.items()}
    second = two_seeds / "seed_1"
    runs[second / "linear_probe" / "version_0"] = second / "triplet_encoder" / "version_0"
    for run_folder, encoder in runs.items():
        assert f"run: {encoder}\n" in (run_folder / "config.yaml").read_text()


def test_a_finished_ladder_is_not_run_again(ladder, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "main", lambda args: pytest.fail("ran a stage again"))
    reproduce.reproduce(["--data", "digits", "--out", str(ladder)])
    assert capsys.readouterr().out.count("finished before") == len(STAGES)


def test_resumes_at_the_first_stage_that_has_not_finished(ladder, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(ladder, out)
    rows_file = out / "seed_0" / "rows.json"
    rows = json.loads(rows_file.read_text())
    expected = rows.pop("triplet_encoder_linear_probe")
    rows_file.write_text(json.dumps(rows))
    shutil.rmtree(out / "seed_0" / "linear_probe")
    calls, real = [], reproduce.main
    monkeypatch.setattr(reproduce, "main", lambda args: calls.append(args[0]) or real(args))
    run(out, 1)
    assert calls == ["fit", "validate", "test"]
    again = json.loads(rows_file.read_text())["triplet_encoder_linear_probe"]
    assert (again["val"], again["test"]) == (expected["val"], expected["test"])


def test_resumes_within_a_fit_that_was_killed(tmp_path, monkeypatch):
    often = ("--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--last_checkpoint.every_n_steps=3", "--quiet")
    step = Step("softmax_regression", "softmax_regression", "softmax_regression", digits=(PLAIN, *often))
    data = ["--data=DigitsDataModule", "--data.batch_size=128"]
    whole, killed = (Ladder(tmp_path / name, 0, data, True) for name in ("whole", "killed"))
    expected = whole.row(step)
    called, real = [], reproduce.main
    monkeypatch.setattr(reproduce, "main", called.append)
    with pytest.raises(AttributeError):  # what stands in for main returns no trainer
        killed.row(step)
    assert in_a_process([*called[0], *killer("step", 13, tmp_path / "log")]) == -signal.SIGKILL
    monkeypatch.setattr(reproduce, "main", lambda args: called.append(args) or real(args))
    found = killed.row(step)
    assert (found["val"], found["test"]) == (expected["val"], expected["test"])
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
