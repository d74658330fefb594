"""The rivals of `studies.buys`: fits at equal encoder seconds, each done once and resumed where it stopped."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT
from checkpoint_file import load_checkpoint
from datamodules import CIFAR10DataModule, DigitsDataModule
from datamodules.in_memory import InMemoryDataModule
from errors import InputError, causes
from export import restored
from files import read_json, write
from lightning_modules import Stage
from lightning_modules.finite_loss import LossNotFinite
from main import main
from run_folder import Run

VALIDATIONS = 7  # in every fit, however few images an epoch has
CHUNK = 500  # images that an evaluation here takes at once
GRID = "--model=LinearProbeGrid"
PIXELS, PATCHES, RANDOM = "softmax on pixels", "random patches, linear probe", "untrained encoder, linear probe"
ENTROPY, TRIPLET = "cross-entropy, tuned", "triplet encoder by labels, linear probe"
FREE, TUNED, LONG = "label-free, linear probe", "label-free, fine-tuned", "label-free for ten epochs, linear probe"


@dataclass(frozen=True)
class Budget:
    """What a rival gets. `free_steps` of an encoder without labels take about as long as `steps` of one with labels,
    both of 256 images. Of fewer images than that, each step is shorter: then `steps` only repeat them more often."""

    steps: int = 1225
    free_steps: int = 350
    probe_steps: int = 880  # of 512 images
    tuning_steps: int = 280  # of 512 images
    patches: int = 1000
    rates: tuple[float, ...] = (0.35, 0.1)
    # Crops and colours beside the config's mirroring and shifts.
    augmentations: tuple[str, ...] = ("", "--data.crop_scale=[0.35,1] --data.color_jitter=0.4")
    small: tuple[str, ...] = ()  # of every network


CIFAR10 = Budget()
DIGITS = Budget(35, 10, 35, 14, 50, (0.35,), ("", "--data.crop_scale=[0.5,1]"), ("--model.encoder.widths=[8,16,32]",))


class Rivals:
    """The fits of one seed, in `out/seed_S/NAME`, and their accuracies, in `out/seed_S/found.json`.

    `given` are the options of the data; `labels` those that say which labels there are, of `count` training images.
    `tag` names them in the names of fits.
    """

    def __init__(self, out: Path, seed: int, given: list[str], budget: Budget) -> None:
        self.out, self.seed, self.given, self.budget = out / f"seed_{seed}", seed, given, budget
        self.file = self.out / "found.json"
        self.found: dict[str, dict[str, float]] = read_json(self.file) if self.file.is_file() else {}

    def fit(self, name: str, config: str, *options: str) -> Run:
        """The run, fitted if it has not finished before."""
        runs = self.out / name
        if not any(run.finished for run in Run.all(runs)):
            shared = ["--quiet", "--pictures=false", "--trainer.devices=1", f"--seed_everything={self.seed}"]
            place = [f"--trainer.logger.save_dir={self.out}", f"--trainer.logger.name={name}"]
            again = ["--ckpt_path=last"] if any(runs.glob("version_*/checkpoints/*.ckpt")) else []
            file = str(ROOT / "configs" / f"{config}.yaml")
            main(["fit", "--config", file, *self.given, *shared, *place, *options, *again])
            print(f"[seed {self.seed}] {name}: {Run.newest(runs).finished['seconds']:.0f} s", flush=True)
        return Run.newest(runs)

    def accuracy(self, run: Run, command: str = "test", checkpoint: str = "") -> float:
        """Of the run's best checkpoint by validation, or of the one named, on test or validation images."""
        key = f"{run.folder.relative_to(self.out)} {command} {checkpoint}".strip()
        if key not in self.found:
            path = run.checkpoints / checkpoint if checkpoint else run.folder
            cli = main([command, "--config", str(run.config), "--ckpt_path", str(path)])
            split = "val" if command == "validate" else "test"
            accuracy = float(cli.trainer.callback_metrics[f"{split}/accuracy"])
            self.found[key] = {"accuracy": accuracy, "seconds": run.finished["seconds"]}
            write(self.file, json.dumps(self.found, indent=1) + "\n")
        return self.found[key]["accuracy"]

    def length(self, count: int, steps: int, batch: int) -> list[str]:
        """Options of a fit of about so many steps on `count` images, the last of its validations at its end."""
        batch = min(batch, count)
        epochs = max(1, round(steps / (count // batch)))
        every = max(1, round(epochs / VALIDATIONS))
        whole = every * max(1, round(epochs / every))
        return [
            f"--data.batch_size={batch}",
            f"--trainer.max_epochs={whole}",
            f"--trainer.check_val_every_n_epoch={every}",
        ]

    def pixels(self, tag: str, count: int, labels: list[str]) -> Run:
        size = self.length(count, self.budget.probe_steps, 512)
        return self.fit(f"pixels{tag}", "softmax_regression", *labels, *size)

    def patches(self, tag: str, count: int, labels: list[str]) -> Run:
        number = f"--frozen_encoder.encoder.init_args.patches={self.budget.patches}"
        given = [GRID, number, *labels, *self.length(count, self.budget.probe_steps, 512)]
        return self.fit(f"patches{tag}", "random_patches_linear_probe", *given)

    def probe(self, name: str, encoder: Path, count: int, labels: list[str]) -> Run:
        """The best of a grid of linear probes by the row's own validation images."""
        given = [GRID, f"--frozen_encoder.run={encoder}", *labels]
        return self.fit(name, "linear_probe", *given, *self.length(count, self.budget.probe_steps, 512))

    def triplet(self, tag: str, count: int, labels: list[str]) -> Run:
        size = self.length(count, self.budget.steps, 256)
        return self.fit(f"triplet{tag}", "triplet_encoder", *self.budget.small, *labels, *size)

    @property
    def points(self) -> dict[str, list[str]]:
        """What cross-entropy is tuned over: every rate × augmentation."""
        every = [(rate, i, more) for rate in self.budget.rates for i, more in enumerate(self.budget.augmentations)]
        return {f"rate_{rate}_augmentation_{i}": [f"--model.lr={rate}", *more.split()] for rate, i, more in every}

    def entropy(self, tag: str, point: str, count: int, labels: list[str]) -> Run:
        given = [*self.points[point], *self.budget.small, *labels, *self.length(count, self.budget.steps, 256)]
        return self.fit(f"entropy{tag}_{point}", "supervised_encoder", *given)

    def free(self, tag: str = "", labels: list[str] = [], times: int = 1) -> Run:
        """On all images, but for their classes; for so many `times` the budget."""
        length = ["--trainer.max_epochs=-1", f"--trainer.max_steps={times * self.budget.free_steps}"]
        return self.fit(f"free{tag}", "label_free_encoder", *self.budget.small, *labels, *length)

    def fine_tuned(self, tag: str, encoder: Path, count: int, labels: list[str]) -> Run:
        """A linear probe, and then both trained on: seconds beyond the budget."""
        probe_size, size = (self.length(count, n, 512) for n in (self.budget.probe_steps, self.budget.tuning_steps))
        probe = self.fit(f"first{tag}", "linear_probe", f"--frozen_encoder.run={encoder}", *labels, *probe_size)
        return self.fit(f"fine_tuned{tag}", "fine_tune", f"--frozen_encoder.run={probe.folder}", *labels, *size)


class Given(NamedTuple):
    """What a draw gives the rivals: a name of it, the number of training images, and the options of the data."""

    tag: str
    count: int
    options: list[str]


class Study:
    """The seeds' rivals on one data set."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.digits, self.out, seeds = options.data == "digits", options.out, range(options.seeds)
        self.data = DigitsDataModule() if self.digits else CIFAR10DataModule(root=options.data_dir)
        given = ["--data=DigitsDataModule"] if self.digits else [f"--data.root={options.data_dir}"]
        budget = DIGITS if self.digits else CIFAR10
        place = options.out / options.data
        wanted = {"data": given, **asdict(budget)}
        if (settings := place / "settings.json").is_file() and read_json(settings) != json.loads(json.dumps(wanted)):
            raise InputError(f"{place} holds fits of other settings; give another --out")
        write(settings, json.dumps(wanted) + "\n")
        self.seeds = [Rivals(place, seed, given, budget) for seed in seeds]
        self.labels, self.chosen = self.data.split("train").labels, {}

    def draws(self, few: bool = False) -> Iterator[tuple[int, Rivals]]:
        """A draw for each seed; of few labels two more, where there are several seeds."""
        for draw in range(len(self.seeds) + 2 * (few and len(self.seeds) > 1)):
            yield draw, self.seeds[draw % len(self.seeds)]

    def entropy(self, rivals: Rivals, draw: int, give: Callable[[int], Given]) -> Run:
        """Cross-entropy, tuned on the validation images of the first draw."""
        first, (tag, count, options) = self.seeds[0], give(0)
        if tag not in self.chosen:
            validated = {}
            for point in first.points:
                try:
                    validated[point] = first.accuracy(first.entropy(tag, point, count, options), "validate")
                except InputError as error:
                    if not any(isinstance(e, LossNotFinite) for e in causes(error)):  # the rate is too high
                        raise
            if not validated:
                raise InputError(f"cross-entropy{tag}: the loss is not finite at any of {', '.join(first.points)}")
            self.chosen[tag] = max(validated, key=validated.__getitem__)
        tag_of_draw, count, options = give(draw)
        return rivals.entropy(tag_of_draw, self.chosen[tag], count, options)

    def everyone(
        self, rivals: Rivals, draw: int, give: Callable[[int], Given], encoder: Run
    ) -> Iterator[tuple[str, Run]]:
        """Each rival's run under these labels; `encoder` is the one without labels."""
        tag, count, options = give(draw)
        yield PIXELS, rivals.pixels(tag, count, options)
        yield PATCHES, self.patches(rivals, tag, count, options)
        yield RANDOM, rivals.probe(f"untrained_probe{tag}", encoder.step0, count, options)
        yield ENTROPY, self.entropy(rivals, draw, give)
        triplet = rivals.triplet(tag, count, options)
        yield TRIPLET, rivals.probe(f"triplet_probe{tag}", triplet.folder, count, options)
        yield FREE, rivals.probe(f"free_probe{tag}", encoder.folder, count, options)

    def patches(self, rivals: Rivals, tag: str, count: int, options: list[str]) -> Run:
        """Patches of all images, as the encoder without labels sees them all."""
        if any(option.startswith("--data.classes") for option in options):
            return rivals.patches(tag, count, options)
        first, other = rivals.patches(*self.all_labels(0)), ["--frozen_encoder.other_data=true", *options]
        return rivals.probe(f"patches_probe{tag}", first.folder, count, other) if options else first

    def encoders(self, rivals: Rivals, given: Given, encoder: Run, entropy: Run) -> dict[str, Path]:
        """The encoders of `everyone`, for a probe of other labels or images."""
        paths = encoder.step0, entropy.folder, rivals.triplet(*given).folder, encoder.folder
        return dict(zip((RANDOM, ENTROPY, TRIPLET, FREE), paths))

    def all_labels(self, draw: int) -> Given:
        return Given("_all", len(self.labels), [])


def name_of(encoder: Path) -> str:
    """The name of an encoder's fit; `encoder` is its run's folder or its untrained checkpoint."""
    return encoder.parent.name if encoder.suffix != ".ckpt" else "untrained"


def loaded(run: Run) -> tuple[Stage, InMemoryDataModule]:
    """The stage of a run's best checkpoint, in evaluation, and its data."""
    path = run.best()
    stage, data = restored(path, load_checkpoint(path), None)
    return stage.eval().requires_grad_(False), data


@torch.inference_mode()
def computed(network: nn.Module, images: Tensor) -> Tensor:
    """What `network` makes of images (N, 32, 32, 3) uint8."""
    parts = (part.permute(0, 3, 1, 2).float() / 255 for part in images.split(CHUNK))
    return torch.cat([network(part.contiguous(memory_format=torch.channels_last)) for part in parts])
