"""What every data set here shares: splits held in memory as uint8, and the loaders that cut batches from them."""

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from datamodules.arrays import ImageSet, images_sha256, select_classes, stratified_split
from datamodules.loader import BatchLoader
from errors import InputError


class InMemoryDataModule(LightningDataModule):
    """Holds the splits `train`, `val` and `test` as (N, 32, 32, 3) uint8 tensors and serves them in whole batches.

    A subclass names its classes in `CLASSES` and reads its two files in `load`. The validation split is cut from the
    training images, stratified by class and fixed by `split_seed`; `classes` then keeps the images of those classes
    in every split. The test images are not read before `test` or `predict`.
    """

    CLASSES: tuple[str, ...]
    test_files: list[str] | None = None  # the test images' own files, where they come from a folder

    def __init__(
        self,
        classes: list[int] | None,
        val_size: int,
        split_seed: int,
        batch_size: int,
        flip: bool,
        translate: int,
        cutout: int = 0,
    ) -> None:
        super().__init__()
        if classes is not None and (len(set(classes)) != len(classes) or len(classes) < 2):
            raise InputError(f"data.classes {classes}: give at least two different classes, e.g. [0, 1]")
        for label in classes or []:
            if not 0 <= label < len(self.CLASSES):
                names = ", ".join(f"{i} {name}" for i, name in enumerate(self.CLASSES))
                raise InputError(f"data.classes {classes}: {label} is not in the data (classes: {names})")
        if batch_size < 1:
            raise InputError(f"data.batch_size {batch_size}: must be at least 1")
        if not 0 <= translate < 32:
            raise InputError(f"data.translate {translate}: must be 0..31 pixels")
        if not 0 <= cutout <= 32:
            raise InputError(f"data.cutout {cutout}: must be 0..32 pixels")
        self.classes, self.val_size, self.split_seed = classes, val_size, split_seed
        self.batch_size, self.flip, self.translate, self.cutout = batch_size, flip, translate, cutout
        self._sets: dict[str, ImageSet] = {}
        self._left: set[str] = set()  # splits that do not lie on the training device
        self._sha256: str | None = None

    def load(self, split: str) -> ImageSet:
        """Reads all `train` or all `test` images; only test images may come without labels."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        return [self.CLASSES[i] for i in (self.classes or range(len(self.CLASSES)))]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def augments(self) -> bool:
        return self.flip or self.translate > 0 or self.cutout > 0

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        if stage in ("fit", "validate"):
            train = self.split("train")
            if stage == "fit" and self.batch_size > len(train.labels):
                raise InputError(
                    f"data.batch_size {self.batch_size} is larger than the {len(train.labels)} training images"
                )
            if self.batch_size % self.trainer.world_size:
                raise InputError(
                    f"data.batch_size {self.batch_size} is the global batch and must divide by the"
                    f" {self.trainer.world_size} processes"
                )
        elif self.split("test").labels is None and stage == "test":
            raise InputError("the test file has no labels: it serves predict only; give data.test_npz one with labels")

    def split(self, name: str) -> ImageSet:
        """The images and labels of `train`, `val` or `test`, read when first asked for."""
        if name not in self._sets and name == "test":
            images = self.load("test")
            if self.classes is not None and images.labels is not None:
                images = select_classes(images, self.classes)
            self._sets["test"] = images
        elif name not in self._sets:
            images = self.load("train")
            if len(images.labels.unique()) < 2:
                raise InputError("the training labels name only one class; at least two are needed")
            self._all_labels, self._sha256 = images.labels, images_sha256(images)
            parts = (
                ImageSet(*(x[i] for x in images))
                for i in stratified_split(images.labels, self.val_size, self.split_seed)
            )
            for part, chosen in zip(("train", "val"), parts):
                if self.classes is not None:
                    chosen = select_classes(chosen, self.classes)
                    for label, count in zip(self.classes, chosen.labels.bincount(minlength=self.num_classes).tolist()):
                        if not count:
                            raise InputError(
                                f"data.classes {self.classes}: no image of class {label} in the {part} split"
                            )
                self._sets[part] = chosen
        return self._sets[name]

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Which images are trained on: what a checkpoint carries and must agree on. Has the digest of the training file
        only where that has been read, which `test` and `predict` do not."""
        split = {"val_size": self.val_size, "split_seed": self.split_seed}
        return split if self._sha256 is None else {**split, "train_sha256": self._sha256}

    def seen_in_validation(self, val_size: int, split_seed: int) -> int:
        """How many of this module's validation images a fit with that other split of the same file has trained on."""
        trained_on, _ = stratified_split(self._all_labels, val_size, split_seed)
        _, held_out = stratified_split(self._all_labels, self.val_size, self.split_seed)
        if self.classes is not None:
            held_out = held_out[torch.isin(self._all_labels[held_out], torch.tensor(self.classes))]
        return int(torch.isin(held_out, trained_on).sum())

    def replace_images(self, features: dict[str, Tensor]) -> None:
        """Puts features (N, D) in place of the images of the splits named."""
        for name, x in features.items():
            self._sets[name] = ImageSet(x, self.split(name).labels)

    def evaluation_loader(self, name: str, index: Tensor | None = None) -> BatchLoader:
        """The whole split `name`, or its images `index` (M,), in order, not augmented, on every process."""
        inputs, labels = self._placed(name, *(x if index is None else x[index] for x in self.split(name)))
        return BatchLoader(inputs, labels, self.batch_size)

    def train_dataloader(self) -> BatchLoader:
        drawn = {"flip": self.flip, "translate": self.translate, "cutout": self.cutout} if self.augments else {}
        return self._loader("train", seed=self._seed, **drawn)

    def val_dataloader(self) -> BatchLoader:
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    def predict_dataloader(self) -> BatchLoader:
        (inputs,) = self._placed("test", self.split("test").images)
        return BatchLoader(inputs, None, self.batch_size, **self._share)

    def _placed(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """The split's tensors on the training device, or where they are, said once, if it cannot hold them three times over."""
        device = self.trainer.strategy.root_device
        wanted, free = 3 * sum(x.nbytes for x in tensors), free_memory(device)
        if wanted > free and name not in self._left:
            self._left.add(name)
            why = (
                f"with their augmentation {wanted / 2**20:,.0f} MiB, of which {device} has {free / 2**20:,.0f} MiB free"
            )
            print(f"data: the {name} images stay in main memory, and each batch travels ({why})")
        return list(tensors) if name in self._left else [x.to(device) for x in tensors]

    @property
    def _share(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, name: str, **training) -> BatchLoader:
        inputs, labels = self._placed(name, *self.split(name))
        return BatchLoader(inputs, labels, self.batch_size, **self._share, **training)


def free_memory(device: torch.device) -> float:
    """Bytes free on a GPU; elsewhere the images lie in main memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
