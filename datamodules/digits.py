"""scikit-learn's handwritten digits: real images that come with the installation."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from datamodules.arrays import ImageSet, random_split
from datamodules.in_memory import InMemoryDataModule

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitsDataModule(InMemoryDataModule):
    """1,797 handwritten digits (E. Alpaydin & C. Kaynak, UCI, 1998) as 32×32 RGB: 1,077 / 360 / 360 images.

    8×8 grey images of 17 levels are enlarged bilinearly to 32×32 and repeated over three channels. The 360 test
    images are fixed. Needs no network and no files: the place to try every command.

    Args:
        flip: mirror images while fitting; off, since a mirrored digit is another sign.
    """

    source = "digits"

    def __init__(self, val_size: int = 360, batch_size: int = 128, flip: bool = False, **kwargs) -> None:
        super().__init__(val_size=val_size, batch_size=batch_size, flip=flip, names=NAMES, **kwargs)
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
        labels = labels.long()
        grey = F.interpolate(pixels.view(-1, 1, 8, 8).float() * (255 / 16), size=32, mode="bilinear", antialias=False)
        images = grey.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
        train, test = random_split(len(labels), size=360, seed=0)
        chosen = train if split == "train" else test
        return ImageSet(images[chosen], labels[chosen])
