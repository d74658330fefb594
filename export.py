"""Takes an encoder, or an encoder with its probe, out of a run: one file that works without this project.

    python main.py export --ckpt_path runs/triplet_encoder/version_0 --format onnx           # features
    python main.py export --ckpt_path runs/linear_probe/version_0 --format torch_export      # class probabilities
    python main.py export --ckpt_path runs/linear_probe/version_0 --format safetensors --features

The file takes images (B, 3, 32, 32) float32 in [0, 1], any B; normalisation and the averaging over an image's views are inside. What it
gives is compared with the run on 1,000 of its validation images, and above a difference of 1e-4 it is removed. Metadata hold
the class names, the data's fingerprint, and how the encoder is built.
"""

import argparse
import copy
import json
from importlib import import_module
from pathlib import Path

import torch
import yaml
from callbacks.checkpoints import load_checkpoint, resolve_checkpoint, run_folder, write_atomically
from jsonargparse import ArgumentError, ArgumentParser
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from callbacks.frozen_encoder import encoder_from_checkpoint, encoder_sha256, import_encoder_module
from errors import InputError, first_line
from lightning_modules.encoders.contract import Encoder, view, view_list

import_module("datamodules")  # whose classes a run's config may name without their package
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
# What a run may hold on top of its encoder, by the names of its weights: linear layers, with ReLU between two.
HEADS = (("classifier",), ("head",), ("head.0", "head.3"))
VERIFIED, BATCH, TOLERANCE = 1000, 256, 1e-4


class Exported(nn.Module):
    """images (B, 3, 32, 32) in [0, 1] → features (B, D), or class probabilities (B, C) where there is a head."""

    def __init__(self, encoder: Encoder, weights: dict[str, Tensor], features: bool) -> None:
        super().__init__()
        # Taken from the buffers now: a traced graph cannot ask them, as `Encoder.embed` does.
        self.encoder, self.views = encoder, view_list(bool(encoder.mirror), int(encoder.shift))
        self.head = None if features else _head(weights)
        for name, default in (("feature_mean", torch.zeros), ("feature_std", torch.ones)):
            self.register_buffer(name, weights.get(name, default(encoder.feature_dim)))

    def forward(self, images: Tensor) -> Tensor:
        features = sum(self.encoder(view(images, *which)) for which in self.views) / len(self.views)
        if self.head is None:
            return features
        return self.head((features - self.feature_mean) / self.feature_std).softmax(1)


def _head(weights: dict[str, Tensor]) -> nn.Module | None:
    weights = dict(weights)
    if "chosen" in weights:  # a grid of probes
        for kind, kinds in (("weight", "weights"), ("bias", "biases")):
            weights[f"head.{kind}"] = weights[f"head.{kinds}.{int(weights['chosen'])}"]
    for names in HEADS:
        if all(f"{name}.weight" in weights for name in names):
            layers = []
            for name in names:
                weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
                layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
                layers += [layer, nn.ReLU()]
            return nn.Sequential(*layers[:-1])
    raise InputError("the checkpoint has no classifier; give --features to export its encoder alone")


