"""The command line: LightningCLI with callbacks by name, defaults in code, and one folder for each run."""

import argparse
import inspect
import os
import re
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import closing
from callbacks import NAMED, ModelParts, Progress, RunFiles
from checkpoint_file import WholeCheckpointIO, load_checkpoint
from datamodules.in_memory import InMemoryDataModule
from errors import InputError, causes, first_line, require
from lightning_modules import Stage
from places import RUNS, expand_paths, runs_folder, snake_case, specs, write_into
from run_folder import FolderLogger, Run, resolve_checkpoint
from threads import chosen, first_reading


class Parser(LightningArgumentParser):
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
    """`fit | validate | test | predict`; `--ckpt_path best | last | FILE | RUN_FOLDER`.

    A run's folder is claimed once trainer, model and data are made. It is removed if the command is refused later.
    """

    def __init__(self, args: list[str] | None = None, description: str = "") -> None:
        self.parsers: list[LightningArgumentParser] = []
        self.run: Run | None = None
        shown = {"description": description, "formatter_class": HelpFormatter}
        logger = {"save_dir": RUNS, "name": None, "default_hp_metric": False}
        try:
            super().__init__(
                Stage,
                InMemoryDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunFiles,
                trainer_defaults={
                    "logger": {"class_path": "TensorBoardLogger", "init_args": logger},
                    "precision": "bf16-mixed" if bf16_is_native() else "32-true",
                    "num_sanity_val_steps": 0,
                    "log_every_n_steps": 10,
                },
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_class=Parser,
                parser_kwargs={**shown, **dict.fromkeys(self.subcommands(), shown)},
                args=args,
            )
        except BaseException:
            if self.run is not None:
                self.run.discard()
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables, no closing lines")
        parser.add_argument("--threads", type=int | None, default=None, help="null: as many as the machine has free")
        parser.add_argument("--pictures", type=bool, default=True, help="draw figures, into files and TensorBoard")
        for callback in NAMED:
            name = snake_case(callback.__name__)
            parser.add_lightning_class_args(callback, name)
            if "pictures" in inspect.signature(callback).parameters:
                parser.link_arguments("pictures", f"{name}.pictures")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        self.parsers.append(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        try:
            super().parse_arguments(parser, args)
        except InputError:
            raise
        except Exception as error:  # a config that is not text, not a mapping, or deeper than Python goes
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"the options or a --config file cannot be read ({why})") from error
        command = self.config.subcommand
        config = self.config[command]
        if config.trainer is None:
            raise InputError("trainer: null: leave the key out for the defaults, or give options below it")
        seed = config.seed_everything
        require(seed is None or 0 <= seed < 2**32, "seed_everything", seed, "0..4294967295")
        require(config.threads is None or 1 <= config.threads <= 4096, "threads", config.threads, "1..4096")
        expand_paths(config)
        self.runs = runs_folder(config)
        self.checkpoint: Path | None = None
        if config.ckpt_path is not None:
            self.checkpoint = resolve_checkpoint(config.ckpt_path, self.runs, resume=command == "fit")
            config.ckpt_path = None  # LightningCLI would let hyperparameters in the file override the command line
        elif command != "fit":
            raise InputError(f"{command} needs trained weights: give --ckpt_path best|last|FILE|RUN_FOLDER")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        config.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        if config.quiet:
            trainer.enable_progress_bar = trainer.enable_model_summary = False
            if "verbose" in config:
                config.verbose = False
        if config.frozen_encoder.runs is None:
            config.frozen_encoder.runs = str(self.runs.parent)
        listed = {spec.class_path.rsplit(".", 1)[-1] for spec in specs(trainer.callbacks)}
        replaced = set(map(snake_case, listed))
        if trainer.barebones:
            trainer.logger, trainer.log_every_n_steps, trainer.num_sanity_val_steps = None, None, None
            replaced |= {snake_case(c.__name__) for c in NAMED} - {"frozen_encoder", "prediction_writer"}
        elif trainer.enable_checkpointing is False:
            replaced |= {"best_checkpoint", "last_checkpoint"}
        for parser in self.parsers:
            parser.callback_keys = [key for key in parser.callback_keys if key not in replaced]
        always = []
        if trainer.enable_progress_bar is not False and not trainer.barebones:
            always += [Progress()] if not any(name.endswith("ProgressBar") for name in listed) else []
        if trainer.enable_model_summary is not False and not trainer.barebones:
            always += [ModelParts()] if not any(name.endswith("ModelSummary") for name in listed) else []
        self.trainer_defaults["callbacks"] = always

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever a constructor raises about its options
            *_, cause = found = list(causes(error))
            if any(isinstance(e, InputError | MisconfigurationException) for e in found):
                raise
            why = f"{type(cause).__name__}: {first_line(cause)}"
            raise InputError(f"trainer, model or data cannot be made with these options ({why})") from error

    def after_instantiate_classes(self) -> None:
        trainer = self.trainer
        rank_zero_only.rank = trainer.global_rank  # not what a cluster's variables say of other programs
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        threads = self.config[self.subcommand].threads
        if threads is None and self.subcommand == "fit" and self.checkpoint is not None:
            # Results depend on it, a probe's features too, which are computed before Lightning loads the checkpoint.
            made_by = load_checkpoint(self.checkpoint).get("made_by")
            threads = made_by.get("threads") if isinstance(made_by, dict) else None
            require(type(threads) is int and 1 <= threads <= 4096, "the checkpoint's threads", threads, "1..4096")
        elif threads is None and trainer.world_size == 1:
            threads = chosen(first_reading())
        if threads is not None:
            torch.set_num_threads(threads)
        if trainer.fast_dev_run or trainer.barebones:
            return
        wanted = specs(self.config[self.subcommand].trainer.logger)
        if trainer.is_global_zero:
            self.run = self._claim([spec.init_args.get("version") for spec in wanted])
        pairs = zip(trainer.loggers, [*wanted, *[None] * len(trainer.loggers)])
        directed = [write_into(self.run.folder, *pair) if self.run else pair[0] for pair in pairs]
        trainer.loggers = [*directed, FolderLogger(self.run and self.run.folder)]

    def _claim(self, versions: list[int | str | None]) -> Run:
        """The folder that this command writes into: the checkpoint's run, where that may be written, or a new one.

        A fit resumes in the run whose newest checkpoint it is given. From an earlier one it starts a run of its own.
        """
        earlier = None if self.checkpoint is None else Run.of(self.checkpoint)
        if earlier is not None and not os.access(earlier.folder, os.W_OK):
            earlier = None
        if self.subcommand != "fit":
            return Run.claim(self.runs if earlier is None else earlier.folder, self.subcommand)
        if earlier is not None and earlier.last(untrained=True).samefile(self.checkpoint):
            return earlier.resume()
        return Run.claim(self.runs, "version", next((n for n in versions if n is not None), None))

    def after_fit(self) -> None:
        if self.run is not None and not self.run.config.exists():  # no step was asked for
            self.run.discard()
            self.run = None
        self._say(closing.after_fit(self.trainer, self.datamodule, self.run and self.run.folder, self.config.fit))

    def after_test(self) -> None:
        self._say(closing.after_evaluation(self.subcommand, self.run and self.run.folder))

    after_validate = after_predict = after_test

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero and not self.config[self.subcommand].quiet:
            print("\n".join([text, *([f"Peak: {peak}"] if (peak := closing.peak()) else [])]))


def bf16_is_native() -> bool:
    """Whether the device computes in bfloat16 itself; where it only emulates it, bf16 is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
