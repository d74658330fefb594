"""Images and labels as arrays: reading them from .npz, checking them, splitting them."""

import hashlib
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import InputError, first_line, require


class ImageSet(NamedTuple):
    """`images` (N, 32, 32, 3) uint8, or features (N, D) float32 of them; `labels` (N,) int64 or None."""

    images: Tensor
    labels: Tensor | None


def read_npz(path: Path, num_classes: int) -> ImageSet:
    """Reads `images` (N, 32, 32, 3) uint8 and, if there are any, `labels` (N,) integers in [0, num_classes) of an .npz
    file.

    Raises InputError where the file is missing, damaged, pickled, claims more than it can hold, or holds anything else.
    """
    if not os.path.isfile(path):
        expected = "an .npz with images (N, 32, 32, 3) uint8 and labels (N,)"
        raise InputError(f"{path}: no such file, or not readable; give {expected}")
    try:
        arrays = _arrays(path)
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen kinds, down to struct.error and SyntaxError
        why = f"damaged or not a readable .npz file ({first_line(error)}); copy it again"
        if "allow_pickle" in str(error):
            why = "holds pickled Python objects, which are never loaded; save plain arrays"
        raise InputError(f"{path}: {why}") from error
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images are {images.dtype}; expected uint8 in 0..255 (not scaled, not normalised)")
    if images.ndim == 4 and images.shape[1:] == (3, 32, 32):
        raise InputError(f"{path}: images are channel-first {images.shape}; transpose them to (N, 32, 32, 3)")
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or not len(images):
        raise InputError(f"{path}: images have shape {images.shape}; expected (N, 32, 32, 3) with N > 0")
    labels = arrays.get("labels")
    if labels is None:
        return ImageSet(torch.from_numpy(images), None)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: labels are {labels.dtype}; expected integers")
    if labels.shape != (len(images),):
        raise InputError(f"{path}: labels have shape {labels.shape}; expected ({len(images)},), one for each image")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        i = int(outside.argmax())
        raise InputError(f"{path}: label {labels[i]} of image {i} is outside 0..{num_classes - 1}")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def sha256(array: Tensor) -> str:
    """Digest of all numbers, in order."""
    return hashlib.sha256(np.ascontiguousarray(array.numpy())).hexdigest()


def image_digests(images: Tensor) -> Tensor:
    """(N, 32, 32, 3) uint8 → (N,) int64, by which an image is known again in any file: eight bytes of its BLAKE2."""
    digests = b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in np.ascontiguousarray(images.numpy()))
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())


def random_split(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits `count` indices into (rest, held_out) with `size` held out, at random; both sorted.

    Raises InputError unless 0 ≤ size < count.
    """
    require(0 <= size < count, "data.val_size", size, f"0..{count - 1}: there are {count} training images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[size:].sort().values, order[:size].sort().values


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays `images` and `labels` of an archive, as far as it has them."""
    # Opened here, since np.load leaves a file that it cannot read open.
    with path.open("rb") as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers of old and odd forms
        archive = np.load(raw, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: a single array; expected an .npz archive with images and labels")
        _check_size(path, archive.zip)
        members = archive.zip.namelist()  # others than these two may be of any kind, one called `images` too
        if "images.npy" not in members:
            raise InputError(f"{path}: no array named 'images' (found: {', '.join(members) or 'nothing'})")
        return {name: archive[f"{name}.npy"] for name in ("images", "labels") if f"{name}.npy" in members}


def _check_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises InputError before any memory is taken where an array is not as large as its header says, or a zip bomb."""
    for member in (m for m in archive.infolist() if m.filename in ("images.npy", "labels.npy")):
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            claimed, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if claimed != held and not dtype.hasobject:
            raise InputError(f"{path}: {member.filename} claims {claimed} bytes and holds {held}; write it again")
        if held > 2**30 and held > 100 * member.compress_size:
            sizes = f"from {member.compress_size} to {held} bytes"
            raise InputError(f"{path}: {member.filename} unpacks {sizes}; it is not read")