def export(args: list[str] | None = None) -> Path:
    """Exports and verifies; returns the file. Raises InputError for bad input."""
    parser = argparse.ArgumentParser(
        "main.py export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(InputError(message))
    parser.add_argument(
        "--ckpt_path", required=True, help="run folder (its best checkpoint by validation) or checkpoint file"
    )
    parser.add_argument("--format", required=True, choices=SUFFIXES)
    parser.add_argument("--features", action="store_true", help="of a run with a classifier, export the encoder alone")
    parser.add_argument("--output", type=Path, help="file to write (default: export/ in the run's folder)")
    parser.add_argument("--data_root", help="folder of the run's data, where it is not where the run found it")
    parser.add_argument("--encoder_module", help="Python module of an encoder class of your own")
    options = parser.parse_args(args)

    import_encoder_module("--encoder_module", options.encoder_module)
    path = resolve_checkpoint(options.ckpt_path, Path("runs"))
    checkpoint = load_checkpoint(path)
    encoder = encoder_from_checkpoint(path).eval()
    stage = checkpoint["stage"]
    features = options.features or stage["module"] == "TripletEncoder"
    with torch.no_grad():
        model = Exported(encoder, checkpoint["state_dict"], features).eval().requires_grad_(False)
    run = run_folder(path) or path.parent
    kind = "encoder" if features else "classifier"
    file = options.output or run / "export" / f"{kind}{SUFFIXES[options.format]}"
    if file.exists():
        raise InputError(f"{file} exists; give another --output, or remove it")
    metadata = {
        "gives": "features" if features else "probabilities",
        "class_names": stage["class_names"],
        "data": checkpoint.get("data"),
        "encoder": stage["encoder"],
        "encoder_sha256": encoder_sha256(encoder),
    }
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    images = _validation_images(run / "config.yaml", options.data_root)
    written = FORMATS[options.format](model, file, metadata, images)
    with torch.no_grad():
        expected = torch.cat([model(x) for x in images.split(BATCH)])
    difference = float((written - expected).abs().max())
    if not difference <= TOLERANCE:
        file.unlink()
        raise InputError(
            f"{file}: differs from the run by {difference:.1e} on its images and was removed; give another --format"
        )
    print(
        f"{file}: {metadata['gives']} {tuple(expected.shape[1:])}, largest difference {difference:.1e} on {len(images)} images"
    )
    return file


def _validation_images(config: Path, root: str | None) -> Tensor:
    """(≤ 1000, 3, 32, 32) in [0, 1], of the run's own validation split."""
    try:
        data = yaml.safe_load(config.read_text())["data"]
        if root:
            data.setdefault("init_args", {})["root"] = root
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data")
        images = parser.instantiate_classes(parser.parse_object({"data": data})).data.split("val").images
    except InputError as error:
        raise InputError(
            f"{error}; the run's validation images are needed to verify the export: give --data_root"
        ) from error
    except (OSError, yaml.YAMLError, ArgumentError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{config}: does not say which data the run had ({first_line(error)}); export from its run folder"
        ) from error
    return images[:VERIFIED].permute(0, 3, 1, 2).float() / 255


def _onnx(model: Exported, file: Path, metadata: dict[str, str], images: Tensor) -> Tensor:
    try:
        onnx, onnxruntime, _ = map(import_module, ("onnx", "onnxruntime", "onnxscript"))  # torch.onnx needs the last
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: pip install -e '.[export]'") from error
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(
        model, (images[:2],), dynamo=True, input_names=["images"], output_names=[metadata["gives"]],
        dynamic_shapes={"images": batch}, verbose=False,
    )  # fmt: skip
    graph = program.model_proto
    onnx.helper.set_model_props(graph, metadata)
    write_atomically(file, lambda out: out.write(graph.SerializeToString()))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x in images.split(BATCH)])


def _torch_export(model: Exported, file: Path, metadata: dict[str, str], images: Tensor) -> Tensor:
    batch = {0: torch.export.Dim("batch")}
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch.export.save warns of other layouts
    program = torch.export.export(model, (images[:2],), dynamic_shapes={"images": batch})
    write_atomically(file, lambda out: torch.export.save(program, out, extra_files=metadata))
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        return torch.cat([loaded(x) for x in images.split(BATCH)])


def _safetensors(model: Exported, file: Path, metadata: dict[str, str], images: Tensor) -> Tensor:
    try:
        from safetensors.torch import load_file, save
    except ImportError as error:
        raise InputError(f"--format safetensors needs {error.name}: pip install -e '.[export]'") from error
    data = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, metadata)
    write_atomically(file, lambda out: out.write(data))
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
        loaded.load_state_dict(load_file(file))
        return torch.cat([loaded(x) for x in images.split(BATCH)])


FORMATS = {"onnx": _onnx, "torch_export": _torch_export, "safetensors": _safetensors}
