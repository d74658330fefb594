"""The hand-over: an encoder run's weights, verified and frozen, given to a probe before it has an optimiser."""

import hashlib
import importlib
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer

from callbacks.checkpoints import load_checkpoint, newest_finished, resolve_checkpoint
from errors import InputError, first_line
from lightning_modules.encoders import Encoder, build_encoder


class FrozenEncoder(Callback):
    """Hands a trained encoder to a module that has a place for one (`pl_module.encoder is None`) before it is fitted.

    Architecture, feature width, normalisation and weights all come from the encoder run's checkpoint. The features of
    the training and validation images are computed once and put in their place, unless the data is augmented. The
    encoder is checked to be unchanged when the fit ends; its SHA-256 is in every checkpoint of the probe.

    With `unfreeze_at_epoch` the encoder stays as handed over until that epoch and is then trained on with the head: the
    fine-tuning of the assignment's network B; weight decay and `l2_lambda` stay the head's alone. Both digests are then
    in the checkpoint, that of the encoder handed over and that of the trained one (`trained_encoder_sha256`).

    Args:
        run: checkpoint file or run folder of an encoder (of a folder, the best checkpoint by validation); null: the
            newest finished run in `<save_dir>/triplet_encoder`.
        cache: compute features once; false: in every step, with bit-identical results in float32.
        unfreeze_at_epoch: train the encoder too from this epoch on (the first is 0); null: never.
        encoder_lr: its learning rate, which follows the schedule of the head's; null: a tenth of the head's.
        encoder_module: the Python module of an encoder class of your own; a checkpoint names its class, and imports none.
    """

    def __init__(
        self,
        run: str | None = None,
        cache: bool = True,
        unfreeze_at_epoch: int | None = None,
        encoder_lr: float | None = None,
        encoder_module: str | None = None,
    ) -> None:
        import_encoder_module("frozen_encoder.encoder_module", encoder_module)
        if unfreeze_at_epoch is not None and unfreeze_at_epoch < 0:
            raise InputError(
                f"frozen_encoder.unfreeze_at_epoch {unfreeze_at_epoch}: must be 0 or more, or null for never"
            )
        if encoder_lr is not None and (unfreeze_at_epoch is None or not encoder_lr > 0):
            raise InputError(f"frozen_encoder.encoder_lr {encoder_lr}: must be above 0, and needs unfreeze_at_epoch")
        self.run, self.cache, self.unfreeze_at_epoch, self.encoder_lr = run, cache, unfreeze_at_epoch, encoder_lr
        self.sha256: str | None = None
        self._was_released = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        takes_encoder = "encoder" in vars(pl_module) and pl_module.encoder is None
        for option in ("run", "unfreeze_at_epoch"):
            if getattr(self, option) is not None and not takes_encoder:
                name = type(pl_module).__name__
                raise InputError(
                    f"frozen_encoder.{option} {getattr(self, option)}: {name} takes no encoder; only probes do"
                )
        if stage != "fit" or not takes_encoder:
            return
        runs = Path(trainer.logger.save_dir if trainer.logger else "runs")
        path = resolve_checkpoint(self.run or str(newest_finished(runs / "triplet_encoder")), runs / "triplet_encoder")
        encoder = encoder_from_checkpoint(path).eval().to(trainer.strategy.root_device)
        _check_data(path, load_checkpoint(path), trainer.datamodule)
        self.sha256 = encoder_sha256(encoder)
        if self.unfreeze_at_epoch is not None:
            self._prepare_release(trainer, pl_module)
        else:
            encoder.requires_grad_(False)
        if self.cache and self.unfreeze_at_epoch is None and not trainer.datamodule.augments:
            with trainer.precision_plugin.forward_context():
                loaders = [trainer.datamodule.evaluation_loader(split) for split in ("train", "val")]
                features = encoder.embed_all(loaders[0], single_view=True), encoder.embed_all(loaders[1])
            trainer.datamodule.replace_images(dict(zip(("train", "val"), features)))
        pl_module.encoder = encoder

    def _prepare_release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimiser knows the encoder's weights from the start (so that a resumed run finds the same groups), but
        # no gradient reaches them before the release, and it leaves weights without a gradient alone.
        if 0 <= (trainer.max_epochs or -1) <= self.unfreeze_at_epoch:
            raise InputError(
                f"frozen_encoder.unfreeze_at_epoch {self.unfreeze_at_epoch}: the fit has only {trainer.max_epochs} epochs"
            )
        if trainer.world_size > 1 and not getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
            raise InputError(
                "frozen_encoder.unfreeze_at_epoch on several processes needs --trainer.strategy"
                " ddp_find_unused_parameters_true, since the encoder has no gradient at first"
            )
        pl_module.encoder_lr = pl_module.lr / 10 if self.encoder_lr is None else self.encoder_lr

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        # Not at the epoch's start, which a run resumed in the middle of one does not pass.
        if self.unfreeze_at_epoch is None or pl_module.released or trainer.current_epoch < self.unfreeze_at_epoch:
            return
        if not self._was_released:
            self._assert_unchanged(pl_module)
        pl_module.released = True
        pl_module.encoder.train()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sha256 is not None and not pl_module.released:
            self._assert_unchanged(pl_module)

    def _assert_unchanged(self, pl_module: LightningModule) -> None:
        if encoder_sha256(pl_module.encoder) != self.sha256:
            raise RuntimeError("the frozen encoder changed while the probe was fitted; do not use this probe")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if self.sha256 is not None:
            checkpoint["encoder_sha256"], checkpoint["unfreeze_at_epoch"] = self.sha256, self.unfreeze_at_epoch
            if pl_module.released:
                checkpoint["trained_encoder_sha256"] = encoder_sha256(pl_module.encoder)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if self.sha256 is None:
            return
        if checkpoint.get("encoder_sha256") != self.sha256:
            raise InputError(
                "this probe was fitted on another encoder than the one handed over now; give the same --frozen_encoder.run"
            )
        if checkpoint.get("unfreeze_at_epoch") != self.unfreeze_at_epoch:
            raise InputError(
                f"this probe was fitted with frozen_encoder.unfreeze_at_epoch {checkpoint.get('unfreeze_at_epoch')}, this"
                f" command says {self.unfreeze_at_epoch}; give the same, or start a new fit without --ckpt_path"
            )
        self._was_released = "trained_encoder_sha256" in checkpoint


