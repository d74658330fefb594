"""Your own images: a folder with a folder for each class."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize

from datamodules.arrays import ImageSet
from datamodules.in_memory import InMemoryDataModule, say
from errors import InputError, first_line, local_path, require


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
        self.root = local_path(root)
        names = tuple(class_folders(self.root / "train"))
        require(len(names) >= 2, "data.root", root, "a folder with images of at least two classes in train/CLASS/")
        if val_size is None:
            val_size = sum(len(image_files(place)) for place in class_folders(self.root / "train").values()) // 10
        super().__init__(val_size=val_size, batch_size=batch_size, names=names, **kwargs)
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        folder, left_out = self.root / split, Counter()
        found = class_folders(folder)
        if split == "test" and not found:
            files, labels = image_files(folder, left_out), None
        else:
            for name in found:
                known = f"one of the classes {', '.join(self.names[:20])}"
                require(name in self.names, f"{folder}: folder", name, known)
            here = [(label, found[name]) for label, name in enumerate(self.names) if name in found]
            files, labels = zip(*((path, label) for label, place in here for path in image_files(place, left_out)))
            labels = torch.tensor(labels)
            say_counts(labels, self.names, folder)
        if left_out:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
            say(f"data: files in {folder} that are left out: {kinds}")
        if split == "test" and not self.classes:
            self.test_files = list(map(printable, files))
        return ImageSet(read_images(files), labels)


def printable(text: str | Path) -> str:
    """A name as text in UTF-8: bytes that are none of any letter become escapes."""
    return str(text).encode(errors="backslashreplace").decode()


def hidden(name: str) -> bool:
    """Whether a file browser does not show what some program has left there."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders in `folder` by name, in alphabetical order. Raises InputError where it is none."""
    try:
        places = sorted(path for path in folder.iterdir() if not hidden(path.name))
    except OSError as error:
        why = f"no such folder, or not readable ({error.strerror})"
        raise InputError(f"{folder}: {why}; it is to hold a folder of images for each class") from error
    for path in places:
        require(path.exists(), f"{folder}: link", path.name, "a link to a folder or file that is there")
    return {printable(path.name): path for path in places if path.is_dir()}


def image_files(folder: Path, left_out: Counter | None = None) -> list[Path]:
    """The images in `folder` and below, linked folders too, sorted by path.

    `left_out` counts the other files by kind. Raises InputError where there is no image, or a folder is not readable.
    """
    left_out, files, seen = Counter() if left_out is None else left_out, [], set()

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(place))  # a link may lead back up
        folders[:] = [f for f in folders if not hidden(f) and os.path.realpath(Path(place, f)) not in seen]
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not hidden(path.name):
                files.append(path)
            else:
                kind = "hidden" if hidden(path.name) else f"of kind {path.suffix or 'unknown'}"
                left_out[kind if path.exists() else "links that lead nowhere"] += 1
    if not files:
        raise InputError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) in this folder")
    return sorted(files)


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
            with Image.open(path) as file:
                image = as_shown(file)
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


def as_shown(file: Image.Image) -> Image.Image:
    """The picture that a viewer shows, in RGB: upright, on white where it is transparent, of an animation the first.

    Greys of 16 bits keep their upper eight; greys in floats are taken as 0 … 1. Raises ValueError for other numbers.
    """
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "I" or not (0 <= values.min() and values.max() <= 1):
            raise ValueError("grey values that are neither of 8 or 16 bits nor floats from 0 to 1; convert it")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
