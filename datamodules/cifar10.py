"""CIFAR-10 from .npz files or from torchvision (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009)."""

import urllib.error
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from datamodules.arrays import ImageSet, read_npz
from datamodules.image_folder import image_files, read_images, say_counts
from datamodules.in_memory import InMemoryDataModule
from errors import InputError

CIFAR100_CLASSES = tuple((
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
).split())  # fmt: skip


class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10 or CIFAR-100, or images of the same shape in .npz files.

    Args:
        root: folder where `cifar10_train.npz` and `cifar10_test.npz` are looked for first, then torchvision's copy.
        dataset: cifar100: a hundred classes, from `cifar100_*.npz` or torchvision.
        train_npz: training file (`images` (N, 32, 32, 3) uint8, `labels` (N,) integers from 0 on) to use instead.
        test_npz: test file to use instead; without labels it serves `predict` only, and so does a folder of images of
            any size (`image_folder.read_images`).
        download: let torchvision download CIFAR-10 (170 MB, checksum verified) into `root` when nothing is there.
        class_names: those of your own files' classes, as many as there are; null: the data set's.
        classes: keep these classes only, relabelled 0, 1, … in this order: [0, 1] is airplane against automobile.
        val_size: training images held out for validation, counted before `classes` is applied.
        split_seed: fixes which images those are, apart from `seed_everything`.
        batch_size: global batch size, over all processes.
        flip: mirror images while fitting.
        translate: shift images by up to this many pixels while fitting.
        cutout: hide a square of this side, somewhere in each image, while fitting.
    """

    CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str = "data",
        dataset: Literal["cifar10", "cifar100"] = "cifar10",
        train_npz: str | None = None,
        test_npz: str | None = None,
        download: bool = True,
        class_names: list[str] | None = None,
        classes: list[int] | None = None,
        val_size: int = 5000,
        split_seed: int = 0,
        batch_size: int = 512,
        flip: bool = True,
        translate: int = 2,
        cutout: int = 0,
    ) -> None:
        if dataset == "cifar100":
            self.CLASSES = CIFAR100_CLASSES
        if class_names is not None:
            if len(set(class_names)) != len(class_names) or len(class_names) < 2:
                raise InputError(f"data.class_names {class_names}: give at least two different names")
            if train_npz is None:
                raise InputError("data.class_names are those of your own files: give --data.train_npz too")
            self.CLASSES = tuple(class_names)
        super().__init__(classes, val_size, split_seed, batch_size, flip, translate, cutout)
        self.save_hyperparameters()
        self.root, self.dataset, self.download = Path(root), dataset, download
        self.npz = {"train": train_npz, "test": test_npz}

    @property
    def torchvision_class(self) -> type[CIFAR10]:
        return CIFAR100 if self.dataset == "cifar100" else CIFAR10

    def prepare_data(self) -> None:
        split = "test" if self.trainer.state.fn in ("test", "predict") else "train"
        if self.download and self._npz(split) is None:
            self._torchvision(split, download=True)

    def load(self, split: str) -> ImageSet:
        path = self._npz(split)
        if path is not None and path.is_dir() and split == "test":
            files = image_files(path)
            self.test_files = list(map(str, files))
            return ImageSet(read_images(files), None)
        if path is not None:
            images = read_npz(path, len(self.CLASSES), labels_required=split == "train")
            if self.npz[split] is not None and images.labels is not None:
                say_counts(dict(zip(self.CLASSES, images.labels.bincount(minlength=len(self.CLASSES)).tolist())), path)
            return images
        dataset = self._torchvision(split, download=False)
        # torchvision's array is a view of channel-first data, whose batches would not be channels last in memory.
        return ImageSet(torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets))

    def _npz(self, split: str) -> Path | None:
        if self.npz[split] is not None:
            return Path(self.npz[split])
        path = self.root / f"{self.dataset}_{split}.npz"
        return path if path.exists() else None

    def _torchvision(self, split: str, download: bool) -> CIFAR10:
        name = self.torchvision_class.__name__.replace("CIFAR", "CIFAR-")
        ways = f"put {self.dataset}_{split}.npz into {self.root}/, or give --data.{split}_npz FILE"
        try:
            return self.torchvision_class(str(self.root), train=split == "train", download=download)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"no {name} in {self.root}/ and the download failed ({reason}); {ways}") from error
        except (RuntimeError, OSError) as error:
            why = "the download is switched off" if not self.download else str(error).splitlines()[0]
            raise InputError(f"no intact {name} in {self.root}/ ({why}); {ways}") from error
