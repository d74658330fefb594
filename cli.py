"""The command line: LightningCLI with one resolver for checkpoints, one line for an error, one line at the end."""

import argparse
import logging
import os
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks import FrozenEncoder, LastCheckpoint, Progress, Report, RunFiles, RunLogger
from callbacks.checkpoints import AtomicCheckpointIO, load_checkpoint, resolve_checkpoint, run_folder
from callbacks.run_files import peak_memory
from errors import InputError, first_line

for package in ("datamodules", "lightning_modules"):
    import_module(package)  # jsonargparse finds `DigitsDataModule` or `SupConLoss` by the bare name once it is imported

if not torch.cuda.is_available():
    # Lightning has CUDA looked for by NVML, for which an optimiser opens its library anew at every step.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

# The trainer's lines about TPUs and other products; its warnings stay, but for those that are about our own intent.
for name in (
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
    "lightning_fabric.utilities.seed",
):
    logging.getLogger(name).setLevel(logging.WARNING)
for message in (
    r".*in eval mode at the start of training",  # the frozen encoder
    r".*The dirpath has changed from",  # test and predict write beside the checkpoints they read
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run writes on in its folder
    r".*smaller than the logging interval",  # epochs are logged all the same
    r".*args parameter is intended to run from within Python",  # reproduce.py does
    ".*is not supported by the model summary",  # bf16: the size of the weights in MB is that of float32, as it is
    r".*isinstance\(treespec, LeafSpec\)",  # inside Lightning
):
    warnings.filterwarnings("ignore", message)


class OneLineParser(LightningArgumentParser):
    """Raises InputError with the cause instead of printing usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        # jsonargparse nests: the key, then the types that were tried and why each failed, then the value given.
        cause, given = lines[0], lines[-1]
        if "Errors:" in lines:
            cause = f"{cause} {lines[lines.index('Errors:') + 1]}"
            if len(given) < 100 and "NestedArg" not in given:  # the outer key's, which the inner ones have said
                cause = f"{cause}. {given}"
        elif len(lines) > 1 and len(cause) <= 300:
            cause = f"{cause} {given}"
        cause = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", cause)
        raise InputError(cause.replace('"<unicode string>"', "a --config file")[:500]) from ex


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the description's lines, which are examples, as they are."""


