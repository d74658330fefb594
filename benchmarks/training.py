"""Encoder training beside its bare limit, and beside the usual way to write it.

    pip install -e '.[benchmarks]' && python -m benchmarks.training

Images/s of `main.py fit` with configs/triplet_encoder.yaml and all its callbacks, over the steps of an epoch behind the
warm-up, against
- the bare limit: the same network's forward, loss, backward and optimiser step on one batch already in place;
- the usual way around the same network, batch 512: torchvision transforms in a DataLoader with two workers,
  pytorch-metric-learning's semi-hard miner and triplet loss, in a plain LightningModule (ours then mines semi-hard
  triplets in batches of 512 too).
Same images and precision on both sides; a fresh process for each measurement, the sides in turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torchvision import transforms

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from cli import bf16_is_native
from datamodules.arrays import ImageSet, read_npz
from lightning_modules import EuclideanDistance, FastEncoder, PrototypicalLoss, TripletEncoder, TripletMarginLoss
from main import keep_freed_memory
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


def ours(options: argparse.Namespace, *more: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--data.root={options.data_dir}", f"--trainer.logger.save_dir={folder}", f"--trainer.max_steps={options.steps}"]
        added = ["--trainer.callbacks+=benchmarks.training.Clock"]
        cli = command(["fit", "--config", str(CONFIG), *given, *more, *added])
    clock = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")  # this file is __main__ too
    return clock.rate(cli.datamodule.batch_size, options.warmup)


def encoder_and_loss(semihard: bool) -> TripletEncoder:
    torch.manual_seed(0)
    sphere = EuclideanDistance(normalize=True)
    loss = TripletMarginLoss("semihard", MARGIN, sphere) if semihard else PrototypicalLoss()
    return TripletEncoder(FastEncoder(), loss, lr=0.35, momentum=0.85, weight_decay=1e-4)


def bare(options: argparse.Namespace, batch: int = 256, semihard: bool = False) -> float:
    keep_freed_memory()
    data = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10)
    model = encoder_and_loss(semihard)
    model.encoder.initialize(data.images)
    images = (data.images[:batch].permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
    labels, optimizer, clock = data.labels[:batch], model.configure_optimizers()["optimizer"], Clock()
    precision = Trainer(accelerator="cpu", precision=options.precision, logger=False, enable_checkpointing=False).precision_plugin
    for _ in range(options.steps):
        with precision.forward_context():
            z = model.head(model.encoder(images))
        loss = model.triplet_loss(z.float(), labels, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.on_train_batch_end()
    return clock.rate(batch, options.warmup)


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


def usual(options: argparse.Namespace) -> float:
    data, module, clock = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10), Usual(), Clock()
    module.model.encoder.initialize(data.images)
    loader = torch.utils.data.DataLoader(Images(data), 512, shuffle=True, drop_last=True, num_workers=2)
    quiet = {"logger": False, "enable_checkpointing": False, "max_steps": options.steps, "callbacks": [clock]}
    Trainer(accelerator="cpu", precision=options.precision, **quiet).fit(module, loader)
    return clock.rate(512, options.warmup)


SIDES = {
    "default config": ours,
    "its bare limit": bare,
    "semi-hard, batch 512": lambda options: ours(options, *SEMIHARD),
    "its bare limit, batch 512": lambda options: bare(options, 512, semihard=True),
    "the usual way, batch 512": usual,
}
COMPARED = {  # side → over what
    "default config": "its bare limit",
    "semi-hard, batch 512": "its bare limit, batch 512",
    "the usual way, batch 512": "semi-hard, batch 512",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = "bf16-mixed" if bf16_is_native("cpu") else "32-true"
    if options.side:
        print(f"\nimages/s {SIDES[options.side](options)}")
        return

    def measure(side: str) -> float:
        sizes = ["--steps", str(options.steps), "--warmup", str(options.warmup), "--data-dir", options.data_dir]
        out = subprocess.check_output([sys.executable, "-m", "benchmarks.training", "--side", side, *sizes], text=True)
        return float(out.split("images/s ")[-1])

    rates = in_turn({side: (lambda side=side: measure(side)) for side in SIDES}, options.repetitions)
    rows = []
    for side, found in rates.items():
        over = COMPARED.get(side)
        ratio = median_ratio(found, rates[over]) if over else None
        rows.append({"": side, "images/s": statistics.median(found), "compared with": over, "ratio": ratio})
    print(machine(), options.precision)
    show(rows, options.json)


if __name__ == "__main__":
    main()
