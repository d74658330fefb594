"""The encoder on one CUDA GPU: seconds to an accuracy, images/s beside a bare loop, and what each choice is worth.

    python -m benchmarks.gpu --data-dir data --json runs/gpu.json            # not timed on a GPU so far
    python -m benchmarks.gpu --airbench ../cifar10-airbench                  # its times on the same GPU, in the same run
    python -m benchmarks.gpu --dry-run                                       # every part, tiny, also without a GPU

1. Recipes: training seconds of `main.py fit` behind the first steps (where kernels are chosen and compiled), without its
   validations, and the test accuracy of the linear probe on the encoder; means over seeds. With --airbench: the seconds
   and the accuracy (with its test-time augmentation) that train94, train95 and train96 print, behind their warm-up.
2. Rates: images/s of the middle recipe as it is and with one thing changed, medians of repetitions in turn, each beside
   the recipe as it is; beside a bare loop of the same compiled network, loss and optimiser on a batch in place; and
   the share of the FLOP/s that this GPU reaches in a large bfloat16 matrix product.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from datamodules import in_memory
from datamodules.arrays import read_npz
from datamodules.cifar10 import CIFAR10DataModule
from lightning_modules import FastEncoder, PrototypicalLoss, TripletEncoder
from main import main as command

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH, LR = 512, 0.49
RECIPES = {  # config, widths, epochs
    "94": ("triplet_encoder", [64, 256, 256], 24),
    "95": ("triplet_encoder", [128, 384, 384], 30),
    "96": ("triplet_encoder_gpu", [128, 512, 512], 50),
}
COMPILED = ["--model.compile_mode=reduce-overhead"]
VARIANTS = {  # what differs from the recipe
    "as it is": [],
    "float32": ["--trainer.precision=32-true"],
    "channels first": ["--model.channels_last=false"],
    "not compiled": ["--model.compile_mode=null"],
    "compiled without CUDA graphs": ["--model.compile_mode=default"],
    "images in main memory": [],
}
AIRBENCH = """
import sys
sys.path.insert(0, sys.argv[1])
import airbench
getattr(airbench, "warmup" + sys.argv[2])()
for _ in range(int(sys.argv[3])):
    getattr(airbench, "train" + sys.argv[2])(run=None)
"""


class Clock(Callback):
    """Notes the time behind the first `WARMUP` steps and behind the last, with the GPU's work done."""

    WARMUP = 20

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in (self.WARMUP, trainer.fit_loop.epoch_loop.max_steps) or self._is_last(trainer):
            synchronize()
            if trainer.global_step == self.WARMUP:
                self.start, self.batch = time.perf_counter(), len(batch[1])
            self.seconds, self.steps = time.perf_counter() - self.start, trainer.global_step - self.WARMUP

    def _is_last(self, trainer) -> bool:
        return trainer.is_last_batch and trainer.current_epoch == trainer.max_epochs - 1


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(options: argparse.Namespace, name: str, out: str, seed: int, *more: str) -> Clock:
    """`main.py fit` of a recipe; returns its Clock."""
    config, widths, epochs = RECIPES[name]
    given = [
        f"--data.root={options.data_dir}", f"--data.val_size={options.val_size}", f"--seed_everything={seed}",
        f"--data.batch_size={min(BATCH, options.largest_batch)}", f"--model.lr={LR}",
        f"--model.encoder.widths={widths if not options.dry_run else [8, 8, 8]}",
        f"--trainer.max_epochs={epochs}", f"--trainer.check_val_every_n_epoch={epochs}",
        f"--trainer.logger.save_dir={out}", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.callbacks=benchmarks.gpu.Clock", *COMPILED, *more,
    ]  # fmt: skip
    cli = command(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *given])
    return next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")  # this file is __main__ too


def to_accuracy(options: argparse.Namespace, name: str, seed: int) -> tuple[float, float]:
    """Training seconds, scaled to all steps from those behind the warm-up, and the probe's test accuracy."""
    with tempfile.TemporaryDirectory() as out:
        short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"] if options.dry_run else []
        clock = fit(options, name, out, seed, *short)
        steps = clock.steps + Clock.WARMUP
        shared = [
            "--config", str(CONFIGS / "linear_probe.yaml"), f"--data.root={options.data_dir}", f"--data.val_size={options.val_size}",
            f"--trainer.logger.save_dir={out}", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
            *(["--data.batch_size=64", "--trainer.max_epochs=2"] if options.dry_run else []),
        ]  # fmt: skip
        command(["fit", *shared])
        tested = command(["test", *shared, "--ckpt_path=best"])
        return clock.seconds * steps / clock.steps, float(tested.trainer.callback_metrics["test/accuracy"])


