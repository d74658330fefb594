"""Your own images: a folder with a folder for each class, or without."""

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
from errors import InputError, first_line, local_path, printable, require

# What Windows, macOS, Linux and network drives leave in folders; Thumbs.db and @eaDir hold small copies of the images.
LEFT_THERE = (
    "thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
)  # fmt: skip


class ImageFolderDataModule(InMemoryDataModule):
    """Images of any size in `root/train/CLASS/` and `root/test/CLASS/`, made 32×32 once and kept in memory.

    Classes are the folders of `root/train`, in alphabetical order, as in torchvision's ImageFolder. An image that is
    not square gives its middle. Images without class folders have no labels: in `root/test` they serve `predict` only,
    in `root/train` an encoder whose positives are views. The number of images in each class is printed when they are
    read.

    Args:
        root: folder with `train` and, for `test` and `predict`, `test`.
        val_size: training images held out for validation, counted before `classes` is applied; null: a tenth.
    """

    def __init__(self, root: str, val_size: int | None = None, batch_size: int = 256, **kwargs) -> None:
        self.root = local_path(root)
        found = class_folders(self.root / "train")
        names, places = tuple(found), found.values() or [self.root / "train"]
        wanted = "a folder with images of at least two classes in train/CLASS/, or without labels in train/ itself"
        require(len(names) != 1, "data.root", root, wanted)
        if val_size is None:
            val_size = max(1, sum(len(image_files(place)) for place in places) // 10)
        super().__init__(val_size=val_size, batch_size=batch_size, names=names, **kwargs)
        self.has_test = any(p.is_dir() and not hidden(p.name) for p in (self.root / "test").glob("*"))
        self.save_hyperparameters()

    def load(self, split: str) -> ImageSet:
        folder, left_out = self.root / split, Counter()
        found = class_folders(folder, left_out)
        if split == "train":
            self.train_place = str(folder)
        if not found:
            left_out.clear()
            files, labels = image_files(folder, left_out), None
        else:
            for name in found:
                known = f"one of the classes {', '.join(self.names[:20])}" if self.names else "none: train/ has none"
                require(name in self.names, f"{folder}: folder", name, known)
            here = [(label, found[name]) for label, name in enumerate(self.names) if name in found]
            files, labels = zip(*((path, label) for label, place in here for path in image_files(place, left_out)))
            labels = torch.tensor(labels)
            say_counts(labels, self.names, folder)
        say_left_out(left_out, folder)
        if split == "test" and not self.classes:
            self.test_files = list(map(printable, files))
        return ImageSet(read_images(files), labels)


def hidden(name: str) -> bool:
    """Whether a file browser does not show what a system or some program has left there."""
    return name.startswith(".") or name.lower() in LEFT_THERE


def kind_of(path: Path) -> str:
    """What a file that is not read is called in the line about them."""
    if hidden(path.name):
        return "hidden"
    if not os.path.exists(path):
        return "links that lead nowhere"
    return f"of kind {path.suffix.lower() or 'unknown'}"


def class_folders(folder: Path, left_out: Counter | None = None) -> dict[str, Path]:
    """The folders in `folder` by name, in alphabetical order. Raises InputError where it is none.

    `left_out` counts by kind what lies beside them.
    """
    try:
        places = sorted(folder.iterdir())
        for path in (p for p in places if not hidden(p.name)):
            require(path.exists(), f"{folder}: link", path.name, "a link to a folder or file that is there")
    except OSError as error:
        why = f"no such folder, or not readable ({error.strerror})"
        raise InputError(f"{folder}: {why}; it is to hold a folder of images for each class") from error
    found = [path for path in places if not hidden(path.name) and path.is_dir()]
    if left_out is not None:
        left_out.update(f"{kind_of(path)} beside the class folders" for path in places if path not in found)
    return {printable(path.name): path for path in found}


def image_files(folder: Path, left_out: Counter | None = None) -> list[Path]:
    """The images in `folder` and below, linked folders too, sorted by path.

    `left_out` counts by kind what is not read. Raises InputError where there is no image, or a folder is not readable.
    """
    left_out, files = Counter() if left_out is None else left_out, []
    seen = {str(place) for place in Path(os.path.realpath(folder)).parents}  # a link may lead back up

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if os.path.realpath(place) in seen:
            left_out["linked folders that are read elsewhere or lead back up"] += 1
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        left_out.update("hidden" for name in folders if hidden(name))
        folders[:] = sorted(name for name in folders if not hidden(name))
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in IMG_EXTENSIONS and os.path.isfile(path) and not hidden(path.name):
                files.append(path)
            else:
                left_out[kind_of(path)] += 1
    if not files:
        raise InputError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) in this folder")
    return sorted(files)


def say_left_out(left_out: Counter, where: Path) -> None:
    """Prints how many files and folders are not read, by kind, if there are any."""
    if left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        say(f"data: files in {where} that are left out: {kinds}")


def say_counts(labels: Tensor, names: tuple[str, ...], where: Path) -> None:
    """Prints how many images there are, how unequal the classes are, and which of them have none."""
    counts = labels.bincount(minlength=len(names)).tolist()
    few, many = (f"{counts[i]:,} {names[i]}" for i in (counts.index(min(counts)), counts.index(max(counts))))
    none = [name for name, count in zip(names, counts) if not count]
    missing = f"; none of {', '.join(none[:20])}{', …' * (len(none) > 20)}" if none else ""
    say(f"data: {len(labels):,} images of {len(names)} classes in {where}; fewest {few}, most {many}{missing}")


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

    Greys of 12 and 16 bits keep their upper eight; greys in floats are taken as 0 … 1. Raises ValueError for other
    numbers, and for a transparent colour of 16 bits, which Pillow does not find again.
    """
    image = ImageOps.exif_transpose(file)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int | tuple) and (image.mode[0] == "I" or np.max(transparent) > 255):
        raise ValueError("one transparent colour of 16 bits; convert it to an image with an alpha channel")
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(np.asarray(image), file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, file: Image.Image) -> np.ndarray:
    """Greys of more bits, as Pillow reads them from `file`, as uint8."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF: 258, the bits of a pixel, and 262, 0 where 0 is white
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        values = values.astype(np.int64) >> tags.get(258, (16,))[0] - 8
    elif file.mode == "F" and 0 <= values.min() and values.max() <= 1:
        values = (values.astype(np.float64) * 255).round()
    else:
        raise ValueError("grey values that are neither of 8, 12 or 16 bits nor floats from 0 to 1; convert it")
    return (255 - values if tags.get(262) == 0 else values).astype(np.uint8)
