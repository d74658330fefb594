"""Training images' features in two dimensions, before and after the fit: `tsne.png`, and TensorBoard's projector."""

import copy
import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from sklearn.manifold import TSNE as SklearnTSNE
from torch import Tensor

from callbacks.figures import draw_tsne, save, tensorboards
from checkpoint_file import load_checkpoint
from errors import require
from lightning_modules.encoder_stage import EncoderStage
from lightning_modules.triplet_encoder import nearest_labels
from run_folder import Run, folder_of


class TSNE(Callback):
    """Draws a t-SNE (L. van der Maaten & G. Hinton, 2008; scikit-learn's) of an encoder's features after its fit and
    before it, from the run's untrained checkpoint.

    The features after the fit go to TensorBoard's projector too, each with its image, its class and the class of its
    nearest neighbour. Does nothing for a stage that trains no encoder.

    Args:
        samples: training images to draw, equally many of each class where there are enough; null: 1000, or fewer
            after a fit of less than eleven minutes, so that drawing takes about a hundredth of its time.
        perplexity: scikit-learn's; reduced to what the sample allows.
        pictures: false: nothing is drawn.
    """

    def __init__(self, samples: int | None = None, perplexity: float = 30.0, pictures: bool = True) -> None:
        require(samples is None or samples >= 10, "tsne.samples", samples, "at least 10")
        require(perplexity > 0, "tsne.perplexity", perplexity, "above 0")
        self.samples, self.perplexity, self.pictures = samples, perplexity, pictures

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if not self.pictures or not isinstance(pl_module, EncoderStage) or folder is None:
            return
        images, labels = trainer.datamodule.split("train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        # An image takes up to six milliseconds: two layouts, and two passes through the network.
        samples = self.samples or max(100, min(1000, int(1.5 * (time.monotonic() - self._began))))
        rank = torch.empty_like(order)  # of an image among those of its class
        for c in labels.unique():
            own = labels[order] == c
            rank[own] = torch.arange(int(own.sum()))
        index = order[rank.argsort(stable=True)][:samples]
        images, labels = images[index].cpu(), labels[index].cpu()
        loader, encoder = trainer.datamodule.evaluation_loader("train", index), copy.deepcopy(pl_module.encoder).eval()
        with trainer.precision_plugin.forward_context():
            found = {"after training": encoder.embed_all(loader, single_view=True)[:, : encoder.contrast_dim].cpu()}
            if (step0 := Run(folder).step0).is_file():
                weights = load_checkpoint(step0)["state_dict"].items()
                encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in weights if k.startswith("encoder.")})
                before = encoder.embed_all(loader, single_view=True)[:, : encoder.contrast_dim].cpu()
                found = {"before training": before, **found}
        if not all(x.std(0, correction=0).max() > 0 for x in found.values()):  # NaN too; scikit-learn survives neither
            rank_zero_warn("no tsne.png: the encoder gives every image the same features, or none that are finite")
            return
        tsne = SklearnTSNE(perplexity=min(self.perplexity, (len(index) - 1) / 3), max_iter=500, random_state=0)
        points = {when: torch.from_numpy(tsne.fit_transform(x.numpy())) for when, x in found.items()}
        save(trainer, draw_tsne(points, labels, pl_module.class_names), "tsne.png", "tsne")
        project(trainer, found["after training"], images, labels, pl_module.class_names)


def project(trainer: Trainer, features: Tensor, images: Tensor, labels: Tensor, names: list[str]) -> None:
    """Adds features (N, D) of images (N, 32, 32, 3) uint8 with labels (N,) to TensorBoard's projector."""
    nearest = nearest_labels(features, labels, 0, len(labels))
    names = [" ".join(name.split()) for name in names or ["–"]]  # a row is a line, its cells are divided by tabs
    rows = [(names[own], names[other]) for own, other in zip(labels.tolist(), nearest.tolist())]
    pixels, head = images.permute(0, 3, 1, 2).float() / 255, ["class", "nearest neighbour's class"]
    for logger in tensorboards(trainer):
        logger.experiment.add_embedding(features, rows, pixels, trainer.global_step, "features", metadata_header=head)
