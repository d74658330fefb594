"""Encoders and classifiers leave the project: each file gives what the run gives, on its own."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS
from torch import nn

import export as export_module
from checkpoint_file import load_checkpoint
from datamodules import DigitsDataModule
from lightning_modules import MLPProbe
from lightning_modules.encoders import Encoder
from main import main, one_line
from run_folder import resolve_checkpoint


class Tiny(Encoder):
    """Sixteen numbers of the means of patches; a network of a few layers takes seconds to trace."""

    feature_dim = 16

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 16)

    def features(self, images):
        return self.linear(F.avg_pool2d(images, 8).flatten(1))


class GELUProbe(MLPProbe):
    """A head of the layers that MLPProbe has, but for the activation."""

    def build_head(self, feature_dim):
        head = super().build_head(feature_dim)
        head[1] = nn.GELU()
        return head


class DeepProbe(MLPProbe):
    """A head of three layers."""

    def build_head(self, feature_dim):
        head = super().build_head(feature_dim)
        return head.append(nn.ReLU()).append(nn.Linear(self.num_classes, self.num_classes))


STAGES = {
    "triplet_encoder": ["--model.encoder.init_args.widths=[8,8,16]"],
    "tiny_encoder": ["--model.encoder=test_export.Tiny"],
    "supervised_encoder": ["--model.encoder.init_args.widths=[8,8,16]"],
    "logistic_regression": ["--data.classes=[0,1]"],
    "softmax_regression": [],
    "linear_probe": [],
    "mlp_probe": ["--model.dropout=0.3"],
    "fine_tune": [],
    "linear_probe_grid": ["--model=LinearProbeGrid", "--model.lr_factors=[1,3]", "--model.weight_decay_factors=[1]"],
    "gelu_probe": ["--model=test_export.GELUProbe"],
    "deep_probe": ["--model=test_export.DeepProbe"],
}
PROBES = {"linear_probe_grid": "linear_probe", "gelu_probe": "mlp_probe", "deep_probe": "mlp_probe"}
CONFIG = {"tiny_encoder": "triplet_encoder", **PROBES}
ON = {"fine_tune": "linear_probe", **dict.fromkeys(["linear_probe", "mlp_probe", *PROBES], "tiny_encoder")}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Runs of a few steps on digits by their stage, made when first asked for: the CLI and the run's folder."""
    base, made = tmp_path_factory.mktemp("runs"), {}

    def get(stage):
        if stage not in made:
            on = [f"--frozen_encoder.run={get(ON[stage])[1]}"] if stage in ON else []
            cli = main([
                "fit", "--config", str(CONFIGS / f"{CONFIG.get(stage, stage)}.yaml"), "--data=DigitsDataModule",
                "--data.batch_size=128", *STAGES[stage], *on, "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                f"--trainer.logger.save_dir={base}", f"--trainer.logger.name={stage}", "--pictures=false", "--quiet",
            ])  # fmt: skip
            made[stage] = cli, base / stage / "version_0"
        return made[stage]

    return get


@pytest.fixture(scope="module")
def images():
    return DigitsDataModule().split("val").images[:7].permute(0, 3, 1, 2).float() / 255


def stage_of(cli, folder):
    """The module that was fitted, with the weights of the run's best checkpoint, as in a test."""
    checkpoint = load_checkpoint(resolve_checkpoint(str(folder), folder.parent))
    cli.model.load_state_dict(checkpoint["state_dict"])
    cli.model.searching, cli.trainer.state.fn = False, "test"
    return cli.model.eval()


def export(folder, kind, capsys, *more):
    file = main(["export", f"--ckpt_path={folder}", f"--format={kind}", *more])
    return file, float(capsys.readouterr().out.split("largest difference ")[-1].split()[0])


