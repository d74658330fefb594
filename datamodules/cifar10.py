"""CIFAR-10 from .npz files or from torchvision (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009)."""

import urllib.error
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from datamodules.arrays import ImageSet, read_npz
from datamodules.in_memory import InMemoryDataModule
from errors import InputError


class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10, or images of the same shape in .npz files.

    Args:
        root: folder where `cifar10_train.npz` and `cifar10_test.npz` are looked for first, then torchvision's copy.
        train_npz: training file (`images` (N, 32, 32, 3) uint8, `labels` (N,) integers in 0..9) to use instead.
        test_npz: test file to use instead; without labels it serves `predict` only.
        download: let torchvision download CIFAR-10 (170 MB, checksum verified) into `root` when nothing is there.
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
        train_npz: str | None = None,
        test_npz: str | None = None,
        download: bool = True,
        classes: list[int] | None = None,
        val_size: int = 5000,
        split_seed: int = 0,
        batch_size: int = 512,
        flip: bool = True,
        translate: int = 2,
        cutout: int = 0,
    ) -> None:
        super().__init__(classes, val_size, split_seed, batch_size, flip, translate, cutout)
        self.save_hyperparameters()
        self.root, self.download = Path(root), download
        self.npz = {"train": train_npz, "test": test_npz}

    def prepare_data(self) -> None:
        split = "test" if self.trainer.state.fn in ("test", "predict") else "train"
        if self.download and self._npz(split) is None:
            self._torchvision(split, download=True)

    def load(self, split: str) -> ImageSet:
        path = self._npz(split)
        if path is not None:
            return read_npz(path, len(self.CLASSES), labels_required=split == "train")
        dataset = self._torchvision(split, download=False)
        # torchvision's array is a view of channel-first data, whose batches would not be channels last in memory.
        return ImageSet(torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.tensor(dataset.targets))

    def _npz(self, split: str) -> Path | None:
        if self.npz[split] is not None:
            return Path(self.npz[split])
        path = self.root / f"cifar10_{split}.npz"
        return path if path.exists() else None

    def _torchvision(self, split: str, download: bool) -> CIFAR10:
        ways = f"put cifar10_{split}.npz into {self.root}/, or give --data.{split}_npz FILE"
        try:
            return CIFAR10(str(self.root), train=split == "train", download=download)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"no CIFAR-10 in {self.root}/ and the download failed ({reason}); {ways}") from error
        except (RuntimeError, OSError) as error:
            why = "the download is switched off" if not self.download else str(error).splitlines()[0]
            raise InputError(f"no intact CIFAR-10 in {self.root}/ ({why}); {ways}") from error
