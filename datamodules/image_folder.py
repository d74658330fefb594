"""Your own images: a folder with a folder for each class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms.functional import center_crop, resize

from datamodules.arrays import ImageSet
from datamodules.in_memory import InMemoryDataModule
from errors import InputError, first_line

say = rank_zero_only(print)


class ImageFolderDataModule(InMemoryDataModule):
    """Images of any size in `root/train/CLASS/` and `root/test/CLASS/`, made 32×32 once and kept in memory.

    Classes are the folders of `root/train`, in alphabetical order, as in torchvision's ImageFolder. Of an image that is not
    square the middle is taken. `root/test` may also hold images without class folders; they serve `predict` only. How many
    images each class has is said when they are read.

    Args:
        root: folder with `train` and, for `test` and `predict`, `test`.
        classes: keep these classes only, relabelled 0, 1, … in this order.
        val_size: training images held out for validation, counted before `classes` is applied; null: a tenth.
        split_seed: fixes which images those are, apart from `seed_everything`.
        batch_size: global batch size, over all processes.
        flip: mirror images while fitting.
        translate: shift images by up to this many pixels while fitting.
        cutout: hide a square of this side, somewhere in each image, while fitting.
    """

    def __init__(
        self,
        root: str,
        classes: list[int] | None = None,
        val_size: int | None = None,
        split_seed: int = 0,
        batch_size: int = 256,
        flip: bool = True,
        translate: int = 2,
        cutout: int = 0,
    ) -> None:
        self.root = Path(root)
        self.CLASSES = tuple(class_folders(self.root / "train"))
        if len(self.CLASSES) < 2:
            raise InputError(f"{self.root / 'train'}: needs a folder of images for each of at least two classes")
        if val_size is None:
            val_size = sum(len(image_files(self.root / "train" / name)) for name in self.CLASSES) // 10
        super().__init__(classes, val_size, split_seed, batch_size, flip, translate, cutout)
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        folder = self.root / split
        if split == "train" or class_folders(folder):
            files, labels = labelled_files(folder, self.CLASSES)
        else:
            files, labels = image_files(folder), None
        if split == "test" and not self.classes:
            self.test_files = list(map(str, files))
        return ImageSet(read_images(files), labels)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, in alphabetical order. Raises InputError where it is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it is to hold a folder of images for each class")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The images in `folder` and below, sorted by path. Raises InputError where there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not files:
        raise InputError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) in this folder")
    return files


def labelled_files(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    """Files and labels (N,) of `folder`'s class folders, which may be some of `classes` but no others."""
    unknown = set(class_folders(folder)) - set(classes)
    if unknown:
        raise InputError(f"{folder}: folder {sorted(unknown)[0]} is none of the classes {', '.join(classes[:20])}")
    files = {name: image_files(folder / name) for name in classes if (folder / name).is_dir()}
    counts = {name: len(paths) for name, paths in files.items()}
    say_counts(counts, folder)
    labels = torch.cat([torch.full((counts[name],), label) for label, name in enumerate(classes) if name in counts])
    return [path for paths in files.values() for path in paths], labels


def say_counts(counts: dict[str, int], where: Path) -> None:
    """Says how many images there are, and how unequal the classes are."""
    few, many = min(counts, key=counts.get), max(counts, key=counts.get)
    say(
        f"data: {sum(counts.values()):,} images of {len(counts)} classes in {where}; fewest {counts[few]:,} {few}, most {counts[many]:,} {many}"
    )


def read_images(files: list[Path]) -> Tensor:
    """Images of any size and mode → (N, 32, 32, 3) uint8: the shorter side resized to 32, then the middle of the longer.

    Says so where one was not 32×32. Raises InputError naming a file that is no readable image.
    """

    def read(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            image = pil_loader(path)
            return np.asarray(image if image.size == (32, 32) else center_crop(resize(image, 32), 32)), image.size
        except Exception as error:  # Pillow raises a dozen kinds
            raise InputError(f"{path}: not a readable image ({type(error).__name__}: {first_line(error)})") from error

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        pixels, sizes = zip(*pool.map(read, files))
    others = [size for size in sizes if size != (32, 32)]
    if others:
        smallest, largest = min(others), max(others)
        spread = f"{smallest[0]}×{smallest[1]}" + (f" … {largest[0]}×{largest[1]}" if smallest != largest else "")
        say(
            f"data: {len(others):,} of {len(files):,} images in {files[0].parent} are not 32×32 ({spread}): their middle squares are resized"
        )
    return torch.from_numpy(np.stack(pixels))