@pytest.mark.filterwarnings("ignore")  # of onnxscript
@pytest.mark.parametrize(
    "kind, stage",
    [
        ("onnx", "triplet_encoder"),
        ("onnx", "linear_probe"),
        ("torch_export", "triplet_encoder"),
        ("torch_export", "mlp_probe"),
        ("torch_export", "gelu_probe"),
        ("torch_export", "deep_probe"),
        ("torch_export", "linear_probe_grid"),
        ("torch_export", "logistic_regression"),
        ("safetensors", "softmax_regression"),
        ("safetensors", "triplet_encoder"),
        ("safetensors", "supervised_encoder"),
        ("safetensors", "fine_tune"),
    ],
)
def test_a_file_gives_what_the_run_gives(fitted, images, kind, stage, capsys):
    cli, folder = fitted(stage)
    file, difference = export(folder, kind, capsys)
    assert difference <= 1e-4
    x, own = images, stage_of(cli, folder)
    with torch.no_grad():
        expected = own.encoder.embed(x) if stage == "triplet_encoder" else own.probabilities(own(x))
    if kind == "onnx":
        import onnx
        import onnxruntime

        found = torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {"images": x.numpy()})[0])
        metadata = {p.key: p.value for p in onnx.load(file).metadata_props}
    elif kind == "torch_export":
        metadata = {"gives": "", "class_names": "", "data": "", "encoder": ""}
        found = torch.export.load(file, extra_files=metadata).module()(x)
    else:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata, weights = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
        predictor = own.predictor()
        predictor.load_state_dict(weights)
        found = predictor(x)
        trained = {name: tensor for name, tensor in own.state_dict().items() if name.startswith("encoder.")}
        assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    assert metadata["gives"] == ("features" if stage == "triplet_encoder" else "probabilities")
    assert json.loads(metadata["class_names"]) == own.class_names and "pixels_sha256" in json.loads(metadata["data"])


def test_features_of_a_probe_are_its_encoders(fitted, capsys):
    own, folder = fitted("linear_probe")
    file, _ = export(folder, "safetensors", capsys, "--features")
    from safetensors import safe_open

    assert file.name == "encoder.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["gives"] == "features" and not any("head" in name for name in opened.keys())
        encoder_sha256 = opened.metadata()["encoder_sha256"]
        assert opened.metadata()["contrast_dim"] == str(own.model.encoder.contrast_dim)
    encoder_file, _ = export(fitted("tiny_encoder")[1], "safetensors", capsys, f"--output={file.parent / 'own'}")
    with safe_open(encoder_file, "pt") as opened:
        assert opened.metadata()["encoder_sha256"] == encoder_sha256


def refusal(capsys, *args):
    capsys.readouterr()
    assert one_line("main.py", lambda: main(["export", *map(str, args)])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_exported_is_refused_in_one_line(fitted, tmp_path, capsys):
    _, folder = fitted("softmax_regression")
    taken = tmp_path / "taken.pt2"
    taken.write_text("mine")
    run = ["--ckpt_path", folder]
    assert "exists" in refusal(capsys, *run, "--format", "torch_export", "--output", taken)
    assert taken.read_text() == "mine"
    assert "pickle" in refusal(capsys, *run, "--format", "pickle")
    assert "no encoder" in refusal(capsys, *run, "--format", "torch_export", "--features")
    checkpoint = load_checkpoint(resolve_checkpoint(str(folder), folder.parent))
    for change, words in (
        ({"made_by": None}, "config"),
        ({"made_by": {"config": "model: SoftmaxRegression"}}, "config"),
        ({"state_dict": {}}, "linear"),
        ({"data": {**checkpoint["data"], "pixels_sha256": "0"}}, "--data_root"),
    ):
        torch.save({**checkpoint, **change}, tmp_path / "other.ckpt")
        line = refusal(capsys, "--ckpt_path", tmp_path / "other.ckpt", "--format", "safetensors")
        assert words in line and "other.ckpt" in line
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_imports_nothing(fitted, tmp_path, monkeypatch, capsys):
    _, folder = fitted("softmax_regression")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('imported')")
    checkpoint = load_checkpoint(resolve_checkpoint(str(folder), folder.parent))
    config = checkpoint["made_by"]["config"].replace("lightning_modules.SoftmaxRegression", "elsewhere.Stage")
    assert "elsewhere.Stage" in config
    torch.save({**checkpoint, "made_by": {"config": config}}, tmp_path / "other.ckpt")
    line = refusal(capsys, "--ckpt_path", tmp_path / "other.ckpt", "--format", "safetensors")
    assert "--encoder_module elsewhere" in line


def test_data_that_has_moved_is_asked_for(run, tmp_path, capsys):
    run("fit", "softmax_regression")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    args = ["--ckpt_path", tmp_path / "runs" / "softmax_regression" / "version_0", "--format", "safetensors"]
    assert "--data_root" in refusal(capsys, *args)
    assert main(["export", *map(str, args), f"--data_root={tmp_path / 'elsewhere'}"]).is_file()


def test_a_file_that_differs_from_the_run_is_removed(fitted, monkeypatch, capsys):
    def worse(*args):
        written = export_module._safetensors(*args)
        return lambda images: written(images) + 1e-3

    monkeypatch.setitem(export_module.FORMATS, "safetensors", worse)
    file = fitted("softmax_regression")[1] / "export" / "worse"
    args = ["--ckpt_path", file.parent.parent, "--format", "safetensors", "--output", file]
    assert "differs from the run by 1.0e-03" in refusal(capsys, *args)
    assert not file.exists()
