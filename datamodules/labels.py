"""Which labels a command sees: those of some classes, fewer of them, coarser ones, or some that are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.arrays import ImageSet
from errors import InputError, require


@dataclass(frozen=True)
class Labelling:
    """What the options of InMemoryDataModule make of the labels in the data, whose classes are `names`."""

    names: Sequence[str]
    classes: list[int] | None = None
    coarse: dict[str, list[int]] | None = None
    labels_per_class: int | None = None
    label_noise: float = 0.0
    label_confusions: list[list[int]] | None = None
    label_seed: int = 0

    def __post_init__(self) -> None:
        require(self.classes is None or self.coarse is None, "data.coarse", self.coarse, "left out beside data.classes")
        if self.classes is not None:
            check_classes(self.classes, self.names)
        if self.coarse is not None:
            groups = sorted(i for group in self.coarse.values() for i in group)
            whole = len(self.coarse) >= 2 and groups == list(range(len(self.names)))
            named = all(isinstance(n, str) and n.strip() and group for n, group in self.coarse.items())
            each = f"two groups or more, named in quotes, that have each of the {len(self.names)} classes once"
            require(whole and named, "data.coarse", self.coarse, each)
        few, pairs, count = self.labels_per_class, self.label_confusions, len(self.class_names)
        require(few is None or few >= 1, "data.labels_per_class", few, "at least 1")
        require(0 <= self.label_noise < 1, "data.label_noise", self.label_noise, "a share, 0 or more and below 1")
        if pairs is not None:
            two = all(len(p) == 2 and p[0] != p[1] and all(0 <= i < count for i in p) for p in pairs)
            once = two and 0 < len(pairs) == len({p[0] for p in pairs})
            shown = f"pairs of the classes 0..{count - 1} that begin with different ones, such as [[3, 5]]"
            require(once, "data.label_confusions", pairs, shown)
        require(pairs is None or self.label_noise > 0, "data.label_confusions", pairs, "beside a data.label_noise")
        require(self.label_seed >= 0, "data.label_seed", self.label_seed, "0 or more")

    @property
    def class_names(self) -> list[str]:
        if self.coarse is not None:
            return list(self.coarse)
        return list(self.names) if self.classes is None else [self.names[i] for i in self.classes]

    @property
    def given(self) -> dict[str, object]:
        """The options that change a label, or leave an image out for its label."""
        options = {name: getattr(self, name) for name in ("classes", "coarse", "labels_per_class", "label_noise")}
        return {name: value for name, value in options.items() if value}

    def of(self, split: str, images: ImageSet) -> ImageSet:
        """The images that a command sees of the split `train`, `val` or `test`, under its labels, if there are any."""
        x, labels = images
        if labels is None:
            return images
        if self.classes is not None:
            x, labels = select_classes(images, self.classes)
            for label, count in zip(self.classes, labels.bincount(minlength=len(self.classes)).tolist()):
                there = count > 0 or split == "test" or len(images.labels) == 0
                require(there, "data.classes", self.classes, f"in every split; no image of class {label} is in {split}")
        if self.coarse is not None:
            table = torch.empty(len(self.names), dtype=torch.int64)
            for i, group in enumerate(self.coarse.values()):
                table[group] = i
            labels = table[labels]
        if split == "test":
            return ImageSet(x, labels)
        if self.labels_per_class is not None:
            index = self._few(split, labels)
            x, labels = x[index], labels[index]
        return ImageSet(x, self._noisy(split, labels) if self.label_noise else labels)

    def _few(self, split: str, labels: Tensor) -> Tensor:
        """Indices, sorted, of `labels_per_class` images of each class; in `val` fewer where there are not as many.

        With one seed, those of a smaller number are among those of a larger one.
        """
        order, kept, few = torch.from_numpy(self._draws(split, 0).permutation(len(labels))), [], self.labels_per_class
        for c, name in enumerate(self.class_names):
            own = order[labels[order] == c]
            if split == "train":
                require(len(own) >= few, "data.labels_per_class", few, f"at most the {len(own)} images of {name}")
            kept.append(own[:few])
        return torch.cat(kept).sort().values

    def _noisy(self, split: str, labels: Tensor) -> Tensor:
        """Labels (N,), the share `label_noise` of them wrong: another class at random, or the one confused with."""
        draws, count = self._draws(split, 1), len(self.class_names)
        wrong = torch.from_numpy(draws.random(len(labels)) < self.label_noise)
        other = (labels + torch.from_numpy(draws.integers(1, count, len(labels)))) % count
        if self.label_confusions is not None:
            other = labels.clone()
            for of, taken_for in self.label_confusions:
                other[labels == of] = taken_for
        return torch.where(wrong, other, labels)

    def _draws(self, split: str, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.label_seed, purpose, split == "val"))


def check_classes(classes: list[int], names: Sequence[str]) -> None:
    """Raises InputError unless `classes` are at least two different ones of those that `names` names."""
    different = len(set(classes)) == len(classes) >= 2
    require(different, "data.classes", classes, "at least two different classes, e.g. [0, 1]")
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    for i in classes:
        require(0 <= i < len(names), "data.classes", classes, f"of {known}; {i} is not in the data")


def select_classes(images: ImageSet, classes: list[int]) -> ImageSet:
    """Keeps the images of `classes` and relabels them 0, 1, … in the order given."""
    keep = torch.isin(images.labels, torch.tensor(classes))
    labels = torch.full((max(classes) + 1,), -1).index_put((torch.tensor(classes),), torch.arange(len(classes)))
    return ImageSet(images.images[keep], labels[images.labels[keep]])


def check_labels(labels: Tensor, held_out: Tensor, names: Sequence[str]) -> str:
    """What to report of the labels (N,) of all training images, of which `held_out` are for validation; '' if nothing.

    Raises InputError where there is one class alone.
    """
    there = labels.unique()
    if len(there) < 2:
        raise InputError("the training labels name only one class; at least two are needed")
    missing = sorted({*there.tolist()} - {*labels[held_out].unique().tolist()}) if len(held_out) else []
    shown = ", ".join(names[i] for i in missing[:10]) + (", …" if len(missing) > 10 else "")
    return f"{len(missing)} of the classes have no validation image: {shown}; raise data.val_size" if missing else ""
