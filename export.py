"""Exports the model of a run: one file that gives class probabilities or features without this project.

    python main.py export --ckpt_path runs/triplet_encoder/version_0 --format onnx           # features
    python main.py export --ckpt_path runs/linear_probe/version_0 --format torch_export      # class probabilities
    python main.py export --ckpt_path runs/linear_probe/version_0 --format safetensors --features

The file takes images (B, 3, 32, 32) float32 in [0, 1], any B. Normalisation and the average over an image's views are
inside; a safetensors file holds the weights alone. The file is compared with the run's own stage on up to 1,000 of the
run's validation images (training images where it held none out), and it is removed where they differ by more than 1e-4.
Its metadata hold the class names, the data's fingerprint, and how the encoder is built.
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from callbacks.frozen_encoder import import_encoder_module
from checkpoint_file import load_checkpoint
from datamodules.in_memory import InMemoryDataModule
from errors import InputError, OneLineParser, causes, first_line
from files import write
from lightning_modules import Stage, TripletEncoder
from lightning_modules.encoders.contract import weights_sha256
from run_folder import Run, resolve_checkpoint

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
VERIFIED, BATCH, TOLERANCE = 1000, 256, 1e-4
ANY_BATCH = ({0: torch.export.Dim("batch")},)


def _options(args: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("main.py export", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="run folder (its best checkpoint) or checkpoint file")
    parser.add_argument("--format", required=True, choices=SUFFIXES)
    parser.add_argument("--features", action="store_true", help="for a classifier, export its encoder alone")
    parser.add_argument("--output", type=Path, help="file to write (default: export/ in the run's folder)")
    parser.add_argument("--data_root", help="folder of the run's data, where it is not where the run found it")
    parser.add_argument("--encoder_module", help="Python module of a class of your own that the run used")
    return parser.parse_args(args)


def export(args: list[str] | None = None) -> Path:
    """Exports and verifies; returns the file. Raises InputError for bad input."""
    options = _options(args)
    import_encoder_module("--encoder_module", options.encoder_module)
    path = resolve_checkpoint(options.ckpt_path, Path("runs"))
    checkpoint = load_checkpoint(path)
    stage, data = restored(path, checkpoint, options.data_root)
    images = data.split("val" if data.val_size else "train").images[:VERIFIED].permute(0, 3, 1, 2).float() / 255
    encoder, run = getattr(stage, "encoder", None), Run.of(path)
    if options.features and encoder is None:
        raise InputError(f"{path}: {type(stage).__name__} has no encoder; leave --features out")
    features = options.features or isinstance(stage, TripletEncoder)
    name = f"{'encoder' if features else 'classifier'}{SUFFIXES[options.format]}"
    file = options.output or (run.folder if run else path.parent) / "export" / name
    if file.exists():
        raise InputError(f"{file} exists; give another --output, or remove it")
    metadata = {
        "gives": "features" if features else "probabilities",
        "class_names": json.dumps(stage.class_names),
        "data": json.dumps(checkpoint["data"]),
        "encoder": json.dumps(checkpoint["stage"].get("encoder")),
    }
    if encoder is not None:
        metadata |= {"encoder_sha256": weights_sha256(encoder.state_dict()), "contrast_dim": str(encoder.contrast_dim)}
    own = encoder.embed if features else lambda x: stage.probabilities(stage(x))
    model = stage.predictor(features=features).eval().requires_grad_(False)
    try:
        written = FORMATS[options.format](model, file, metadata, images[:2])
        with torch.no_grad():
            difference = max(float((written(x) - own(x)).abs().max()) for x in images.split(BATCH))
        if not difference <= TOLERANCE:
            raise InputError(f"{file}: differs from the run by {difference:.1e} and was removed; give another --format")
    except ImportError as error:
        raise InputError(
            f"--format {options.format} needs {error.name or error}: pip install -e '.[export]'"
        ) from error
    except BaseException:
        file.unlink(missing_ok=True)  # whatever is left has been compared
        raise
    print(f"{file}: {metadata['gives']}, largest difference {difference:.1e} on {len(images)} images")
    return file


def restored(path: Path, checkpoint: dict, data_root: str | None) -> tuple[Stage, InMemoryDataModule]:
    """The stage that a checkpoint's config describes, with its weights, and its data. Raises InputError for others."""
    try:
        config = yaml.safe_load(checkpoint["made_by"]["config"])
        config = {name: dict(config[name]) for name in ("model", "data")}
        if data_root:
            config["data"]["init_args"] = {**(config["data"].get("init_args") or {}), "root": data_root}
        for module in re.findall(r"class_path: (\S+)\.", yaml.safe_dump(config)):
            if module not in sys.modules:  # a checkpoint imports nothing
                raise InputError(f"it names a class of {module}: give --encoder_module {module}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Stage, "model", fail_untyped=False, required=True)
        parser.add_subclass_arguments(InMemoryDataModule, "data", fail_untyped=False, required=True)
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        made = parser.instantiate_classes(parser.parse_object(config))
        made.data.split("train")
        if made.data.fingerprint != checkpoint["data"]:
            raise InputError("these are not the images that the run was trained on")
        made.model.restore(checkpoint)
    except Exception as error:  # of whatever kind the content of a file leads to
        *_, root = found = list(causes(error))  # jsonargparse wraps what a constructor raises
        cause = next((e for e in found if isinstance(e, InputError)), root)
        remedy = "where the run's data has moved, give --data_root"
        raise InputError(f"{path}: cannot be built from the config in it ({first_line(cause)}); {remedy}") from error
    return made.model, made.data


def _onnx(model: nn.Module, file: Path, metadata: dict[str, str], example: Tensor) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    names = {"input_names": ["images"], "output_names": [metadata["gives"]]}
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False, **names)
    graph = program.model_proto
    onnx.helper.set_model_props(graph, metadata)
    write(file, graph.SerializeToString())
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _torch_export(model: nn.Module, file: Path, metadata: dict[str, str], example: Tensor) -> nn.Module:
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch.export.save warns of other layouts
    program = torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH)
    write(file, lambda out: torch.export.save(program, out, extra_files=metadata))
    return torch.export.load(file).module()


def _safetensors(model: nn.Module, file: Path, metadata: dict[str, str], example: Tensor) -> nn.Module:
    from safetensors.torch import load_file, save

    write(file, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, metadata))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(load_file(file))
    return loaded


# Each writes the file and returns the function of images (B, 3, 32, 32) that it holds.
FORMATS = {"onnx": _onnx, "torch_export": _torch_export, "safetensors": _safetensors}
