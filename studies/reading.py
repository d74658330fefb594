"""Where the features are read: a linear classifier on each place of a trained default encoder that a probe could read.

    python -m studies.reading --encoder RUN [RUN ...]

Softmax regression with the options of configs/linear_probe.yaml on standardised values of the training images as they
are. Its accuracy is that on validation images after the last epoch. There each image's values are the mean over the
views that a probe's evaluation takes.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Rows, fit, run, shipped
from callbacks.frozen_encoder import encoder_from_checkpoint
from datamodules import CIFAR10DataModule
from datamodules.arrays import ImageSet
from datamodules.loader import BatchLoader
from errors import require
from lightning_modules.encoders.contract import Encoder, view
from run_folder import load_checkpoint, resolve_checkpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", nargs="+", help="run folders or checkpoints of configs/triplet_encoder.yaml")


def rows(options: argparse.Namespace) -> Rows:
    if options.dry_run and not options.encoder:
        with tempfile.TemporaryDirectory() as runs:
            options.encoder = [fit(options, "triplet_encoder", runs, "--quiet").trainer.log_dir]
            return rows(options)
    require(bool(options.encoder), "--encoder", options.encoder, "one or more runs of configs/triplet_encoder.yaml")
    probe = shipped(options, "linear_probe")
    data = CIFAR10DataModule(options.data_dir, val_size=probe.data.val_size)
    train, val = data.split("train"), data.split("val")
    accuracies: dict[str, list[float]] = {}
    for run_folder in options.encoder:
        checkpoint_file = resolve_checkpoint(run_folder, Path(run_folder).parent)
        checkpoint = load_checkpoint(checkpoint_file)
        encoder, head = encoder_from_checkpoint(checkpoint_file, checkpoint), checkpoint["state_dict"]["head.weight"]
        x, x_val = read(encoder, head, train, [(False, 0)]), read(encoder, head, val, encoder.views)
        for place in x:
            classifier = softmax_regression(x[place], train.labels, probe)
            right = classifier(x_val[place]).argmax(1) == val.labels
            accuracies.setdefault(place, []).append(right.float().mean().item())
    return [
        {"name": place, "width": x[place].shape[1], "runs": " / ".join(f"{a:.4f}" for a in found)}
        | {"mean": statistics.fmean(found)}
        for place, found in accuracies.items()
    ]


@torch.no_grad()
def read(encoder: Encoder, head: Tensor, images: ImageSet, views: list[tuple[bool, int]]) -> dict[str, Tensor]:
    """For each place (N, its width) float32, the mean over the views."""
    found: dict[str, list[Tensor]] = {}
    for batch, *_ in BatchLoader(*images, 500):
        per_view = [places(encoder, head, view(batch, *which)) for which in views]
        for place in per_view[0]:
            found.setdefault(place, []).append(torch.stack([x[place] for x in per_view]).mean(0))
    return {place: torch.cat(x) for place, x in found.items()}


def places(encoder: Encoder, head: Tensor, images: Tensor) -> dict[str, Tensor]:
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[2])) for block in encoder.blocks]
    features = encoder(images)
    for hook in hooks:
        hook.remove()
    return {
        "second block, mean over its positions": blocks[1].mean((2, 3)),
        "third block, mean over its positions": blocks[2].mean((2, 3)),
        "third block, maximum over its positions: the features": features,
        "features, each image's of length 1": F.normalize(features, dim=1),
        "the projection head's embeddings": features @ head.T,
        "embeddings of length 1, as the loss sees them": F.normalize(features @ head.T, dim=1),
    }


def softmax_regression(x: Tensor, labels: Tensor, probe) -> nn.Module:
    """Fitted with the options of a probe's config, in float32."""
    options, batch, generator = probe.model.hparams, probe.data.batch_size, torch.Generator().manual_seed(0)
    standardise, linear = nn.BatchNorm1d(x.shape[1], affine=False, momentum=None), nn.Linear(x.shape[1], 10)
    standardise(x)  # momentum None: the statistics of all images at once
    standardise.eval()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    steps = probe.trainer["max_epochs"] * (len(x) // batch)
    optimiser = torch.optim.Adam(linear.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, steps)
    for _ in range(probe.trainer["max_epochs"]):
        for index in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
            optimiser.zero_grad()
            F.cross_entropy(linear(standardise(x[index])), labels[index]).backward()
            optimiser.step()
            schedule.step()
    return nn.Sequential(standardise, linear).requires_grad_(False)


if __name__ == "__main__":
    run("studies.reading")
