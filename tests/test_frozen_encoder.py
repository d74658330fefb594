"""The hand-over: through the command line, on tiny images."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.frozen_encoder import encoder_from_checkpoint
from checkpoint_file import load_checkpoint
from datamodules.arrays import random_split
from errors import InputError
from lightning_modules.encoders.contract import weights_sha256

SMALL = "--model.encoder.init_args.widths=[8,8,16]"
PROBES = ("linear_probe", "mlp_probe")
REPORT = "lightning_modules.encoders.report.ReportEncoder"


@pytest.fixture
def encoder_run(run, tmp_path):
    cli = run("fit", "triplet_encoder", SMALL)
    return cli, tmp_path / "runs" / "triplet_encoder" / "version_0"


def head_weights(cli):
    return {k: v.clone() for k, v in cli.model.state_dict().items() if not k.startswith("encoder.")}


@pytest.mark.parametrize("config", PROBES)
def test_probe_reads_the_trained_encoder_and_leaves_it_alone(encoder_run, run, config):
    encoder_cli, folder = encoder_run
    cli = run("fit", config, "--trainer.max_epochs=3")
    handed, trained = cli.model.encoder.state_dict(), encoder_cli.model.encoder.state_dict()
    assert all(torch.equal(handed[k], v) for k, v in trained.items()) and handed.keys() == trained.keys()
    untrained = load_checkpoint(folder / "checkpoints" / "step0.ckpt")["state_dict"]
    assert not torch.equal(handed["blocks.0.0.weight"], untrained["encoder.blocks.0.0.weight"])
    assert handed["blocks.0.2.num_batches_tracked"] == 4  # BatchNorm saw the encoder's own fit and nothing else
    assert not any(p.requires_grad for p in cli.model.encoder.parameters())
    assert not any(m.training for m in cli.model.encoder.modules())
    checkpoint = load_checkpoint(Path(cli.trainer.checkpoint_callback.best_model_path))
    assert checkpoint["stage"]["encoder_sha256"] == weights_sha256(trained)
    optimised = sum(
        v.numel() for s in checkpoint["optimizer_states"] for p in s["state"].values() for v in [p["exp_avg"]]
    )
    assert optimised == sum(p.numel() for p in cli.model.head.parameters())


@pytest.mark.parametrize("config, precision", [*((c, "32-true") for c in PROBES), ("linear_probe", "bf16-true")])
def test_cached_and_recomputed_features_give_the_same_head_bit_for_bit(encoder_run, run, config, precision):
    options = ["--trainer.max_epochs=4", f"--trainer.precision={precision}"]
    cached = head_weights(run("fit", config, *options))
    again = run("fit", config, *options, "--frozen_encoder.cache=false")
    assert again.datamodule.train_features is None
    recomputed = head_weights(again)
    assert cached.keys() == recomputed.keys()
    assert all(torch.equal(cached[k], recomputed[k]) for k in cached)


def test_an_augmenting_probe_trains_on_augmented_images(encoder_run, run):
    plain = head_weights(run("fit", "linear_probe"))
    cli = run("fit", "linear_probe", "--data.translate=2")
    assert cli.datamodule.split("train").images.dtype == torch.uint8
    assert not torch.equal(plain["head.weight"], head_weights(cli)["head.weight"])


def test_probe_checkpoint_needs_no_encoder_file(encoder_run, run, tmp_path):
    _, folder = encoder_run
    cli = run("fit", "linear_probe")
    expected = {k: v.clone() for k, v in cli.model.state_dict().items()}
    folder.rename(folder.with_name("gone"))
    tested = run("test", "linear_probe", "--ckpt_path=best", "--trainer.precision=32-true")
    assert all(torch.equal(tested.model.state_dict()[k], v) for k, v in expected.items())
    images, labels = tested.datamodule.split("test")
    with torch.no_grad():
        logits = tested.model.eval()(images.permute(0, 3, 1, 2).float() / 255)
    accuracy = float((logits.argmax(1) == labels).float().mean())
    assert float(tested.trainer.callback_metrics["test/accuracy"]) == pytest.approx(accuracy)
    run("predict", "linear_probe", "--ckpt_path=last")


def test_any_encoder_run_can_be_handed_over(run, tmp_path):
    run("fit", "supervised_encoder", "--model.encoder=ReportEncoder", "--model.encoder.init_args.feature_dim=12")
    cli = run("fit", "linear_probe", f"--frozen_encoder.run={tmp_path / 'runs' / 'supervised_encoder' / 'version_0'}")
    assert cli.model.head.in_features == 12


def test_a_changed_encoder_is_noticed_at_the_end(encoder_run, run, monkeypatch):
    from lightning_modules import LinearProbe

    def training_step(self, batch, batch_idx):
        self.encoder.blocks[0][2].running_mean += 1e-6
        return super(LinearProbe, self).training_step(batch, batch_idx)

    monkeypatch.setattr(LinearProbe, "training_step", training_step)
    with pytest.raises(InputError, match="frozen encoder has changed"):
        run("fit", "linear_probe")


def test_default_is_the_newest_finished_run(encoder_run, run, tmp_path):
    _, first = encoder_run
    run("fit", "triplet_encoder", SMALL, "--seed_everything=1")
    run("fit", "triplet_encoder", SMALL, "--seed_everything=2")
    (first.with_name("version_2") / "finished.json").unlink()
    cli = run("fit", "linear_probe")
    path = first.with_name("version_1") / "checkpoints" / "last.ckpt"
    expected = encoder_from_checkpoint(path, load_checkpoint(path))
    assert torch.equal(cli.model.encoder.state_dict()["blocks.0.0.weight"], expected.state_dict()["blocks.0.0.weight"])


def test_no_encoder_is_refused(refused):
    refused("fit", "linear_probe", words=["triplet_encoder", "no finished run"])


def test_encoders_that_do_not_fit_are_refused(encoder_run, run, refused, tmp_path):
    _, folder = encoder_run
    good = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weight = "encoder.blocks.1.0.weight"

    def tampered(change):
        checkpoint = copy.deepcopy(good)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "tampered.ckpt")
        return f"--frozen_encoder.run={tmp_path / 'tampered.ckpt'}"

    refused(
        "fit",
        "linear_probe",
        tampered(lambda c: c["state_dict"].pop(weight)),
        words=[f"{weight[8:]} is missing, expected"],
    )
    narrow = tampered(lambda c: c["state_dict"].update({weight: c["state_dict"][weight][:, 1:]}))
    refused("fit", "linear_probe", narrow, words=[weight[8:], "expected (8, 8, 3, 3)"])
    extra = tampered(lambda c: c["state_dict"].update({"encoder.extra": torch.zeros(1)}))
    refused("fit", "linear_probe", extra, words=["extra is (1,), expected missing"])
    other = tampered(lambda c: c["stage"].update(encoder={"class_path": REPORT, "init_args": {}}))
    refused("fit", "linear_probe", other, words=[f"do not fit {REPORT}"])
    unknown = tampered(lambda c: c["stage"].update(encoder={"class_path": "subprocess.Popen", "init_args": {}}))
    refused("fit", "linear_probe", unknown, words=["subprocess.Popen", "is not one of"])
    run("fit", "linear_probe", tampered(lambda c: None))  # the good twin

    run("fit", "softmax_regression")
    softmax = tmp_path / "runs" / "softmax_regression" / "version_0"
    refused("fit", "linear_probe", f"--frozen_encoder.run={softmax}", words=["SoftmaxRegression", "no encoder"])
    missing = tmp_path / "nothing.ckpt"
    refused("fit", "linear_probe", f"--frozen_encoder.run={missing}", words=[str(missing), "no such file"])
    refused("fit", "softmax_regression", f"--frozen_encoder.run={folder}", words=["takes no encoder"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_probe_whose_encoder_is_not_the_one_it_was_fitted_on_is_refused(encoder_run, run, refused, tmp_path, command):
    run("fit", "linear_probe")
    checkpoint = load_checkpoint(tmp_path / "runs/linear_probe/version_0/checkpoints/last.ckpt")
    checkpoint["state_dict"]["encoder.blocks.0.0.weight"] += 1e-6
    torch.save(checkpoint, tmp_path / "other.ckpt")
    words = ["the encoder in this probe's checkpoint is not the one it was fitted on"]
    refused(command, "linear_probe", f"--ckpt_path={tmp_path / 'other.ckpt'}", words=words)


def test_a_probe_does_not_resume_on_another_encoder(encoder_run, run, refused):
    run("fit", "linear_probe")
    run("fit", "triplet_encoder", SMALL, "--seed_everything=1")
    refused("fit", "linear_probe", "--ckpt_path=last", words=["fitted on another encoder", "--frozen_encoder.run"])


def test_a_hand_over_reads_one_checkpoint_once(encoder_run, run, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(path) or load(path, **options))
    run("fit", "linear_probe")
    assert len(read) == 1


@pytest.fixture
def probe_run(encoder_run, run):
    return run("fit", "linear_probe", "--trainer.max_epochs=2")


FINE_TUNE = ("--trainer.precision=32-true", "--model.schedule=constant")


def test_fine_tuning_starts_from_the_linear_probe_and_trains_both(encoder_run, probe_run, run, tmp_path):
    start = load_checkpoint(probe_run.run.best())["state_dict"]
    untrained = load_checkpoint(Path(run("fit", "fine_tune", *FINE_TUNE).trainer.log_dir) / "checkpoints/step0.ckpt")
    assert [k for k, v in start.items() if not torch.equal(untrained["state_dict"][k], v)] == []

    tuned = run("fit", "fine_tune", *FINE_TUNE).model.state_dict()
    for trained in ("encoder.blocks.0.0.weight", "head.weight"):
        assert not torch.equal(tuned[trained], start[trained])
    count = "encoder.blocks.0.2.num_batches_tracked"
    assert tuned[count] == start[count] + 4  # BatchNorm too
    for fixed in ("encoder.whiten.weight", "encoder.blocks.0.2.weight", "encoder.mean", "standardize.mean"):
        assert torch.equal(tuned[fixed], start[fixed])
    run("test", "fine_tune", "--ckpt_path=last")


def test_fine_tuning_resumed_ends_as_if_never_stopped(probe_run, run):
    options = [*FINE_TUNE, "--trainer.max_epochs=3"]
    whole = run("fit", "fine_tune", *options).model.state_dict()
    run("fit", "fine_tune", *options, "--trainer.max_steps=6")
    resumed = run("fit", "fine_tune", *options, "--ckpt_path=last")
    assert resumed.trainer.global_step == 12
    assert all(torch.equal(resumed.model.state_dict()[k], v) for k, v in whole.items())


def test_encoder_has_its_own_learning_rate(probe_run, run):
    cli = run("fit", "fine_tune", *FINE_TUNE, "--model.lr=0.02", "--model.encoder_lr=0.003")
    assert [g["lr"] for g in cli.trainer.optimizers[0].param_groups] == pytest.approx([0.02, 0.02, 0.003])


def test_fine_tuning_without_a_probe_starts_from_the_encoder_with_a_new_head(encoder_run, run):
    cli = run("fit", "fine_tune", *FINE_TUNE)
    step0 = load_checkpoint(Path(cli.trainer.log_dir) / "checkpoints/step0.ckpt")["state_dict"]
    assert not step0["head.weight"].any() and step0["standardize.mean"].any()


def test_impossible_fine_tuning_is_refused(encoder_run, refused):
    refused("fit", "fine_tune", "--model.encoder_lr=-1", words=["encoder_lr -1", "above 0"])


def test_an_encoder_of_other_classes_images_or_split_is_refused(encoder_run, run, refused, tiny):
    _, folder = encoder_run
    probe = "fit", "linear_probe", f"--frozen_encoder.run={folder}"
    for options in ({"val_size": 50, "split_seed": 1}, {"val_size": 70, "split_seed": 0}):
        _, own = random_split(300, options["val_size"], options["split_seed"])
        _, of_encoder = random_split(300, 50, 0)
        seen = len(set(own.tolist()) - set(of_encoder.tolist()))
        words = ["val_size 50 and data.split_seed 0", f"has seen {seen} of this command's validation images"]
        refused(*probe, *(f"--data.{k}={v}" for k, v in options.items()), words=words)
    refused(*probe, "--data.classes=[0,1]", "--data.batch_size=20", words=["airplane", "give the same data"])
    run(*probe)
    split = ["--ckpt_path=best", "--data.split_seed=1"]
    refused("test", "linear_probe", *split, words=["data.split_seed is 0, this command's is 1"])
    with np.load(tiny / "cifar10_train.npz") as file:
        np.savez(tiny / "cifar10_train.npz", images=255 - file["images"], labels=file["labels"])
    refused(*probe, words=["trained on other images"])
    refused("validate", "linear_probe", "--ckpt_path=best", words=["data.pixels_sha256"])


def test_an_encoder_that_nobody_trains_needs_no_run(tmp_path, run, refused):
    patches = ["--frozen_encoder.encoder=RandomPatches", "--frozen_encoder.encoder.patches=5"]
    whole = run("fit", "linear_probe", *patches, "--trainer.max_epochs=2")
    run("fit", "linear_probe", *patches, "--trainer.max_epochs=2", "--trainer.max_steps=5")  # within the second epoch
    resumed = run("fit", "linear_probe", *patches, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert resumed.run.folder == tmp_path / "runs/random_patches_linear_probe/version_1"
    own, other = (cli.model.encoder.state_dict() for cli in (whole, resumed))
    assert all(torch.equal(own[name], other[name]) for name in own) and own["weight"].abs().sum() > 0
    again = ["--trainer.max_epochs=2", "--seed_everything=1", "--ckpt_path=last"]
    refused("fit", "linear_probe", *patches, *again, words=["another encoder"])
    run("test", "linear_probe", *patches, "--ckpt_path=best")
    refused(
        "fit", "linear_probe", *patches, f"--frozen_encoder.run={tmp_path}", words=["frozen_encoder.run", "left out"]
    )
    refused("fit", "softmax_regression", *patches, words=["RandomPatches", "takes no encoder"])
    base = "--frozen_encoder.encoder=lightning_modules.encoders.contract.Encoder"
    refused("fit", "linear_probe", base, words=["frozen_encoder.encoder Encoder", "feature_dim"])
