"""Where the features are read: our linear probe on each place of an encoder's run that a probe could read.

    python -m studies.reading --encoder RUN [RUN ...]
    python -m studies.reading --encoder RUN/checkpoints/step0.ckpt      # before its first training step
    python -m studies.reading --encoder RUN --crops 24                  # averaged over five crops too

The probe is that of configs/linear_probe.yaml, on the training images as they are. Its accuracy is that on validation
images after the last epoch. There each image's values are the mean over the views that a probe's evaluation takes.
With --crops, training images are averaged over these views too. Five crops and their mirror images join the mean.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor

from benchmarks.common import QUIET, Rows, run, shipped
from callbacks.frozen_encoder import encoder_from_checkpoint
from checkpoint_file import load_checkpoint
from datamodules.arrays import ImageSet
from datamodules.loader import BatchLoader
from errors import require
from lightning_modules.encoders.contract import Encoder, view
from lightning_modules.encoders.fast import nine_parts
from run_folder import resolve_checkpoint
from studies.common import encoder_run


def add_options(parser: argparse.ArgumentParser) -> None:
    runs = "run folders or checkpoints of a FastEncoder (default: newest in runs/triplet_encoder)"
    parser.add_argument("--encoder", nargs="+", help=runs)
    parser.add_argument("--crops", type=int, help="side in pixels of the corners and the centre (default: no crops)")


def shown(images: Tensor, views: list[tuple[bool, int]], side: int | None) -> Iterator[Tensor]:
    """The views of images (B, 3, H, W); then the corners and the centre, resized to (H, W), and their mirror images."""
    for which in views:
        yield view(images, *which)
    if side:
        end = images.shape[-1] - side
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)):
            crop = images[..., top : top + side, left : left + side]
            crop = F.interpolate(crop, images.shape[-2:], mode="bilinear")
            yield from (crop, crop.flip(-1))


@torch.no_grad()
def read(
    encoder: Encoder, head: Tensor | None, images: ImageSet, views: list[tuple[bool, int]], side: int | None
) -> dict[str, Tensor]:
    """For each place (N, its width) float32, the mean over what `shown` gives."""
    found: dict[str, list[Tensor]] = {}
    for batch, *_ in BatchLoader(*images, 500):
        of_views = [places(encoder, head, x) for x in shown(batch, views, side)]
        for place in of_views[0]:
            found.setdefault(place, []).append(torch.stack([x[place] for x in of_views]).mean(0))
    return {place: torch.cat(x) for place, x in found.items()}


def places(encoder: Encoder, head: Tensor | None, images: Tensor) -> dict[str, Tensor]:
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[2])) for block in encoder.blocks]
    features = encoder(images)[:, : encoder.contrast_dim]
    for hook in hooks:
        hook.remove()
    mean, parts = blocks[2].mean((2, 3)), [nine_parts(block) for block in blocks]
    found = {
        "second block, mean over its positions": blocks[1].mean((2, 3)),
        "second block, means over 3×3 parts": parts[1],
        "third block, mean over its positions": mean,
        "third block, maximum over its positions": blocks[2].amax((2, 3)),
        "third block, its 3×3 positions": parts[2],
        "third block's mean, second block's 3×3 parts": torch.cat([mean, parts[1]], dim=1),
        "third block's mean, 3×3 parts of both before": torch.cat([mean, parts[1], parts[0]], dim=1),
        "what the head reads, each image's of length 1": F.normalize(features, dim=1),
    }
    if head is not None:
        found["the projection head's embeddings"] = features @ head.T
        found["embeddings of length 1, as the loss sees them"] = F.normalize(features @ head.T, dim=1)
    return found


def accuracy(options: argparse.Namespace, encoder: Encoder, train: Tensor, val: Tensor) -> float:
    """The linear probe's, fitted on values (N, width) of the training images in place of the encoder's features."""
    seed_everything(0, verbose=False)
    made = shipped(options, "linear_probe")
    made.data.cache_features({"train": train, "val": val})
    encoder.feature_dim = train.shape[1]
    made.model.adopt(encoder, {})
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=made.trainer["max_epochs"], **QUIET)
    trainer.fit(made.model, datamodule=made.data)
    return float(trainer.callback_metrics["val/accuracy"])


def of_encoder(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """The accuracy of each place of a run's encoder."""
    data, file = shipped(options, "linear_probe").data, resolve_checkpoint(folder, Path(folder).parent)
    checkpoint = load_checkpoint(file)
    encoder, head = encoder_from_checkpoint(file, checkpoint), checkpoint["state_dict"].get("head.weight")
    views = {"train": encoder.views if options.crops else [(False, 0)], "val": encoder.views}
    train, val = (read(encoder, head, data.split(split), views[split], options.crops) for split in views)
    return {place: accuracy(options, encoder, train[place], val[place]) for place in train}


def rows(options: argparse.Namespace) -> Rows:
    require(options.crops is None or 1 <= options.crops <= 32, "--crops", options.crops, "1..32 pixels")
    runs = [of_encoder(options, folder) for folder in options.encoder or [encoder_run(options)]]
    found = {place: [accuracies[place] for accuracies in runs] for place in runs[0]}
    numbered = {place: {f"run {i}": value for i, value in enumerate(values)} for place, values in found.items()}
    return [{"name": place, **numbered[place], "mean": statistics.fmean(found[place])} for place in found]


if __name__ == "__main__":
    run("studies.reading")
