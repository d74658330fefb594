"""Training images' features in two dimensions, before and after the fit: `tsne.png`, and TensorBoard's projector."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from sklearn.manifold import TSNE as SklearnTSNE

from callbacks.checkpoints import STEP0, load_checkpoint
from errors import InputError
from lightning_modules.encoders import Encoder


class TSNE(Callback):
    """Draws a t-SNE (L. van der Maaten & G. Hinton, 2008; scikit-learn's) of `pl_module.encoder`'s features after fit,
    beside one of the features before it (of the run's untrained checkpoint).

    The features after it go to TensorBoard's projector, each with its image, its class and that of its nearest neighbour.

    Args:
        samples: training images to draw, equally many of each class where there are enough.
        perplexity: scikit-learn's; cut to what the sample allows.
    """

    def __init__(self, samples: int = 1000, perplexity: float = 30.0) -> None:
        if samples < 10:
            raise InputError(f"TSNE samples {samples}: must be at least 10")
        if not perplexity > 0:
            raise InputError(f"TSNE perplexity {perplexity}: must be above 0")
        self.samples, self.perplexity = samples, perplexity

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and trainer.logger):
            return
        labels = trainer.datamodule.split("train").labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        share = -(-self.samples // pl_module.num_classes)
        index = torch.cat([order[labels[order] == c][:share] for c in range(pl_module.num_classes)])[: self.samples]
        labels, folder = labels[index], Path(trainer.logger.log_dir)

        found = {}
        untrained = folder / "checkpoints" / STEP0
        if untrained.is_file():
            encoder = copy.deepcopy(pl_module.encoder)
            weights = load_checkpoint(untrained)["state_dict"].items()
            encoder.load_state_dict({name[8:]: value for name, value in weights if name.startswith("encoder.")})
            found["before training"] = self._features(trainer, encoder, index)
        found["after training"] = self._features(trainer, pl_module.encoder, index)
        if not all(
            features.std(0).max() > 0 for features in found.values()
        ):  # NaN too; scikit-learn does not survive either
            rank_zero_warn(
                "tsne.png is not drawn: the encoder gives every image the same features, or none that are finite"
            )
            return

        figure = Figure(figsize=(1.5 + 5.5 * len(found), 5.5), layout="constrained")
        for axes, (when, features) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            perplexity = min(self.perplexity, (len(index) - 1) / 3)
            tsne = SklearnTSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
            points = tsne.fit_transform(features.numpy())
            for c, name in enumerate(pl_module.class_names):
                axes.scatter(*points[(labels == c).numpy()].T, s=5, color=f"C{c}", label=name)
            axes.set(xticks=[], yticks=[], title=f"t-SNE of {len(index)} training images' features {when}")
        axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(folder / "tsne.png", dpi=120)
        trainer.logger.experiment.add_figure("tsne", figure, trainer.global_step)
        self._project(trainer, pl_module, found["after training"], index)

    @staticmethod
    def _features(trainer: Trainer, encoder: Encoder, index: torch.Tensor) -> torch.Tensor:
        was_training = encoder.training
        encoder.eval()
        with trainer.precision_plugin.forward_context():
            features = encoder.embed_all(trainer.datamodule.evaluation_loader("train", index), shifted=False).cpu()
        encoder.train(was_training)
        return features

    def _project(
        self, trainer: Trainer, pl_module: LightningModule, features: torch.Tensor, index: torch.Tensor
    ) -> None:
        images, labels = (x[index].cpu() for x in trainer.datamodule.split("train"))
        unit = F.normalize(features, dim=1)
        nearest = labels[(unit @ unit.T).fill_diagonal_(-1).argmax(1)]
        names = pl_module.class_names
        trainer.logger.experiment.add_embedding(
            features,
            metadata=[(names[c], names[n]) for c, n in zip(labels.tolist(), nearest.tolist())],
            metadata_header=["class", "nearest neighbour's class"],
            label_img=images.permute(0, 3, 1, 2).float() / 255,
            tag="features",
            global_step=trainer.global_step,
        )