def _check_data(path: Path, checkpoint: dict, datamodule: LightningDataModule) -> None:
    """Raises InputError unless the encoder was trained on the classes and the split that the probe is trained on."""
    stage, data = (x if isinstance(x, dict) else {} for x in (checkpoint.get("stage"), checkpoint.get("data")))
    names = stage.get("class_names")
    if names != datamodule.class_names:
        raise InputError(
            f"{path}: an encoder of the classes {names}; this command's are {datamodule.class_names}; give the same data"
        )
    own = datamodule.fingerprint
    if data.get("train_sha256") != own["train_sha256"]:
        raise InputError(f"{path}: the encoder was trained on other images than this command's; give it the same data")
    if data != own:
        if data.keys() != own.keys() or not all(type(data[k]) is int for k in ("val_size", "split_seed")):
            raise InputError(f"{path}: does not say which images the encoder was trained on; fit it again")
        split = f"data.val_size {data['val_size']} and data.split_seed {data['split_seed']}"
        seen = datamodule.seen_in_validation(data["val_size"], data["split_seed"])
        raise InputError(
            f"{path}: the encoder was trained with {split} and has seen {seen} of this command's validation images; give"
            " the same split, or fit the encoder again"
        )


def import_encoder_module(option: str, module: str | None) -> None:
    """Makes the encoder classes of a Python module known, which a checkpoint only names. Raises InputError where it fails."""
    if module is None:
        return
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever that module does
        raise InputError(
            f"{option} {module}: cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error


def encoder_from_checkpoint(path: Path) -> Encoder:
    """Builds the encoder that a stage's checkpoint describes and loads its weights, every tensor of them.

    Raises InputError where the checkpoint is damaged, is of a stage without an encoder, or does not match.
    """
    checkpoint = load_checkpoint(path)
    stage = checkpoint.get("stage")
    if not isinstance(stage, dict) or not stage.get("encoder"):
        module = stage.get("module") if isinstance(stage, dict) else "another program"
        raise InputError(f"{path}: a checkpoint of {module}, which has no encoder; give that of an encoder run")
    weights = {k.removeprefix("encoder."): v for k, v in checkpoint["state_dict"].items() if k.startswith("encoder.")}
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
    return encoder


def encoder_sha256(encoder: torch.nn.Module) -> str:
    """Digest of all tensors of the encoder, buffers too, with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
