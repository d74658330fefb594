"""What tests/test_distributed.py starts as N processes: losses and weights of short fits, written by rank 0.

python -m torch.distributed.run --nproc_per_node N tests/worker.py FILE
"""

import itertools
import os
import sys
import warnings

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import nn

from datamodules import DigitsDataModule
from lightning_modules import (
    CosineDistance,
    EuclideanDistance,
    FastEncoder,
    LMNNLoss,
    MahalanobisDistance,
    MultiNegativeLoss,
    PairwiseContrastiveLoss,
    PrototypicalLoss,
    SoftMarginTripletLoss,
    SupConLoss,
    TripletEncoder,
    TripletMarginLoss,
)
from lightning_modules.distributed import gather_objects, share_batch_norm, world
from main import leave_processes

DISTANCES = {
    "Euclidean": EuclideanDistance,
    "squared Euclidean": lambda: EuclideanDistance(squared=True),
    "Euclidean on the sphere": lambda: EuclideanDistance(normalize=True),
    "cosine": CosineDistance,
    "Mahalanobis": lambda: MahalanobisDistance(dim=8),
}
LOSSES = {
    "multi-negative": MultiNegativeLoss,
    "SupCon": SupConLoss,
    "decoupled SupCon": lambda: SupConLoss(decoupled=True),
    "pairwise": PairwiseContrastiveLoss,
    "prototypical": PrototypicalLoss,
    "LMNN": LMNNLoss,
    "LMNN, Mahalanobis": lambda: LMNNLoss(distance=MahalanobisDistance(dim=8, squared=True)),
    **{
        f"margin, {triplets}, {name}": lambda triplets=triplets, distance=distance: TripletMarginLoss(
            triplets, 0.5, distance()
        )
        for triplets, (name, distance) in itertools.product(("random", "hard", "semihard", "all"), DISTANCES.items())
    },
    **{
        f"soft margin, {triplets}, {name}": lambda triplets=triplets, distance=distance: SoftMarginTripletLoss(
            triplets, distance()
        )
        for triplets, (name, distance) in itertools.product(("random", "hard"), DISTANCES.items())
    },
}


VIEWS = {"views": 2, "crop_scale": [0.3, 1.0], "color_jitter": 0.5, "greyscale": 0.2, "small_views": 2}


class LastLoss(Callback):
    """Keeps the loss of the last step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.loss = outputs["loss"]


def fit(loss, precision: str, steps: int, lr: float = 0.02, views: dict | None = None, **options) -> dict:
    """The last step's loss, and all weights and buffers, after `steps` steps of SGD on augmented digits."""
    seed_everything(1, verbose=False)  # not torch.manual_seed: N processes seed again from what the environment says
    options = {"momentum": 0.0, "z_dim": 8, "lr": lr} | options
    model = TripletEncoder(FastEncoder([8, 8, 8]), loss(), **options)
    last = LastLoss()
    trainer = Trainer(
        max_steps=steps, callbacks=[last], limit_val_batches=0, precision=precision, accelerator="cpu", logger=False,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=64, flip=True, translate=2, **(views or {})))
    return {"loss": last.loss, **model.state_dict()}


def bare_batch_norm() -> dict:
    """Gradient and buffers of a BatchNorm without weights that averages over all batches."""
    layer = nn.Sequential(nn.BatchNorm2d(3, affine=False, momentum=None)).double()
    share_batch_norm(layer)
    rank, processes = world()
    torch.manual_seed(0)
    x, slope = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    mine = x.chunk(processes)[rank].requires_grad_()
    layer(mine + 1)
    (layer(mine) * slope.chunk(processes)[rank]).sum().backward()
    return {"gradient": torch.cat(gather_objects(mine.grad)), **layer.state_dict()}


def main(file: str) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name, loss in LOSSES.items():
        found[name] = fit(loss, "64-true", 1)
    for name in ("multi-negative", "margin, random, Euclidean", "margin, all, Euclidean on the sphere"):
        found[f"{name}, 20 steps"] = fit(LOSSES[name], "64-true", 20)
    for name in ("multi-negative", "prototypical", "margin, all, Euclidean on the sphere"):
        # At a low rate: at 0.02, rounding grows so fast in float32 that 1 and 2 threads of one process differ as much.
        found[f"{name}, float32"] = fit(LOSSES[name], "32-true", 20, lr=1e-4)
    for name in ("decoupled SupCon", "prototypical", "margin, random, Euclidean"):
        options = {"positives": "view", "z_hidden": 16, "optimizer": "muon", "momentum": 0.9}
        found[f"{name}, views"] = fit(LOSSES[name], "64-true", 3, views=VIEWS, **options)
    found["BatchNorm"] = bare_batch_norm()
    found["multi-negative, local"] = fit(MultiNegativeLoss, "64-true", 1, global_mining=False)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(found, file)
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1])