def airbench(options: argparse.Namespace, name: str) -> tuple[list[float], list[float]]:
    """Seconds and accuracies that its `train94` etc. print, on the images of --data-dir."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for split in ("train", "test"):
            data = read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10)
            content = {"images": data.images, "labels": data.labels, "classes": list(CIFAR10DataModule.CLASSES)}
            torch.save(content, Path(folder) / "cifar10" / f"{split}.pt")
        given = [sys.executable, "-c", AIRBENCH, str(options.airbench.resolve()), name, str(options.seeds)]
        printed = subprocess.check_output(given, cwd=folder, text=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if " eval " in line]
    return [float(row[-2]) for row in rows], [float(row[-3]) for row in rows]


def rate(options: argparse.Namespace, variant: str) -> float:
    resident = in_memory.free_memory
    if variant == "images in main memory":
        in_memory.free_memory = lambda device: 0.0
    try:
        with tempfile.TemporaryDirectory() as out:
            clock = fit(options, "95", out, 0, f"--trainer.max_steps={options.steps}", *VARIANTS[variant])
    finally:
        in_memory.free_memory = resident
    return clock.steps * clock.batch / clock.seconds


def network(options: argparse.Namespace):
    """The middle recipe's module, a batch and labels, on the device."""
    _, widths, _ = RECIPES["95"]
    device, batch = "cuda" if torch.cuda.is_available() else "cpu", min(BATCH, options.largest_batch)
    torch.manual_seed(0)
    encoder = FastEncoder([8, 8, 8] if options.dry_run else widths)
    module = TripletEncoder(encoder, PrototypicalLoss(), lr=0.01, compile_mode=COMPILED[0].split("=")[1]).to(device)
    images = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return module, images, torch.arange(batch, device=device) % 10


def bare(options: argparse.Namespace) -> float:
    module, images, labels = network(options)
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(options.steps):
        if step == Clock.WARMUP:
            synchronize()
            start = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16):
            z = module.head(module.encoder(images))
        loss = module.triplet_loss(z.float(), labels, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronize()
    return len(images) * (options.steps - Clock.WARMUP) / (time.perf_counter() - start)


def flops_per_image(options: argparse.Namespace) -> float:
    """Of a training step, forward and backward, as torch counts them (a multiplication and an addition are two)."""
    module, images, labels = network(options)
    module.encoder.run_as()
    with FlopCounterMode(display=False) as counter:
        module.triplet_loss(module.head(module.encoder(images)), labels, None).backward()
    return counter.get_total_flops() / len(images)


def matmul_flops(size: int, repetitions: int = 30) -> float:
    """FLOP/s of a bfloat16 matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for repetition in range(repetitions):
        if repetition == repetitions // 3:
            synchronize()
            start = time.perf_counter()
        x @ x
    synchronize()
    return 2 * size**3 * (repetitions - repetitions // 3) / (time.perf_counter() - start)


def main() -> None:
    parser = arguments(__doc__, repetitions=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=220, help="of each rate's fit (default: %(default)s)")
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="a checkout of KellerJordan/cifar10-airbench")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA GPU here; --dry-run rehearses everything without one")
    if options.airbench and not (options.airbench / "airbench" / "__init__.py").is_file():
        parser.error(f"{options.airbench}: no checkout of cifar10-airbench (airbench/__init__.py is missing)")
    options.val_size, options.largest_batch = 5000, 10**9
    if options.dry_run:
        options.val_size, options.largest_batch, options.steps, options.seeds, options.repetitions = 50, 16, 24, 1, 1
        COMPILED[:] = ["--model.compile_mode=default"]
        with tempfile.TemporaryDirectory() as folder:
            return report(small(options, Path(folder)))
    report(options)


def small(options: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The first few hundred images, in a folder of their own."""
    for split, count in (("train", 450), ("test", 60)):
        data = read_npz(Path(options.data_dir) / f"cifar10_{split}.npz", 10)
        np.savez(
            folder / f"cifar10_{split}.npz", images=data.images[:count].numpy(), labels=data.labels[:count].numpy()
        )
    options.data_dir = folder
    return options


def report(options: argparse.Namespace) -> None:
    rows = []
    for name in RECIPES:
        seconds, accuracy = zip(*(to_accuracy(options, name, seed) for seed in range(options.seeds)))
        sides = {f"ours, recipe {name}": (seconds, accuracy)}
        if options.airbench and torch.cuda.is_available():
            sides[f"airbench, train{name}"] = airbench(options, name)
        for side, (seconds, accuracy) in sides.items():
            means = statistics.fmean(seconds), statistics.fmean(accuracy)
            rows.append({"": side, "training seconds": means[0], "test accuracy": means[1], "runs": len(seconds)})
    print(machine())
    show(rows, options.json and options.json.with_suffix(".accuracy.json"))

    sides = {variant: (lambda variant=variant: rate(options, variant)) for variant in VARIANTS}
    sides["bare loop"] = lambda: bare(options)
    rates = in_turn(sides, options.repetitions)
    share = flops_per_image(options) / matmul_flops(256 if options.dry_run else 8192)
    rows = []
    for variant, found in rates.items():
        median = statistics.median(found)
        ratio = median_ratio(found, rates["as it is"])
        rows.append(
            {"recipe 95": variant, "images/s": median, "÷ as it is": ratio, "of the matmul's FLOP/s": median * share}
        )
    show(rows, options.json)


if __name__ == "__main__":
    main()