class CLI(LightningCLI):
    """`fit | validate | test | predict`; `--ckpt_path best | last | FILE | RUN_FOLDER`."""

    def __init__(self, args: list[str] | None = None, description: str = "") -> None:
        shown = {"description": description, "formatter_class": HelpFormatter}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunFiles,
            trainer_defaults={"callbacks": [LastCheckpoint(), Report()]},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=OneLineParser,
            parser_kwargs={**shown, **dict.fromkeys(self.subcommands(), shown)},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # How checkpoints are read is not the user's choice here.
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        try:
            super().parse_arguments(parser, args)
        except InputError:
            raise
        except Exception as error:  # a config that is not text, not a mapping, or deeper than Python goes
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"the options or a --config file cannot be read ({why})") from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {first_line(error)}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables, no closing lines")
        parser.add_lightning_class_args(FrozenEncoder, "frozen_encoder")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Replaces Lightning's, which lets hyperparameters in the file override the command line. Here the command line
        # defines the model, and Stage.on_load_checkpoint refuses a checkpoint that does not fit it.
        command = self.config["subcommand"]
        config = self.config[command]
        if config.trainer is None:
            raise InputError("trainer: null: leave the key out for the defaults, or give options below it")
        logger = config.trainer.logger
        named = hasattr(logger, "class_path") and "name" in logger.init_args
        self.runs = Path(logger.init_args.save_dir) / logger.init_args.name if named else Path("runs")
        for path in (self.runs, *self.runs.parents):
            if path.exists() and not path.is_dir():
                raise InputError(
                    f"{path}: not a folder, and the run's folder is to lie in it; give --trainer.logger.save_dir"
                )
        self.checkpoint = None
        if config.ckpt_path is not None:
            prefer = "start" if command == "fit" else "best"
            self.checkpoint = resolve_checkpoint(config.ckpt_path, self.runs, prefer)
            load_checkpoint(self.checkpoint)
            config.ckpt_path = str(self.checkpoint)
        elif command != "fit":
            raise InputError(f"{command} needs trained weights: give --ckpt_path best|last|FILE|RUN_FOLDER")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        if config.quiet:
            trainer.enable_progress_bar = trainer.enable_model_summary = False
            if "verbose" in config:
                config.verbose = False
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        bars = [c for c in callbacks if c is not None and c.class_path.endswith("ProgressBar")]
        if trainer.enable_progress_bar is not False and not bars:
            self.trainer_defaults["callbacks"].append(Progress())
        if trainer.precision is None:
            trainer.precision = "bf16-mixed" if bf16_is_native(trainer.accelerator) else "32-true"

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MisconfigurationException:
            raise
        except Exception as error:
            cause = error  # jsonargparse wraps what a class's constructor raises
            while not isinstance(cause, InputError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, InputError):
                raise cause from error
            why = f"{type(cause).__name__}: {first_line(cause)}"
            raise InputError(f"trainer, model or data cannot be made with these options ({why})") from error

    def after_instantiate_classes(self) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        logger = self.trainer.logger
        if self.checkpoint is None or not isinstance(logger, RunLogger):
            return
        folder = run_folder(self.checkpoint)
        if self.subcommand != "fit":
            parent = folder or self.runs
            taken = {p.name for p in parent.glob(f"{self.subcommand}_*")}
            k = next(k for k in range(len(taken) + 1) if f"{self.subcommand}_{k}" not in taken)
            logger.write_into(parent / f"{self.subcommand}_{k}")
        elif folder is not None:
            logger.write_into(folder)

    def _run_subcommand(self, subcommand: str) -> None:
        (files,) = (c for c in self.trainer.callbacks if isinstance(c, RunFiles))
        try:
            super()._run_subcommand(subcommand)
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:
            # Lightning, the optimiser and the callbacks restore what is theirs, and trust it.
            if self.checkpoint is None or files.started:
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{self.checkpoint}: the state in it cannot be restored ({why})") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def after_fit(self) -> None:
        run = self._folder
        data = f" --data {type(self.datamodule).__name__}"
        saved = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if run is None:
            written = "nothing is written" if saved is None else f"only checkpoints are written: {saved.dirpath}"
            return self._say(f"fit ended; without a logger {written}")
        lines = [f"{run}: checkpoints, curves.png, metrics.csv, TensorBoard events"]
        if saved is not None and saved.best_model_score is not None:
            lines.append(
                f"Best: {Path(saved.best_model_path).name}, {saved.monitor} {float(saved.best_model_score):.4f}"
            )
        if hasattr(self.model, "triplet_loss"):
            following = f"fit --config configs/linear_probe.yaml{data} --frozen_encoder.run {run}"
        else:
            following = f"test --config {run}/config.yaml --ckpt_path {run}"
        self._say(
            "\n".join([*lines, f"Next: python main.py {following}", f"Look: tensorboard --logdir {self.runs.parent}"])
        )

    def after_validate(self) -> None:
        self._say(f"{self._folder}: config and TensorBoard events of this validation")

    def after_test(self) -> None:
        run = run_folder(self.checkpoint) or self._folder
        self._say(
            f"{self._folder}: report.html, config and TensorBoard events of this test. Look: tensorboard --logdir {run}"
        )

    def after_predict(self) -> None:
        self._say(f"{self._folder}/predictions.csv")

    @property
    def _folder(self) -> str | None:
        return self.trainer.logger.log_dir if self.trainer.logger else None

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero and not self.config[self.subcommand].quiet:
            peaks = ", ".join(f"{mib:,.0f} MiB of {name}" for name, mib in peak_memory().items())
            print(f"{text}\nPeak: {peaks}" if peaks else text)


def bf16_is_native(accelerator: str) -> bool:
    """Whether the device computes in bfloat16 itself; where it only emulates it, bf16 is slower than float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
