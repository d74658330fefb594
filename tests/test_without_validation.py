"""A fit on all training images: `data.val_size 0`."""

import json

import torch

from checkpoint_file import load_checkpoint

ALL = "--data.val_size=0"
SMALL = "--model.encoder.init_args.widths=[8,8,16]"


def test_a_fit_on_all_images_validates_nothing_and_its_last_checkpoint_is_the_best(run, tmp_path, capsys):
    cli = run("fit", "triplet_encoder", ALL, SMALL, "--trainer.max_epochs=2")
    folder = tmp_path / "runs/triplet_encoder/version_0"
    assert cli.trainer.global_step == 10 and len(cli.datamodule.training_digests) == 300
    note = json.loads((folder / "finished.json").read_text())
    assert note["best"] is None and not any(name.startswith("val") for name in note["metrics"])
    assert sorted(p.name for p in (folder / "checkpoints").glob("*.ckpt")) == [
        "last.ckpt",
        "previous.ckpt",
        "step0.ckpt",
    ]
    assert "--data.val_size=0" in capsys.readouterr().out.split("Next: ")[1]

    probe = run("fit", "linear_probe", ALL, "--trainer.max_epochs=2")
    assert probe.trainer.global_step == 10 and probe.datamodule.train_features.shape == (300, 16)
    run("test", "linear_probe", ALL, "--ckpt_path=best")
    tested = tmp_path / "runs/linear_probe/version_0/test_0"
    assert "all training images" in (tested / "report.html").read_text()
    run("test", "triplet_encoder", ALL, SMALL, "--ckpt_path=best")

    from export import export

    last = folder / "checkpoints" / "last.ckpt"
    export(["--ckpt_path", str(last), "--format", "torch_export", "--data_root", str(tmp_path / "data")])
    assert "on 300 images" in capsys.readouterr().out


def test_a_fit_on_all_images_resumes_within_an_epoch(run, tmp_path):
    options = ALL, SMALL, "--model.schedule=constant", "--trainer.max_epochs=2"
    whole = run("fit", "triplet_encoder", *options).model.state_dict()
    run("fit", "triplet_encoder", *options, "--trainer.max_steps=7")
    last = load_checkpoint(tmp_path / "runs/triplet_encoder/version_1/checkpoints/last.ckpt")
    assert last["global_step"] == 7
    resumed = run("fit", "triplet_encoder", *options, "--ckpt_path=last")
    assert all(torch.equal(resumed.model.state_dict()[name], tensor) for name, tensor in whole.items())


def test_checkpoints_do_not_wait_for_a_validation_that_never_comes(run, tmp_path):
    run("fit", "triplet_encoder", ALL, SMALL, "--trainer.val_check_interval=2", "--trainer.max_steps=2")
    assert (tmp_path / "runs/triplet_encoder/version_0/checkpoints/last.ckpt").is_file()


def test_what_needs_validations_is_refused(run, refused):
    run("fit", "triplet_encoder", ALL, SMALL)
    refused("fit", "linear_probe", words=["has seen 50 of this command's validation images"])
    refused("validate", "triplet_encoder", ALL, SMALL, "--ckpt_path=best", words=["data.val_size 0", "this command"])
    refused("fit", "linear_probe", ALL, "--model=LinearProbeGrid", words=["data.val_size 0", "a grid chooses"])
    plateau = "--model.schedule=plateau"
    refused("fit", "softmax_regression", ALL, plateau, words=["data.val_size 0", "model.schedule plateau"])
    stopping = "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"
    refused("fit", "softmax_regression", ALL, *stopping, words=["data.val_size 0", "EarlyStopping"])
