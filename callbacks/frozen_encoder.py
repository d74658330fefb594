"""The hand-over: an encoder run's weights, verified, given to a probe before it has an optimiser."""

import importlib
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging

from checkpoint_file import load_checkpoint
from errors import InputError, first_line, require
from lightning_modules.encoders.contract import Encoder, build_encoder, encoder_weights
from lightning_modules.probe import Probe
from run_folder import Run, resolve_checkpoint


class FrozenEncoder(Callback):
    """Hands a trained encoder to a probe before it is fitted; the probe freezes it.

    Architecture, feature width, normalisation and weights all come from the encoder run's checkpoint. The features of
    the training and validation images are computed once and take the images' place, unless the data is augmented or the
    encoder is trained on (FineTune).

    Args:
        run: checkpoint file or run folder of an encoder (of a folder, the best checkpoint by validation); null: the
            newest finished run in `<runs>/triplet_encoder` (FineTune: in `<runs>/linear_probe`, if there is one).
        runs: folder of all stages' runs; the command line gives the one that this fit's run goes into.
        cache: compute features once; false: in every step, with bit-identical results in float32.
        encoder_module: the Python module of an encoder class of your own. A checkpoint names its class and imports
            nothing.
        encoder: an encoder that no run has trained, in place of a run's, such as RandomPatches.
        other_data: allow an encoder that was trained on other images, labels or classes; a line reports it. One that
            has seen the probe's validation images is refused always.
    """

    def __init__(
        self,
        run: str | None = None,
        cache: bool = True,
        encoder_module: str | None = None,
        runs: str | None = None,
        encoder: Encoder | None = None,
        other_data: bool = False,
    ) -> None:
        import_encoder_module("frozen_encoder.encoder_module", encoder_module)
        require(run is None or encoder is None, "frozen_encoder.run", run, "left out beside frozen_encoder.encoder")
        whole = encoder is None or hasattr(encoder, "feature_dim")
        require(
            whole, "frozen_encoder.encoder", type(encoder).__name__, "one with a feature_dim, such as RandomPatches"
        )
        self.encoder = encoder
        self.run, self.cache, self.runs, self.other_data = run, cache, Path(runs or "runs"), other_data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Probe):
            given = self.run if self.encoder is None else type(self.encoder).__name__
            if given is not None:
                raise InputError(f"frozen_encoder {given}: {type(pl_module).__name__} takes no encoder; only probes do")
            return
        if stage != "fit" or pl_module.encoder is not None:
            return
        if not trainer.datamodule.labelled:
            raise InputError(f"{trainer.datamodule.train_place}: no labels; {pl_module.needs_labels}")
        if not pl_module.trains_encoder and any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):
            raise InputError("StochasticWeightAveraging would reset the frozen encoder's BatchNorm; leave it out")
        data, encoder = trainer.datamodule, self.encoder
        if encoder is not None:
            encoder.run_as().initialize(data.split("train").images)
            checkpoint = {"stage": {"module": None}, "data": data.fingerprint}
        else:
            runs = [self.runs / name for name in pl_module.starts_from]
            newest = next((r for r in runs if any(run.finished is not None for run in Run.all(r))), runs[0])
            path = resolve_checkpoint(self.run, newest) if self.run else Run.newest(newest).best()
            checkpoint = load_checkpoint(path)
            encoder = encoder_from_checkpoint(path, checkpoint)
            other = check_data(path, checkpoint, data, self.other_data)
            if other and trainer.is_global_zero:
                print(f"frozen_encoder.other_data: {path} has an encoder {other}")
        pl_module.adopt(encoder.to(trainer.strategy.root_device), checkpoint)
        # Lightning casts the whole stage later: the features are those of the weights that validate and test read.
        trainer.precision_plugin.convert_module(encoder)
        if self.cache and not pl_module.trains_encoder and not trainer.datamodule.augments:
            with trainer.precision_plugin.forward_context():
                features = {"train": encoder.embed_all(data.evaluation_loader("train"), single_view=True)}
                if data.val_size:
                    features["val"] = encoder.embed_all(data.evaluation_loader("val"))
            data.cache_features(features)


def check_data(path: Path, checkpoint: dict[str, Any], data: LightningDataModule, other_data: bool) -> str:
    """What other classes, images or labels than those of `data` the encoder was trained on; '' for none.

    Raises InputError where there are such and `other_data` is false, or where the encoder has seen validation images of
    `data`. Labels count only where the encoder has used them.
    """
    stage, its = (x if isinstance(x, dict) else {} for x in (checkpoint.get("stage"), checkpoint.get("data")))
    names, own, other = stage.get("class_names"), data.fingerprint, []
    if not isinstance(its.get("pixels_sha256"), str):
        raise InputError(f"{path}: does not say which images the encoder was trained on; fit it again")
    by_labels = stage.get("positives") != "view"
    if by_labels and names != data.class_names:
        other.append(f"of the classes {names}, where this command's are {data.class_names}")
    if its["pixels_sha256"] != own["pixels_sha256"]:
        other.append("trained on other images than this command's")
    elif by_labels and its.get("labels_sha256") != own["labels_sha256"]:
        other.append("trained on the same images with other labels")
    if other and not other_data:
        hint = "give the same data, or --frozen_encoder.other_data true"
        raise InputError(f"{path}: an encoder {' and '.join(other)}; {hint}")
    if all(its.get(name) == own[name] for name in ("pixels_sha256", "val_size", "split_seed")):
        return " and ".join(other)
    seen = checkpoint.get("seen_images")
    if not (isinstance(seen, torch.Tensor) and seen.dtype == torch.int64 and seen.ndim == 1):
        raise InputError(f"{path}: does not say which images the encoder was trained on; fit it again")
    if count := data.seen_in_validation(seen):
        split = f"data.val_size {its.get('val_size')} and data.split_seed {its.get('split_seed')}"
        raise InputError(
            f"{path}: the encoder was trained with {split} and has seen {count} of this command's validation images;"
            " give the same split, or fit the encoder again"
        )
    return " and ".join(other)


def import_encoder_module(option: str, module: str | None) -> None:
    """Imports a Python module, whose encoder classes checkpoints may then name. Raises InputError where it fails."""
    if module is None:
        return
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever that module does
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{option} {module}: cannot be imported ({why})") from error


def encoder_from_checkpoint(path: Path, checkpoint: dict[str, Any]) -> Encoder:
    """Builds the encoder that a stage's checkpoint describes and loads its weights, every tensor of them.

    Raises InputError where the checkpoint is of a stage without an encoder, or does not match; `path` is named then.
    """
    stage = checkpoint.get("stage")
    if not isinstance(stage, dict) or not stage.get("encoder"):
        module = stage.get("module") if isinstance(stage, dict) else "another program"
        raise InputError(f"{path}: a checkpoint of {module}, which has no encoder; give that of an encoder run")
    weights = encoder_weights(checkpoint["state_dict"])
    with torch.device("meta"):  # takes no memory, however large the checkpoint says that the encoder is
        described = build_encoder(stage["encoder"]).state_dict()
    for name in {**described, **weights}:
        found, expected = (tuple(d[name].shape) if name in d else "missing" for d in (weights, described))
        if found != expected:
            kind = stage["encoder"]["class_path"]
            raise InputError(
                f"{path}: the weights do not fit {kind}: {name} is {found}, expected {expected}; fit it again"
            )
    encoder = build_encoder(stage["encoder"])
    encoder.load_state_dict(weights)
    return encoder.eval()
