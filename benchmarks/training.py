"""Encoder training beside its bare limit, and beside the usual way to write it.

    pip install -e '.[benchmarks]' && python -m benchmarks.training

Images/s of `main.py fit` with configs/triplet_encoder.yaml and all its callbacks, over the steps of an epoch behind the
warm-up, against
- the bare limit: the same network's forward, loss, backward and optimiser step on one batch already in place, in the same
  process, ten steps of each in turn: on a shared machine, processes a minute apart differ by more than what is measured;
- the usual way around the same network, batch 512: torchvision transforms in a DataLoader with two workers,
  pytorch-metric-learning's semi-hard miner and triplet loss, in a plain LightningModule (ours then mines semi-hard
  triplets in batches of 512 too).
Same images and precision on both sides; fresh processes, in turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torchvision import transforms

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from cli import bf16_is_native
from datamodules.arrays import ImageSet, read_npz
from lightning_modules import EuclideanDistance, FastEncoder, PrototypicalLoss, TripletEncoder, TripletMarginLoss
from main import main as command

CONFIG = Path(__file__).parent.parent / "configs" / "triplet_encoder.yaml"
MARGIN = 0.2
SEMIHARD = [
    "--data.batch_size=512", "--model.loss=TripletMarginLoss", "--model.loss.triplets=semihard",
    f"--model.loss.margin={MARGIN}", "--model.loss.distance=EuclideanDistance", "--model.loss.distance.normalize=true",
]  # fmt: skip


class Clock(Callback):
    """Notes when each training batch is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.times.append(time.perf_counter())

    def rate(self, batch: int, warmup: int) -> float:
        """Images/s over the steps behind the first `warmup`."""
        return batch * (len(self.times) - warmup - 1) / (self.times[-1] - self.times[warmup])


class BesideBareLimit(Callback):
    """Has the fit and its bare limit take turns, `BLOCK` steps each, and sums up the seconds of both behind the warm-up."""

    BLOCK = 10

    def __init__(self) -> None:
        self.fit = self.bare = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = bare_limit(trainer, isinstance(pl_module.triplet_loss, TripletMarginLoss))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % self.BLOCK:
            return
        fitted = time.perf_counter()
        for _ in range(self.BLOCK):
            self._step()
        stepped = time.perf_counter()
        if batch_idx >= self.BLOCK:  # the first block warms up
            self.fit, self.bare = self.fit + fitted - self._since, self.bare + stepped - fitted
        self._since = stepped


def ours(options: argparse.Namespace, *more: str) -> tuple[float, float]:
    """Images/s of the fit, and of its bare limit."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"--data.root={options.data_dir}",
            f"--trainer.logger.save_dir={folder}",
            f"--trainer.max_steps={options.steps}",
        ]
        added = ["--trainer.callbacks+=benchmarks.training.BesideBareLimit"]
        cli = command(["fit", "--config", str(CONFIG), *given, *more, *added])
    found = next(c for c in cli.trainer.callbacks if type(c).__name__ == "BesideBareLimit")  # this file is __main__ too
    images = (options.steps // found.BLOCK - 1) * found.BLOCK * cli.datamodule.batch_size
    return images / found.fit, images / found.bare


def encoder_and_loss(semihard: bool) -> TripletEncoder:
    torch.manual_seed(0)
    sphere = EuclideanDistance(normalize=True)
    loss = TripletMarginLoss("semihard", MARGIN, sphere) if semihard else PrototypicalLoss()
    return TripletEncoder(FastEncoder(), loss, lr=0.35, momentum=0.85, weight_decay=1e-4)


def bare_limit(trainer: Trainer, semihard: bool) -> Callable[[], None]:
    """A step on a model of its own and a batch already in place."""
    data, batch = trainer.datamodule.split("train"), trainer.datamodule.batch_size
    model = encoder_and_loss(semihard)
    model.encoder.initialize(data.images)
    images = (data.images[:batch].permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
    labels, optimizer = data.labels[:batch], model.configure_optimizers()["optimizer"]

    def step() -> None:
        with trainer.precision_plugin.forward_context():
            z = model.head(model.encoder(images))
        loss = model.triplet_loss(z.float(), labels, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Images(torch.utils.data.Dataset):
    def __init__(self, data: ImageSet) -> None:
        self.images, self.labels = data.images.numpy(), data.labels.tolist()
        steps = [transforms.ToPILImage(), transforms.RandomCrop(32, 2, padding_mode="reflect")]
        self.transform = transforms.Compose([*steps, transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), self.labels[i]


class Usual(LightningModule):
    def __init__(self) -> None:
        from pytorch_metric_learning import losses, miners

        super().__init__()
        self.model = encoder_and_loss(semihard=True)
        self.miner = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard")
        self.triplet_loss = losses.TripletMarginLoss(MARGIN)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        z = self.model.head(self.model.encoder(images.contiguous(memory_format=torch.channels_last))).float()
        loss = self.triplet_loss(z, labels, self.miner(z, labels))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return self.model.configure_optimizers()["optimizer"]


def usual(options: argparse.Namespace) -> tuple[float]:
    data, module, clock = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), Usual(), Clock()
    module.model.encoder.initialize(data.images)
    loader = torch.utils.data.DataLoader(Images(data), 512, shuffle=True, drop_last=True, num_workers=2)
    quiet = {"logger": False, "enable_checkpointing": False, "max_steps": options.steps, "callbacks": [clock]}
    Trainer(accelerator="cpu", precision=options.precision, **quiet).fit(module, loader)
    return (clock.rate(512, BesideBareLimit.BLOCK),)


SIDES = {
    "default config": ours,
    "semi-hard, batch 512": lambda options: ours(options, *SEMIHARD),
    "the usual way, batch 512": usual,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = "bf16-mixed" if bf16_is_native("cpu") else "32-true"
    if options.side:
        print("\nimages/s", *SIDES[options.side](options))
        return

    def measure(side: str) -> list[float]:
        given = ["--steps", str(options.steps), "--data-dir", options.data_dir]
        out = subprocess.check_output([sys.executable, "-m", "benchmarks.training", "--side", side, *given], text=True)
        return [float(rate) for rate in out.split("images/s ")[-1].split()]

    found = in_turn({side: (lambda side=side: measure(side)) for side in SIDES}, options.repetitions)
    default, semihard, usual_way = (list(zip(*rates)) for rates in found.values())
    rows = [
        {
            "": name,
            "images/s": statistics.median(rates),
            "compared with": over,
            "ratio": over and median_ratio(rates, under),
        }
        for name, rates, over, under in (
            ("default config", default[0], "its bare limit", default[1]),
            ("its bare limit", default[1], None, None),
            ("semi-hard, batch 512", semihard[0], "its bare limit, batch 512", semihard[1]),
            ("its bare limit, batch 512", semihard[1], None, None),
            ("the usual way, batch 512", usual_way[0], "semi-hard, batch 512", semihard[0]),
        )
    ]
    print(machine(), options.precision)
    show(rows, options.json)


if __name__ == "__main__":
    main()
