"""Making the views, beside a training step; and training on two views of an image, beside lightly.

    pip install -e '.[benchmarks]' && python -m benchmarks.views

- Milliseconds of the views of a batch of configs/label_free_encoder.yaml, beside those of its training step.
- Views/s of training the same network on two views of 32 pixels with NT-Xent and SGD: `main.py fit` with every
  callback, beside a plain loop over lightly's SimCLRTransform in a DataLoader with lightly's NTXentLoss, with 0, 1 and
  2 workers and 1 and 2 threads. The crops, jitter and greyscale are those of the config on both sides; lightly's blur
  is off. "As its example runs it" is float32 with 8 workers.
All sides have the same images; fresh processes, in turn. Ratios are of views/s.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor

from benchmarks.common import Clock, Rows, fit_with, fresh, in_turn, median_ratio, run, shipped, summary
from cli import bf16_is_native
from datamodules.arrays import read_npz
from datamodules.loader import BatchLoader
from errors import require
from lightning_modules.stage import of_views
from main import keep_freed_memory

PLAIN = ["--data.small_views=0", "--model.loss=SupConLoss", "--model.optimizer=sgd", "--model.lr=0.02"]
PLAIN += ["--model.schedule=constant"]
DRY_RUN = {"steps": 25, "peers": ["0 workers, 1 threads"]}
PEERS = [f"{workers} workers, {threads} threads" for workers in (0, 1, 2) for threads in (1, 2)]
EXAMPLE = "as its example runs it"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=40, help="of every fit (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", default=[*PEERS, EXAMPLE], help="of lightly (default: all)")


def step(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a batch's views, and of a training step on them."""
    keep_freed_memory()
    made = shipped(options, "label_free_encoder", "--model.schedule=constant")
    model, data = made.model, made.data
    images = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10).images
    model.encoder.initialize(images)
    loader = BatchLoader(images, None, data.batch_size, seed=0, views=data.views)
    optimizer = model.configure_optimizers()["optimizer"]
    ids, batches, making, training = torch.arange(data.batch_size), iter(loader), [], []
    for _ in range(min(options.steps, len(loader))):
        began = time.perf_counter()
        (views,) = next(batches)
        made_at = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_native()):
            z = model.head(model.read(of_views(model.encoder, views, data.batch_size)))
        optimizer.zero_grad()
        model.loss_function(z.float(), ids.repeat_interleave(len(z) // len(ids)), None).backward()
        optimizer.step()
        making.append(1000 * (made_at - began))
        training.append(1000 * (time.perf_counter() - made_at))
    return {"views of a batch": statistics.median(making), "training step": statistics.median(training)}


def ours(options: argparse.Namespace, *more: str) -> float:
    """Views/s of a fit with every callback."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--trainer.accelerator=cpu", f"--trainer.max_steps={options.steps}", "--quiet", *PLAIN, *more]
        cli, clock = fit_with(Clock, options, "label_free_encoder", folder, *given)
    return 2 * clock.rate(cli.datamodule.batch_size)


class Pairs(torch.utils.data.Dataset):
    """Images as lightly's example delivers them: two views each, made one by one."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        colours = {"cj_strength": 0.5, "cj_prob": 0.8, "random_gray_scale": 0.2, "gaussian_blur": 0.0}
        # The encoder normalises by itself.
        self.transform = SimCLRTransform(input_size=32, min_scale=0.2, normalize=None, **colours)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[i].numpy()))


def lightly(options: argparse.Namespace, setting: str) -> float:
    """Views/s of a plain loop."""
    workers, threads = (8, torch.get_num_threads()) if setting == EXAMPLE else map(int, setting.split()[::2])
    torch.set_num_threads(threads)
    made = shipped(options, "label_free_encoder", *PLAIN)
    images = read_npz(Path(options.data_dir) / "cifar10_train.npz", 10).images
    model, loss, size = made.model, NTXentLoss(0.1), made.data.batch_size
    model.encoder.initialize(images)
    optimizer = model.configure_optimizers()["optimizer"]
    shuffled = {"shuffle": True, "drop_last": True, "num_workers": workers}
    loader = torch.utils.data.DataLoader(Pairs(images), size, **shuffled)
    require(len(loader) >= 1, "--data-dir", options.data_dir, f"at least {size} images")
    bf16, clock = setting != EXAMPLE and bf16_is_native(), Clock()
    for views in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), options.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            one, two = (model(x.contiguous(memory_format=torch.channels_last)) for x in views)
        optimizer.zero_grad()
        loss(one.float(), two.float()).backward()
        optimizer.step()
        clock.on_train_batch_end()
    return 2 * clock.rate(size)


def rows(options: argparse.Namespace) -> Rows:
    require(options.steps >= Clock.WARMUP + 2, "--steps", options.steps, f"at least {Clock.WARMUP + 2}")
    steps = [fresh(step, options) for _ in range(options.repetitions)]
    found = summary({name: [x[name] for x in steps] for name in steps[0]}, "ms", {"views of a batch": "training step"})
    sides = {"ours": lambda: fresh(ours, options)}
    if EXAMPLE in options.peers:
        sides["ours, float32"] = lambda: fresh(ours, options, "--trainer.precision=32-true")
    sides |= {f"lightly, {name}": lambda name=name: fresh(lightly, options, name) for name in options.peers}
    rates = in_turn(sides, options.repetitions)
    for name, values in rates.items():
        ratio = {"compared with": "ours", "ratio": median_ratio(rates["ours"], values)} if name != "ours" else {}
        found.append({"name": name, "value": statistics.median(values), "unit": "views/s", **ratio})
    return found


if __name__ == "__main__":
    run("benchmarks.views")
