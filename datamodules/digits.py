"""scikit-learn's handwritten digits: real images that come with the installation."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from datamodules.arrays import ImageSet, stratified_split
from datamodules.in_memory import InMemoryDataModule


class DigitsDataModule(InMemoryDataModule):
    """1,797 handwritten digits (E. Alpaydin & C. Kaynak, UCI, 1998) as 32×32 RGB: 1,077 / 360 / 360 images.

    8×8 grey images of 17 levels are enlarged bilinearly to 32×32 and repeated over three channels. The 360 test
    images are fixed. Needs no network and no files: the place to try every command.

    Args:
        classes: keep these digits only, relabelled 0, 1, … in this order.
        val_size: training images held out for validation, counted before `classes` is applied.
        split_seed: fixes which images those are, apart from `seed_everything`.
        batch_size: global batch size, over all processes.
        flip: mirror images while fitting; off, since a mirrored digit is another sign.
        translate: shift images by up to this many pixels while fitting.
        cutout: hide a square of this side, somewhere in each image, while fitting.
    """

    CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(
        self,
        classes: list[int] | None = None,
        val_size: int = 360,
        split_seed: int = 0,
        batch_size: int = 128,
        flip: bool = False,
        translate: int = 2,
        cutout: int = 0,
    ) -> None:
        super().__init__(classes, val_size, split_seed, batch_size, flip, translate, cutout)
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
        labels = labels.long()
        grey = F.interpolate(pixels.view(-1, 1, 8, 8).float() * (255 / 16), size=32, mode="bilinear", antialias=False)
        images = grey.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
        train, test = stratified_split(labels, size=360, seed=0)
        chosen = train if split == "train" else test
        return ImageSet(images[chosen], labels[chosen])
