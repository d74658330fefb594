"""Encoders and probes leave the project: each file gives what the run gives, on its own."""

import json
from pathlib import Path

import pytest
import torch
from callbacks.checkpoints import load_checkpoint

import export as export_module
from callbacks.frozen_encoder import encoder_from_checkpoint
from main import main, one_line


@pytest.fixture
def runs(run, tmp_path):
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]")
    return tmp_path / "runs"


def export(folder, kind, capsys, *more):
    file = main(["export", f"--ckpt_path={folder}", f"--format={kind}", *more])
    return file, float(capsys.readouterr().out.split("largest difference ")[-1].split()[0])


def images(run):
    cli = run("validate", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]", "--ckpt_path=best")
    return cli.datamodule.split("val").images[:7].permute(0, 3, 1, 2).float() / 255


@pytest.mark.filterwarnings("ignore")  # of onnxscript
@pytest.mark.parametrize(
    "kind, stage",
    [
        ("onnx", "encoder"),
        ("onnx", "linear_probe"),
        ("torch_export", "encoder"),
        ("torch_export", "mlp_probe"),
        ("torch_export", "linear_probe_grid"),
        ("safetensors", "encoder"),
        ("safetensors", "supervised_encoder"),
    ],
)
def test_a_file_gives_what_the_run_gives(runs, run, kind, stage, capsys):
    if stage == "encoder":
        folder = runs / "triplet_encoder" / "version_0"
    else:
        config = stage.removesuffix("_grid")
        more = ["--model=LinearProbeGrid", "--model.lr_factors=[1,3]", "--model.weight_decay_factors=[1]"]
        small = ["--model.encoder.init_args.widths=[8,8,16]"] if stage == "supervised_encoder" else []
        cli = run("fit", config, *(more if stage.endswith("grid") else small), "--trainer.max_epochs=2")
        folder = runs / config / "version_0"
    file, difference = export(folder, kind, capsys)
    assert difference <= (0 if kind == "safetensors" else 1e-4)
    x = images(run)
    with torch.no_grad():
        if stage == "encoder":
            expected = encoder_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval().embed(x)
        else:
            cli.model.load_state_dict(
                load_checkpoint(Path(cli.trainer.checkpoint_callback.best_model_path))["state_dict"]
            )
            cli.model.eval().searching = False
            expected = cli.model(x).softmax(1)
    if kind == "onnx":
        import onnx
        import onnxruntime

        found = torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {"images": x.numpy()})[0])
        metadata = {p.key: p.value for p in onnx.load(file).metadata_props}
    elif kind == "torch_export":
        extra = {"class_names": "", "data": "", "encoder": ""}
        found, metadata = torch.export.load(file, extra_files=extra).module()(x), extra
    else:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            found, metadata = expected, opened.metadata()
            weights = {name: opened.get_tensor(name) for name in opened.keys()}
        trained = encoder_from_checkpoint(folder / "checkpoints" / "last.ckpt").state_dict()
        assert all(torch.equal(weights[f"encoder.{name}"], tensor) for name, tensor in trained.items())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(metadata["class_names"])[0] == "airplane" and "train_sha256" in json.loads(metadata["data"])


def test_features_of_a_probe_are_its_encoders(runs, run, capsys):
    run("fit", "linear_probe")
    file, _ = export(runs / "linear_probe" / "version_0", "torch_export", capsys, "--features")
    x = images(run)
    encoder = encoder_from_checkpoint(runs / "triplet_encoder" / "version_0" / "checkpoints" / "last.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(file).module()(x), encoder.embed(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused_in_one_line(runs, run, tmp_path, capsys):
    folder = runs / "triplet_encoder" / "version_0"
    run("fit", "softmax_regression")

    def refused(*args):
        capsys.readouterr()
        assert one_line("main.py", lambda: main(["export", *map(str, args)])) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    taken = tmp_path / "taken.pt2"
    taken.write_text("mine")
    assert "exists" in refused("--ckpt_path", folder, "--format", "torch_export", "--output", taken)
    assert taken.read_text() == "mine"
    assert "pickle" in refused("--ckpt_path", folder, "--format", "pickle")
    assert "no encoder" in refused("--ckpt_path", runs / "softmax_regression" / "version_0", "--format", "torch_export")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("download: true", "download: false"))
    assert "--data_root" in refused("--ckpt_path", folder, "--format", "torch_export")
    main(["export", f"--ckpt_path={folder}", "--format=torch_export", f"--data_root={tmp_path / 'elsewhere'}"])
    config.unlink()
    assert "config.yaml" in refused("--ckpt_path", folder, "--format", "torch_export", "--output", tmp_path / "new.pt2")


def test_a_file_that_differs_from_the_run_is_removed(runs, monkeypatch, capsys):
    written = export_module.FORMATS["torch_export"]
    monkeypatch.setitem(export_module.FORMATS, "torch_export", lambda *args: written(*args) + 1e-3)
    folder = runs / "triplet_encoder" / "version_0"
    assert one_line("main.py", lambda: main(["export", f"--ckpt_path={folder}", "--format=torch_export"])) == 2
    assert "differs from the run by 1.0e-03" in capsys.readouterr().err
    assert not list((folder / "export").iterdir())
