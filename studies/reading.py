"""Where the features are read: a linear classifier on each place of a trained default encoder that a probe could read.

    python -m benchmarks.reading --encoder RUN [RUN ...]

Softmax regression with the options of configs/linear_probe.yaml on standardised values of the training images as they
are. Its accuracy on validation images after the last epoch, where each image's values are the mean over the views that a
probe's evaluation takes.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.checkpoints import load_checkpoint, resolve_checkpoint
from callbacks.frozen_encoder import encoder_from_checkpoint
from datamodules import CIFAR10DataModule
from datamodules.arrays import ImageSet
from datamodules.loader import BatchLoader
from lightning_modules.encoders.contract import Encoder, view, view_list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", nargs="+", required=True, help="run folders or checkpoints of configs/triplet_encoder.yaml"
    )
    parser.add_argument("--data-dir", default="data", help="folder with cifar10_train.npz (default: %(default)s)")
    options = parser.parse_args()

    data = CIFAR10DataModule(root=options.data_dir)
    splits = {split: data.split(split) for split in ("train", "val")}
    accuracies: dict[str, list[float]] = {}
    for run in options.encoder:
        path = resolve_checkpoint(run, Path(run).parent)
        encoder = encoder_from_checkpoint(path).eval()
        head = load_checkpoint(path)["state_dict"]["head.weight"]
        train = read(encoder, head, splits["train"], [(False, 0)])
        val = read(encoder, head, splits["val"], view_list(bool(encoder.mirror), int(encoder.shift)))
        for place, x in train.items():
            classifier = softmax_regression(x, splits["train"].labels)
            correct = classifier(val[place]).argmax(1) == splits["val"].labels
            accuracies.setdefault(place, []).append(correct.float().mean().item())
    print("\n| read | width | linear classifier, validation |\n|---|---|---|")
    for place, found in accuracies.items():
        print(f"| {place} | {train[place].shape[1]} | {' / '.join(f'{a:.4f}' for a in found)} |")


@torch.no_grad()
def read(encoder: Encoder, head: Tensor, images: ImageSet, views: list[tuple[bool, int]]) -> dict[str, Tensor]:
    """For each place (N, its width) float32, the mean over the views."""
    found: dict[str, list[Tensor]] = {}
    for batch, *_ in BatchLoader(*images, 500):
        sums: dict[str, Tensor] = {}
        for which in views:
            for place, x in places(encoder, head, view(batch, *which)).items():
                sums[place] = sums.get(place, 0) + x / len(views)
        for place, x in sums.items():
            found.setdefault(place, []).append(x)
    return {place: torch.cat(x) for place, x in found.items()}


def places(encoder: Encoder, head: Tensor, images: Tensor) -> dict[str, Tensor]:
    second: list[Tensor] = []
    third: list[Tensor] = []
    hooks = [
        encoder.blocks[i].register_forward_hook(lambda *args, to=to: to.append(args[2]))
        for i, to in ((1, second), (2, third))
    ]
    features = encoder(images)
    for hook in hooks:
        hook.remove()
    return {
        "second block, mean over its positions": second[0].mean((2, 3)),
        "third block, mean over its positions": third[0].mean((2, 3)),
        "third block, maximum over its positions: the features": features,
        "features, each image's of length 1": F.normalize(features, dim=1),
        "the projection head's embeddings": features @ head.T,
        "embeddings of length 1, as the loss sees them": F.normalize(features @ head.T, dim=1),
    }


def softmax_regression(x: Tensor, labels: Tensor, epochs: int = 10, batch_size: int = 512) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    standardise, linear = nn.BatchNorm1d(x.shape[1], affine=False, momentum=None), nn.Linear(x.shape[1], 10)
    standardise(x)  # momentum None: the statistics of all images at once
    standardise.eval()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    steps = epochs * (len(x) // batch_size)
    optimiser = torch.optim.Adam(linear.parameters(), lr=0.01, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch_size)[: len(x) // batch_size]:
            optimiser.zero_grad()
            F.cross_entropy(linear(standardise(x[index])), labels[index]).backward()
            optimiser.step()
            schedule.step()
    return nn.Sequential(standardise, linear).requires_grad_(False)


if __name__ == "__main__":
    main()
