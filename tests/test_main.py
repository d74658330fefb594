"""The command line as a user calls it: every shipped config through main(args), run folders, files, checkpoints."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, LARGER, STAGES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from main import main

ROOT = Path(__file__).parent.parent
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # what `!python main.py` gets there
PROBES = ("triplet_encoder", "linear_probe", "mlp_probe", "fine_tune")


def shipped(tmp_path, command, config, *more):
    """A shipped config with only data, step count and the place of runs overridden."""
    runs = f"--trainer.logger.save_dir={tmp_path / 'runs'}"
    fixed = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--data=DigitsDataModule", runs]
    return main([command, *fixed, *more])


@pytest.mark.parametrize("config", STAGES)
def test_shipped_config_fits_and_tests(tmp_path, config):
    steps = ["--trainer.max_steps=2"]
    for start in {"linear_probe": PROBES[:1], "mlp_probe": PROBES[:1], "fine_tune": PROBES[:2]}.get(config, ()):
        shipped(tmp_path, "fit", start, *steps, "--pictures=false")
    shipped(tmp_path, "fit", config, *steps)
    run = tmp_path / "runs" / config / "version_0"
    fitted = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    names = {p.name for p in fitted}
    assert {"config.yaml", "metrics.csv", "curves.png", "finished.json", "last.ckpt", "step0.ckpt"} <= names
    assert ("tsne.png" in names) == config.endswith("encoder")
    assert ("views.png" in names) == (config == "label_free_encoder")
    note = json.loads((run / "finished.json").read_text())
    assert note["steps"] == 2 and 100 < note["peak_memory_mib"]["main memory"] < 100_000

    cli = shipped(tmp_path, "test", config, "--ckpt_path=best")
    name = "test/view_accuracy" if config == "label_free_encoder" else "test/accuracy"
    assert 0 <= float(cli.trainer.callback_metrics[name]) <= 1
    assert {p: p.read_bytes() for p in fitted} == fitted  # test overwrites nothing of fit
    assert {p.name for p in (run / "test_0").iterdir()} >= {"config.yaml"}


def test_all_stages_have_a_config():
    assert set(STAGES) == {
        "logistic_regression",
        "softmax_regression",
        "supervised_encoder",
        "label_free_encoder",
        "random_patches_linear_probe",
        *PROBES,
    }


@pytest.mark.parametrize("config", LARGER)
def test_larger_encoders_differ_from_the_default_where_they_say(tmp_path, config):
    small = ["--model.encoder.init_args.widths=[8,8,8]", "--model.compile_mode=null", "--trainer.max_steps=2"]
    shipped(tmp_path, "fit", config, *small)
    base = config.rsplit("_", 1)[0]
    assert (tmp_path / f"runs/{base}/version_0/finished.json").is_file()  # where the probes look

    def options(name):
        return dict(flat(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())))

    def flat(node, path=""):
        for key, value in node.items():
            yield from flat(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)]

    default, larger = options(base), options(config)
    differing = {key.split(".")[-1] for key in default.keys() | larger.keys() if default.get(key) != larger.get(key)}
    gpu = {"residual", "compile_mode", "batch_size", "benchmark"} if config.endswith("_gpu") else set()
    labelled = {"translate", *({"lr", "cutout"} if gpu else ())} if base == "triplet_encoder" else set()
    assert differing == {"widths", "max_epochs"} | gpu | labelled


def test_metrics_curves_and_events(tmp_path, run):
    cli = run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,8]", "--trainer.max_epochs=3")
    folder = tmp_path / "runs" / "triplet_encoder" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["epoch"]) for r in rows] == [("4", "1"), ("8", "2"), ("12", "3")]
    final = {k: float(v) for k, v in rows[-1].items()}
    for key in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert final[key] == pytest.approx(float(cli.trainer.callback_metrics[key]))
    events = EventAccumulator(str(folder)).Reload().Tags()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(events["scalars"])
    assert set(events["images"]) == {"curves", "tsne", "val_sample/pca"}


def test_a_second_run_gets_the_next_folder(tmp_path, run):
    run("fit", "softmax_regression")
    first = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    run("fit", "softmax_regression")
    assert {p: p.read_bytes() for p in first} == first
    assert {p.name for p in (tmp_path / "runs" / "softmax_regression").iterdir()} == {"version_0", "version_1"}


def test_checkpoints_by_name_file_and_folder(tmp_path, run):
    run("fit", "softmax_regression", "--trainer.max_epochs=4", "--model.lr=0.01")
    folder = tmp_path / "runs" / "softmax_regression" / "version_0"
    best = next(p for p in (folder / "checkpoints").glob("epoch*"))
    last = folder / "checkpoints" / "last.ckpt"

    def tested(path):
        return run("test", "softmax_regression", f"--ckpt_path={path}").model.linear.weight

    def stored(path):
        return torch.load(path, weights_only=True)["state_dict"]["linear.weight"]

    for name, file in (("best", best), ("last", last), (folder, best), (best, best), (last, last)):
        assert torch.equal(tested(name), stored(file))
    assert sorted(p.name for p in folder.glob("test_*")) == [f"test_{k}" for k in range(5)]


def test_best_is_chosen_by_validation_accuracy(tmp_path, run):
    by_accuracy = ["--best_checkpoint.monitor=val/accuracy", "--best_checkpoint.mode=max"]
    options = ["--trainer.max_epochs=6", "--model.lr=3", "--model.schedule=constant", *by_accuracy]
    cli = run("fit", "softmax_regression", *options)
    with (tmp_path / "runs/softmax_regression/version_0/metrics.csv").open() as file:
        accuracies = {int(r["step"]): float(r["val/accuracy"]) for r in csv.DictReader(file)}
    step = int(Path(cli.trainer.checkpoint_callback.best_model_path).stem.split("step=")[1])
    assert accuracies[step] == max(accuracies.values())


def test_last_is_the_last_epoch_even_where_an_earlier_one_was_better(tmp_path, run):
    run("fit", "softmax_regression", "--trainer.max_epochs=6", "--model.lr=3", "--model.schedule=constant")
    checkpoints = tmp_path / "runs/softmax_regression/version_0/checkpoints"
    best = next(int(p.stem.split("step=")[1]) for p in checkpoints.glob("epoch*"))
    assert best < 24 and torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 24


def test_last_is_there_where_max_steps_ends_a_fit_that_validates_nothing(tmp_path, run):
    whole, short = (
        ["--trainer.limit_val_batches=0", "--model.schedule=constant", f"--trainer.max_steps={steps}"]
        for steps in (3, 2)
    )
    run("fit", "softmax_regression", *short)
    last = tmp_path / "runs/softmax_regression/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    resumed, expected = (
        run("fit", "softmax_regression", *whole, "--ckpt_path=last"),
        run("fit", "softmax_regression", *whole),
    )
    assert resumed.model.linear.weight.equal(expected.model.linear.weight)


def test_fit_goes_on_in_its_own_folder_and_ends_as_if_never_stopped(tmp_path, run):
    options = ["--model.encoder.init_args.widths=[8,8,8]", "--model.schedule=constant"]
    whole = run("fit", "triplet_encoder", *options, "--trainer.max_epochs=4")
    run("fit", "triplet_encoder", *options, "--trainer.max_epochs=2")
    resumed = run("fit", "triplet_encoder", *options, "--trainer.max_epochs=4", "--ckpt_path=last")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    folder = tmp_path / "runs" / "triplet_encoder"
    assert {p.name for p in folder.iterdir()} == {"version_0", "version_1"}
    assert {"config.yaml", "config_1.yaml"} <= {p.name for p in (folder / "version_1").iterdir()}
    assert (folder / "version_0/metrics.csv").read_text() == (folder / "version_1/metrics.csv").read_text()


def test_saved_config_repeats_the_run(tmp_path, run):
    first = run("fit", "softmax_regression", "--model.lr=0.037", "--seed_everything=5")
    config = tmp_path / "runs" / "softmax_regression" / "version_0" / "config.yaml"
    again = main(["fit", "--config", str(config)])
    assert again.model.lr == 0.037
    assert torch.equal(first.model.linear.weight, again.model.linear.weight)
    tested = main(["test", "--config", str(config), "--ckpt_path=last"])
    assert torch.equal(tested.model.linear.weight, again.model.linear.weight)


def test_an_encoders_neighbours_vote(tmp_path, run):
    """`predict` by the neighbours whose accuracy `validate` tells."""
    small = ["--model.encoder.widths=[8,8,8]", "--model.knn_k=5", "--trainer.precision=32-true"]
    run("fit", "triplet_encoder", "--trainer.max_epochs=4", *small)
    cli = run("predict", "triplet_encoder", "--ckpt_path=best", *small)
    with (tmp_path / "runs" / "triplet_encoder" / "version_0" / "predict_0" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels, expected = cli.datamodule.split("test").labels.tolist(), []
    with torch.no_grad():
        (train, of), (test, _) = (cli.datamodule.split(name) for name in ("train", "test"))
        pixels = [x.permute(0, 3, 1, 2).float() / 255 for x in (train, test)]
        bank, queries = cli.model.encoder.embed(pixels[0], shifted=False), cli.model.encoder.embed(pixels[1])
    for query in queries:
        similarity = torch.cosine_similarity(query[None], bank)
        nearest = similarity.argsort(descending=True)[:5]
        votes = torch.zeros(10).index_add_(0, of[nearest], (similarity[nearest] / 0.07).exp())
        expected.append((votes.argmax().item(), (votes.max() / votes.sum()).item()))
    assert [int(row["label"]) for row in rows] == [label for label, _ in expected]
    assert [float(row["probability"]) for row in rows] == pytest.approx([p for _, p in expected], abs=1e-4)
    tested = run("test", "triplet_encoder", "--ckpt_path=best", *small)
    right = sum(int(row["label"]) == label for row, label in zip(rows, labels)) / len(labels)
    assert float(tested.trainer.callback_metrics["test/knn_accuracy"]) == pytest.approx(right)


def test_command_line_wins_over_the_checkpoint(tmp_path, run):
    run("fit", "softmax_regression", "--model.lr=0.5")
    assert run("test", "softmax_regression", "--model.lr=0.25", "--ckpt_path=best").model.lr == 0.25


def test_predictions(tmp_path, run):
    run("fit", "softmax_regression", "--trainer.max_epochs=5")
    cli = run("predict", "softmax_regression", "--ckpt_path=best")
    folder = tmp_path / "runs" / "softmax_regression" / "version_0"
    with (folder / "predict_0" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        images = cli.datamodule.split("test").images.permute(0, 3, 1, 2).float() / 255
        probabilities, labels = cli.model(images).softmax(1).max(1)
    assert [int(r["index"]) for r in rows] == list(range(60))
    assert [int(r["label"]) for r in rows] == labels.tolist()
    assert [r["class_name"] for r in rows] == [cli.datamodule.class_names[c] for c in labels]
    assert [float(r["probability"]) for r in rows] == pytest.approx(probabilities.tolist(), abs=2e-6)
    run("predict", "softmax_regression", "--prediction_writer.labels_only=true", "--ckpt_path=best")
    assert (folder / "predict_1" / "predictions.csv").read_text().split() == [str(c) for c in labels.tolist()]


def test_validate_measures_what_the_fit_measured(run):
    for stage in (*PROBES, "softmax_regression", "supervised_encoder"):
        small = ["--model.encoder.init_args.widths=[8,8,8]"] if stage.endswith("_encoder") else []
        options = [*small, "--trainer.precision=32-true", "--data.val_size=61", "--pictures=false"]
        fitted = run("fit", stage, *options).trainer.callback_metrics
        validated = run("validate", stage, *options, "--ckpt_path=last").trainer.callback_metrics
        shared = {name for name in fitted if name in validated}
        assert shared == {"val/loss", "val/accuracy"}, stage
        for name in shared:
            assert float(validated[name]) == pytest.approx(float(fitted[name]), abs=1e-6), (stage, name)
        assert ("val/views_accuracy" in validated) == (stage == "supervised_encoder")


def test_the_supervised_encoders_views_accuracy_is_the_tests(tmp_path, run):
    """The validation images as a test file: `test` finds what `validate` calls `val/views_accuracy`."""
    run("fit", "supervised_encoder", "--model.encoder.init_args.widths=[8,8,8]", "--pictures=false")
    options = ["--model.encoder.init_args.widths=[8,8,8]", "--pictures=false", "--ckpt_path=last"]
    cli = run("validate", "supervised_encoder", *options)
    images, labels = cli.datamodule.split("val")
    np.savez(tmp_path / "data" / "cifar10_test.npz", images=images.numpy(), labels=labels.numpy())
    tested = run("test", "supervised_encoder", *options).trainer.callback_metrics
    assert float(tested["test/accuracy"]) == float(cli.trainer.callback_metrics["val/views_accuracy"])


def test_two_processes_are_started_by_main(tmp_path, tiny):
    """Real gloo processes: global batches, sample order and normalisation are those of one process."""
    options = [
        "--config", str(ROOT / "configs" / "softmax_regression.yaml"), f"--data.root={tiny}", "--data.val_size=50",
        "--data.batch_size=60", "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    weights = []
    for devices in (1, 2):
        runs = tmp_path / f"runs{devices}"
        command = [sys.executable, "main.py", "fit", *options, f"--trainer.logger.save_dir={runs}"]
        done = subprocess.run([*command, f"--trainer.devices={devices}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        last = runs / "softmax_regression" / "version_0" / "checkpoints" / "last.ckpt"
        weights.append(torch.load(last, weights_only=True)["state_dict"]["linear.weight"])
        assert len(list((runs / "softmax_regression").iterdir())) == 1
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_version_and_closing_line(tmp_path, tiny):
    done = subprocess.run(
        [sys.executable, "main.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"version = {done.stdout.strip()}\n" in (ROOT / "setup.cfg").read_text()


def test_bad_input_through_the_real_command(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "test",
        "--config",
        str(ROOT / "configs" / "softmax_regression.yaml"),
    ]
    options = {"env": {**os.environ, **NOTEBOOK}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--ckpt_path", "nowhere.ckpt"], cwd=tmp_path, **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr == "main.py: checkpoint nowhere.ckpt: no such file or run folder\n"
    assert not list(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "reproduce.py", "--seeds=0"], cwd=ROOT, **options)
    assert done.stderr == "reproduce.py: --seeds 0: must be at least 1\n" and done.returncode == 2


def test_a_fit_with_callbacks_of_its_own_or_without_a_logger_ends_in_its_lines_too(tmp_path, run, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        "fit",
        "triplet_encoder",
        "--model.encoder.widths=[8,8,8]",
        "--trainer.max_steps=1",
        "--trainer.callbacks=Curves",
    )
    assert f"Next: python main.py fit --config {CONFIGS / 'linear_probe.yaml'}" in capsys.readouterr().out
    run(
        "fit",
        "softmax_regression",
        "--trainer.max_steps=1",
        "--trainer.callbacks=TQDMProgressBar",
        "--trainer.logger=false",
    )
    written = tmp_path / "runs" / "softmax_regression" / "version_0"
    assert {path.name for path in written.iterdir()} >= {"checkpoints", "config.yaml", "metrics.csv", "curves.png"}


def test_a_batch_whose_pairs_fill_the_memory_is_worked_on_in_blocks(run, monkeypatch, capsys):
    options = [
        "--trainer.max_steps=3",
        "--model.encoder.widths=[8,8,8]",
        "--trainer.precision=64-true",
        "--model.loss=SupConLoss",
    ]
    whole = run("fit", "triplet_encoder", *options)
    assert "blocks" not in capsys.readouterr().out
    for module in ("losses.triplets", "triplet_encoder"):
        monkeypatch.setattr(f"lightning_modules.{module}.MATRIX", 10 * whole.datamodule.batch_size)
    blocks = run("fit", "triplet_encoder", *options)
    assert "are worked on in 6 blocks" in capsys.readouterr().out
    for ours, theirs in zip(blocks.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert blocks.trainer.callback_metrics["train/accuracy"] == whole.trainer.callback_metrics["train/accuracy"]
