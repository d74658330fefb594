"""CIFAR-10 from .npz files or from torchvision (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009)."""

import os
import socket
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from datamodules.arrays import ImageSet, read_npz
from datamodules.image_folder import image_files, read_images, say_counts, say_left_out
from datamodules.in_memory import InMemoryDataModule
from errors import InputError, first_line, local_path, printable, require

SILENCE = 60  # seconds after which a server that sends nothing is given up; urllib waits for ever
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
            Without labels it serves an encoder whose positives are views.
        test_npz: test file to use instead; without labels it serves `predict` only, and so does a folder of images of
            any size (`image_folder.read_images`).
        download: let torchvision download CIFAR-10 (170 MB, checksum verified) into `root` when nothing is there.
        class_names: those of your own files' classes, as many as there are; null: the data set's.
    """

    CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str = "data",
        dataset: Literal["cifar10", "cifar100"] = "cifar10",
        train_npz: str | None = None,
        test_npz: str | None = None,
        download: bool = True,
        class_names: list | None = None,
        **kwargs,
    ) -> None:
        names = CIFAR100_CLASSES if dataset == "cifar100" else self.CLASSES
        if class_names is not None:
            texts = 'names in quotes, such as \'["yes","1"]\': YAML takes some words for something else'
            require(all(isinstance(n, str) and n.strip() for n in class_names), "data.class_names", class_names, texts)
            different = len(set(class_names)) == len(class_names) >= 2
            require(different, "data.class_names", class_names, "at least two different names")
            own = "those of your own files: give --data.train_npz too"
            require(train_npz is not None, "data.class_names", class_names, own)
        super().__init__(names=class_names or names, **kwargs)
        self.save_hyperparameters()
        self.root, self.dataset, self.download = local_path(root), dataset, download
        given = {"train": train_npz, "test": test_npz}
        for split, path in given.items():  # as `--data.test_npz=$UNSET` gives it
            require(path != "", f"data.{split}_npz", "''", "a file's name; leave the option out for the data set's own")
        self.npz = {split: path and local_path(path) for split, path in given.items()}
        self.has_test = train_npz is None if test_npz is None else not os.path.isdir(self.npz["test"])
        self.source = dataset if train_npz is None else f"{self.source} (data.train_npz)"

    def prepare_data(self) -> None:
        split = "test" if self.trainer.state.fn in ("test", "predict") else "train"
        if self.download and self._npz(split) is None:
            self._torchvision(split, download=True)

    def load(self, split: str) -> ImageSet:
        path = self._npz(split)
        if split == "test" and self.npz["test"] is None:
            self.fingerprint["images"] = self.source
        if path is None:
            dataset = self._torchvision(split, download=False)
            # torchvision's array is a view of channel-first data, whose batches would not be channels last in memory.
            return ImageSet(torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets))
        if os.path.isdir(path) and split == "test":
            left_out = Counter()
            files = image_files(path, left_out)
            say_left_out(left_out, path)
            self.test_files = list(map(printable, files))
            return ImageSet(read_images(files), None)
        if split == "train":
            self.train_place = str(path)
        images = read_npz(path, len(self.names))
        if self.npz[split] is not None and images.labels is not None:
            say_counts(images.labels, self.names, path)
        return images

    def _npz(self, split: str) -> Path | None:
        if self.npz[split] is not None:
            return self.npz[split]
        if split == "test" and self.npz["train"] is not None:
            raise InputError(f"data.test_npz: needed beside data.train_npz {self.npz['train']}, of the same classes")
        path = self.root / f"{self.dataset}_{split}.npz"
        return path if os.path.lexists(path) else None  # a link that leads nowhere is refused, not downloaded

    def _torchvision(self, split: str, download: bool) -> CIFAR10:
        name = self.dataset.replace("cifar", "CIFAR-")
        ways = f"put {self.dataset}_{split}.npz into {self.root}/, or give --data.{split}_npz FILE"
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(before or SILENCE)
        try:
            dataset = CIFAR100 if self.dataset == "cifar100" else CIFAR10
            return dataset(str(self.root), train=split == "train", download=download)
        except Exception as error:  # of whatever kind a download that breaks off leads urllib, tarfile or pickle to
            why = first_line(error) if self.download else "the download is switched off"
            raise InputError(f"no intact {name} in {self.root}/ ({why}); {ways}") from error
        finally:
            socket.setdefaulttimeout(before)
