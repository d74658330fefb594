"""What all data sets here share: splits held in memory as uint8, and the loaders that cut batches from them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from datamodules.arrays import ImageSet, image_digests, random_split, sha256
from datamodules.labels import Labelling, check_labels
from datamodules.loader import BatchLoader, bytes_needed, free_memory
from datamodules.views import Views, views_of
from errors import InputError, printable, require

NO_CLASS = -1  # the label of an image that has none


@rank_zero_only
def say(text: str) -> None:
    """Prints what a data set has to report, once for all processes."""
    print(printable(text))


class InMemoryDataModule(LightningDataModule):
    """Holds the splits `train`, `val` and `test` as (N, 32, 32, 3) uint8 tensors and serves them in whole batches.

    A subclass names its classes in `CLASSES` (or as `names`, where they depend on its options), reads its two files in
    `load`, and passes on the options below. The validation split is cut from the training images at random, fixed by
    `split_seed`; it does not look at labels. `classes` then keeps the images of those classes in every split. The test
    images are not read before `test` or `predict`, and their labels are never noisy. Training images without labels
    have NO_CLASS for a label each, and the module no `class_names`.

    Args:
        classes: keep these classes only, relabelled 0, 1, … in this order; [0, 1] leaves the first two.
        val_size: training images held out for validation, counted before `classes` is applied. 0: none, for the last
            fit of a recipe that was chosen by validation; such a fit does not validate.
        split_seed: fixes which images those are, apart from `seed_everything`.
        batch_size: global batch size, over all processes.
        flip: mirror images while fitting.
        translate: shift images by up to this many pixels while fitting.
        cutout: hide a square of this side, somewhere in each image, while fitting.
        views: views of each image in a batch while fitting, `batch_size` images having views · `batch_size` of them.
            From two on each is mirrored by chance.
        crop_scale: the least and the largest share of an image that a view shows, enlarged to the whole; null: all.
        color_jitter: by how much brightness, contrast, saturation (around 1) and hue (in turns) vary, in four of five
            views; a single number s stands for [0.8 s, 0.8 s, 0.8 s, 0.2 s] (SimCLR, appendix A).
        greyscale: share of the views without colour.
        small_views: further views of each image, of `small_size` pixels.
        small_size: their side.
        small_scale: as `crop_scale`, for them.
        coarse: new classes, each with those of the data that it stands for: {vehicle: [0, 1, 8, 9], …}.
        labels_per_class: keep so many training images of each class, and at most as many validation images.
        label_noise: share of the training and validation labels that are wrong: another class at random.
        label_confusions: pairs [a, b]; the wrong labels are then b where a is right, and no others.
        label_seed: fixes which images these options choose.
        names: of all classes in the data; null: `CLASSES`.
    """

    CLASSES: Sequence[str] = ()
    has_test = True  # whether there are test images with labels
    test_files: list[str] | None = None  # the test images' own files, where they come from a folder
    train_features: Tensor | None = None  # those of the training images, once they are cached
    train_place = "the training images"  # where they lie, for messages
    source = "your own files"  # what the training images are

    def __init__(
        self,
        classes: list[int] | None = None,
        val_size: int = 5000,
        split_seed: int = 0,
        batch_size: int = 512,
        flip: bool = True,
        translate: int = 2,
        cutout: int = 0,
        views: int = 1,
        crop_scale: list[float] | None = None,
        color_jitter: float | list[float] = 0.0,
        greyscale: float = 0.0,
        small_views: int = 0,
        small_size: int = 16,
        small_scale: list[float] = [0.08, 0.4],
        coarse: dict[str, list[int]] | None = None,
        labels_per_class: int | None = None,
        label_noise: float = 0.0,
        label_confusions: list[list[int]] | None = None,
        label_seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "names", "__class__")}
        super().__init__()
        names = tuple(names or self.CLASSES)
        self.labelling = Labelling(names, classes, coarse, labels_per_class, label_noise, label_confusions, label_seed)
        require(batch_size >= 1, "data.batch_size", batch_size, "at least 1")
        require(0 <= translate < 32, "data.translate", translate, "0..31 pixels")
        require(0 <= cutout <= 32, "data.cutout", cutout, "0..32 pixels")
        self.classes, self.val_size, self.split_seed = classes, val_size, split_seed
        self.batch_size, self.flip, self.translate, self.cutout = batch_size, flip, translate, cutout
        self.views = views_of(views, crop_scale, color_jitter, greyscale, small_views, small_size, small_scale, flip)
        self.save_hyperparameters(options)  # the defaults behind **kwargs too
        self.names, self.class_names = names, self.labelling.class_names
        self.num_classes = len(self.class_names)
        self.augments = flip or translate > 0 or cutout > 0 or bool(self.views)
        # What a checkpoint carries and must agree on. `_cut` adds the digests and the `source` of the training images;
        # `test` and `predict`, which need not read these, add the `source` of test images that nobody has named.
        self.fingerprint: dict[str, str | int | None] = {"val_size": val_size, "split_seed": split_seed}
        self.labelled = True  # until training images without labels are read
        self._digests: Tensor | None = None
        self._sets: dict[str, ImageSet] = {}
        self._cached: dict[str, ImageSet] = {}  # features in place of images
        self._left: set[str] = set()  # splits that do not lie on the training device

    def load(self, split: str) -> ImageSet:
        """Reads all `train` or all `test` images; `labels` is None where they have none."""
        raise NotImplementedError

    @property
    def batches_per_epoch(self) -> int:
        """How many whole global batches the training images make."""
        return len(self.split("train").labels) // self.batch_size

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        if stage in ("fit", "validate"):
            self.split("train")
            if stage == "fit":
                self._check_batch_size()
            if not self.val_size:
                self._do_without_validation(stage)
            shared = f"a multiple of the {self.trainer.world_size} processes, which share each batch"
            require(self.batch_size % self.trainer.world_size == 0, "data.batch_size", self.batch_size, shared)
        elif self.split("test").labels is None and stage == "test":
            raise InputError("the test file has no labels: it serves predict only; give data.test_npz one with labels")

    def _do_without_validation(self, stage: str) -> None:
        """Raises InputError where something in this command needs validations, of which there are none."""
        needs = [type(c).__name__ for c in self.trainer.early_stopping_callbacks]
        if stage == "validate":
            needs = ["this command"]
        elif self.trainer.lightning_module.hparams.get("schedule") == "plateau":
            needs.append("model.schedule plateau")
        if needs:
            raise InputError(f"data.val_size 0: there are no validations, which {needs[0]} needs; hold some images out")

    def _check_batch_size(self) -> None:
        count = len(self.split("train").labels)
        require(self.batch_size <= count, "data.batch_size", self.batch_size, f"at most the {count} training images")

    def split(self, name: str) -> ImageSet:
        """The images and labels of `train`, `val` or `test`, read when first asked for."""
        if name not in self._sets:
            self._sets |= self._cut() if name != "test" else {"test": self.labelling.of("test", self.load("test"))}
        return self._sets[name]

    def _cut(self) -> dict[str, ImageSet]:
        """Reads the training images and holds `val` out."""
        images, labelling = self.load("train"), self.labelling
        self.fingerprint["images"] = self.source
        self.fingerprint["pixels_sha256"] = sha256(images.images)
        rest, held_out = random_split(len(images.images), self.val_size, self.split_seed)
        if images.labels is None:
            for name, value in labelling.given.items():
                raise InputError(f"data.{name} {value}: must be left out: the training images have no labels")
            self.labelled, self.class_names, self.fingerprint["labels_sha256"] = False, [], None
            images = ImageSet(images.images, torch.full((len(images.images),), NO_CLASS))
        elif report := check_labels(images.labels, held_out, self.names):
            say(f"data: {report}")
        parts = {name: ImageSet(*(x[i] for x in images)) for name, i in (("train", rest), ("val", held_out))}
        if self.labelled:
            parts = {name: labelling.of(name, part) for name, part in parts.items()}
            altered = labelling.given.keys() - {"classes"}
            labels = torch.cat([part.labels for part in parts.values()]) if altered else images.labels
            self.fingerprint["labels_sha256"] = sha256(labels)
        return parts

    @property
    def training_digests(self) -> Tensor:
        """The `image_digests` (N,) of the training images: what an encoder that is trained on them has seen."""
        if self._digests is None:
            self._digests = image_digests(self.split("train").images)
        return self._digests

    def seen_in(self, name: str, seen: Tensor) -> int:
        """How many images of the split `name` are among those of the digests `seen`."""
        return int(torch.isin(image_digests(self.split(name).images), seen).sum())

    def seen_in_validation(self, seen: Tensor) -> int:
        """The same of `val`, without images that lie among this module's own training images too."""
        own = self.training_digests
        return self.seen_in("val", seen) - self.seen_in("val", own[torch.isin(own, seen)])

    def cache_features(self, features: dict[str, Tensor]) -> None:
        """Puts features (N, D) float32 of the splits named aside: fit and validation get them instead of images."""
        self.train_features = features.get("train")
        self._cached = {name: ImageSet(x, self.split(name).labels) for name, x in features.items()}

    def evaluation_loader(self, name: str, index: Tensor | None = None) -> BatchLoader:
        """The images of the whole split `name`, or those at `index` (M,), in order, not augmented, on every process."""
        chosen = (x if index is None else x[index] for x in self.split(name))
        return self._loader(name, *chosen, rank=0, world_size=1)

    def train_dataloader(self) -> BatchLoader:
        self._check_batch_size()  # a callback such as BatchSizeFinder may have set it
        # Views of an image are each mirrored by chance: alternating, they would be alike.
        one = not self.views or self.views[0].count == 1
        drawn = {"flip": self.flip and one, "translate": self.translate, "cutout": self.cutout, "views": self.views}
        drawn["reshuffle"] = self.trainer.overfit_batches == 0
        return self._loader("train", *self._cached.get("train", self.split("train")), seed=self._seed, **drawn)

    def val_dataloader(self) -> BatchLoader | list:
        if not self.val_size:
            return []
        return self._loader("val", *self._cached.get("val", self.split("val")), views=self._fixed_views)

    def test_dataloader(self) -> BatchLoader:
        return self._loader("test", *self.split("test"), views=self._fixed_views)

    @property
    def _fixed_views(self) -> list[Views]:
        """Two views of each image, beside it in an evaluation, for a stage that compares views."""
        compared = getattr(getattr(self.trainer, "lightning_module", None), "positives", None) == "view"
        return [replace(self.views[0], count=2)] if compared and self.number_of_views > 1 else []

    @property
    def number_of_views(self) -> int:
        """How many views of each image a training batch has, of all sizes together."""
        return sum(view.count for view in self.views) or 1

    def predict_dataloader(self) -> BatchLoader:
        return self._loader("test", self.split("test").images, None)

    def _loader(self, name: str, inputs: Tensor, labels: Tensor | None, **options) -> BatchLoader:
        """Batches of tensors on the training device, or where the inputs are if they would fill half of what it has
        free."""
        device = self.trainer.strategy.root_device
        made = options.get("translate", 0), options.get("views", ())
        wanted, free = bytes_needed(inputs, labels, self.batch_size, *made), free_memory(device)
        there = inputs.ndim == 2 and inputs.device == device  # features, computed on it
        if wanted > free / 2 and name not in self._left and not there:
            self._left.add(name)
            sizes = f"with their augmentation {wanted / 2**20:,.0f} MiB, of which {device} has {free / 2**20:,.0f} free"
            say(f"data: the {name} images stay in main memory, and each batch travels ({sizes})")
        place = inputs.device if name in self._left else device
        inputs, labels = (None if x is None else x.to(place) for x in (inputs, labels))
        share = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return BatchLoader(inputs, labels, self.batch_size, **share | options)
