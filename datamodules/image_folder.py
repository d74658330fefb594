"""Your own images: a folder with a folder for each class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms.functional import center_crop, resize

from datamodules.arrays import ImageSet
from datamodules.in_memory import InMemoryDataModule, say
from errors import InputError, first_line, require


class ImageFolderDataModule(InMemoryDataModule):
    """Images of any size in `root/train/CLASS/` and `root/test/CLASS/`, made 32×32 once and kept in memory.

    Classes are the folders of `root/train`, in alphabetical order, as in torchvision's ImageFolder. An image that is
    not square gives its middle. `root/test` may also hold images without class folders; they serve `predict` only. The
    number of images in each class is printed when they are read.

    Args:
        root: folder with `train` and, for `test` and `predict`, `test`.
        val_size: training images held out for validation, counted before `classes` is applied; null: a tenth.
    """

    def __init__(self, root: str, val_size: int | None = None, batch_size: int = 256, **kwargs) -> None:
        self.root = Path(root)
        names = class_folders(self.root / "train")
        require(len(names) >= 2, "data.root", root, "a folder with images of at least two classes in train/CLASS/")
        if val_size is None:
            val_size = sum(len(image_files(self.root / "train" / name)) for name in names) // 10
        super().__init__(val_size=val_size, batch_size=batch_size, names=names, **kwargs)
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        folder = self.root / split
        found = class_folders(folder)
        if split == "test" and not found:
            files, labels = image_files(folder), None
        else:
            for name in found:
                require(
                    name in self.names, f"{folder}: folder", name, f"one of the classes {', '.join(self.names[:20])}"
                )
            here = [(label, folder / name) for label, name in enumerate(self.names) if name in found]
            files, labels = zip(*((path, label) for label, place in here for path in image_files(place)))
            labels = torch.tensor(labels)
            say_counts(labels, self.names, folder)
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


def say_counts(labels: Tensor, names: tuple[str, ...], where: Path) -> None:
    """Prints how many images there are, and how unequal the classes are."""
    counts = labels.bincount(minlength=len(names)).tolist()
    few, many = (f"{counts[i]:,} {names[i]}" for i in (counts.index(min(counts)), counts.index(max(counts))))
    say(f"data: {len(labels):,} images of {len(names)} classes in {where}; fewest {few}, most {many}")


def read_images(files: Sequence[Path]) -> Tensor:
    """Images of any size and mode → (N, 32, 32, 3) uint8: the shorter side becomes 32, the longer keeps its middle.

    Prints how many were not 32×32. Raises InputError naming a file that is no readable image.
    """

    def read(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            image = pil_loader(path)
            return np.asarray(image if image.size == (32, 32) else center_crop(resize(image, 32), 32)), image.size
        except Exception as error:  # Pillow raises a dozen kinds
            raise InputError(f"{path}: not a readable image ({type(error).__name__}: {first_line(error)})") from error

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        pixels, sizes = zip(*pool.map(read, files))
    others = sorted(size for size in sizes if size != (32, 32))
    if others:
        spread = " … ".join(f"{width}×{height}" for width, height in dict.fromkeys((others[0], others[-1])))
        count = f"{len(others):,} of {len(files):,} images in {files[0].parent}"
        say(f"data: {count} are not 32×32 ({spread}): their middle squares are resized")
    return torch.from_numpy(np.stack(pixels))
