"""Networks that map images to features, under one contract, `Encoder`."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, first_line

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Encoder(nn.Module):
    """Maps images (B, 3, 32, 32) float in [0, 1] to features (B, `feature_dim`).

    A subclass sets `feature_dim`, implements `features(normalised_images)`, and passes its own arguments on as
    `init_args`, from which a checkpoint's reader builds it again. The channel statistics are buffers, so they travel
    with the weights; `initialize` fills them before training. So do `mirror` and `shift`, which say over which views of an
    image `embed` averages: for evaluation, since each costs a pass (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single
    GPU", 2024, section 3.5, averages predictions so).
    """

    feature_dim: int

    def __init__(self, **init_args) -> None:
        super().__init__()
        self.init_args = init_args
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.register_buffer("mirror", torch.tensor(False))
        self.register_buffer("shift", torch.tensor(0))
        self._compiled: Callable[[Encoder, Tensor], Tensor] | None = None
        self._memory_format = torch.channels_last

    def run_as(self, channels_last: bool = True, compile_mode: CompileMode | None = None) -> "Encoder":
        """How the same computation is carried out; a checkpoint neither holds nor checks it. Returns the encoder itself.

        `channels_last`: weights and activations lie pixel by pixel in memory, as the images do. `compile_mode`:
        torch.compile's, for what runs while training; evaluation does not, so that features keep their bits.
        """
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Not of the bound method, which a deep copy of this encoder would share.
        self._compiled = torch.compile(Encoder._normalised_features, mode=compile_mode) if compile_mode else None
        return self.to(memory_format=self._memory_format)

    @property
    def spec(self) -> dict:
        """What `build_encoder` needs, in plain types."""
        return {"class_path": type(self).__name__, "init_args": self.init_args}

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fills what is computed from the training split's images (N, 32, 32, 3) uint8, not learned."""
        mean, std = channel_statistics(images)
        self.mean.copy_(mean.view(3, 1, 1))
        self.std.copy_(std.view(3, 1, 1))

    def set_views(self, datamodule, mirror: bool | None, shift: int | None) -> None:
        """What `embed` averages over; None: what the data is augmented by."""
        if not 0 <= (shift or 0) < 32:
            raise InputError(f"model.shift {shift}: must be 0..31 pixels")
        self.mirror.fill_(datamodule.flip if mirror is None else mirror)
        self.shift.fill_(min(1, datamodule.translate) if shift is None else shift)

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _normalised_features(self, images: Tensor) -> Tensor:
        return self.features((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._memory_format)
        if not (self.training and self._compiled):
            return self._normalised_features(images)
        try:
            return self._compiled(self, images)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(
                f"model.compile_mode: this encoder cannot be compiled here ({why}); leave the option out"
            ) from error

    def embed(self, images: Tensor, shifted: bool = True) -> Tensor:
        """What kNN, pictures and a probe's evaluation read: (B, `feature_dim`) float32, the mean over the image's views
        (without the shifted ones if `shifted` is False)."""
        views = view_list(bool(self.mirror), int(self.shift) if shifted else 0)
        return torch.stack([self(view(images, *which)).float() for which in views]).mean(0)

    @torch.no_grad()
    def embed_all(self, loader, single_view: bool = False, shifted: bool = True) -> Tensor:
        """`embed` over a whole loader, or the features of the images alone: (N, `feature_dim`) float32.

        Every block has the loader's `batch_size` images, the last one filled up, since the rounding of the CPU's
        kernels may depend on the batch size."""
        blocks = []
        for images, *_ in loader:
            images = images.to(self.mean.device)  # from where they lie, if that is not beside the network
            missing = loader.batch_size - len(images)
            filled = torch.cat([images, images[:1].expand(missing, -1, -1, -1)]) if missing else images
            features = self(filled).float() if single_view else self.embed(filled, shifted)
            blocks.append(features[: len(images)])
        return torch.cat(blocks)


def view_list(mirror: bool, shift: int) -> list[tuple[bool, int]]:
    """The views of an image that `Encoder.embed` averages: mirrored or not, moved by so many pixels in x and y alike."""
    return [
        (mirrored, moved)
        for moved in ((0, shift, -shift) if shift else (0,))
        for mirrored in ((False, True) if mirror else (False,))
    ]


def view(images: Tensor, mirrored: bool, moved: int) -> Tensor:
    """Images (B, 3, 32, 32) mirrored, and moved along the diagonal with reflected edges as in training."""
    if mirrored:
        images = images.flip(-1)
    if moved:
        size, width = images.shape[-1], abs(moved)
        images = F.pad(images, (width,) * 4, mode="reflect")[..., width - moved :, width - moved :][..., :size, :size]
    return images


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) each, in [0, 1], of images (N, 32, 32, 3) uint8. A flat channel gets std 1."""
    # From a histogram of the 256 levels: exact, and no float copy of the images.
    levels = torch.arange(256, dtype=torch.float64) / 255
    # Block by block: bincount makes eight bytes of each.
    blocks = (
        torch.stack([block[..., c].flatten().bincount(minlength=256) for c in range(3)])
        for block in images.split(10_000)
    )
    counts = sum(blocks).cpu().double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = ((share @ levels.square()) - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def build_encoder(spec: dict) -> Encoder:
    """The encoder that a checkpoint's `spec` describes, untrained. Raises InputError for an unknown one.

    Only subclasses of Encoder that this process has imported already can be named, those of `lightning_modules` and of
    the run's own config: a checkpoint imports nothing.
    """
    known = {encoder.__name__: encoder for encoder in Encoder.__subclasses__()}
    name = spec.get("class_path") if isinstance(spec, dict) else None
    if not isinstance(name, str) or name not in known:
        raise InputError(f"encoder {name!r} named by the checkpoint is not one of {', '.join(known)}")
    try:
        return known[name](**spec.get("init_args", {})).run_as()
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"the checkpoint's arguments do not fit {name}: {first_line(error)}") from error


def positive(name: str, value: int) -> int:
    """The value. Raises InputError below 1."""
    if value < 1:
        raise InputError(f"encoder {name} {value}: must be at least 1")
    return value
