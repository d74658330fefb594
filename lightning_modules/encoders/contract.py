"""Networks that map images to features, under one contract, `Encoder`."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError, first_line

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Encoder(nn.Module):
    """Maps images (B, 3, 32, 32) float in [0, 1] to features (B, `feature_dim`).

    A subclass sets `feature_dim` and implements `features(normalised_images)`. Its arguments, plain types, are recorded
    as `init_args`: a checkpoint's reader builds it from them again. The channel statistics are buffers, so they travel
    with the weights; `initialize` fills them before training. So do `mirror` and `shift`, which say over which views of
    an image `embed` averages: for evaluation, since each costs a pass (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a
    Single GPU", 2024, section 3.5, averages predictions so).
    """

    feature_dim: int
    init_args: dict

    @property
    def contrast_dim(self) -> int:
        """How many of the features, the first ones, contrastive training compares: the projection head, the kNN
        metrics and t-SNE read these. Probes and exported files have all."""
        return self.feature_dim

    def __new__(cls, *args, **kwargs) -> "Encoder":
        encoder = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        bound = signature.bind_partial(encoder, *args, **kwargs)  # partial: a copy is made without arguments
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name)
        encoder.__dict__["init_args"] = given
        return encoder

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.register_buffer("mirror", torch.tensor(False))
        self.register_buffer("shift", torch.tensor(0))
        self._compiled: Callable[[Encoder, Tensor], Tensor] | None = None
        self._memory_format = torch.channels_last

    def run_as(self, channels_last: bool = True, compile_mode: CompileMode | None = None) -> "Encoder":
        """Chooses the memory format and compiler of the same computation, and returns the encoder itself.

        `channels_last`: weights and activations lie pixel by pixel in memory, as the images do. `compile_mode`:
        torch.compile's, for what runs while training; evaluation does not, so features keep their bits. A checkpoint
        holds neither.
        """
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Not of the bound method, which a deep copy of this encoder would share.
        self._compiled = torch.compile(Encoder._normalised_features, mode=compile_mode) if compile_mode else None
        return self.to(memory_format=self._memory_format)

    @property
    def spec(self) -> dict:
        """What `build_encoder` needs, in plain types."""
        return {"class_path": class_path(type(self)), "init_args": self.init_args}

    @property
    def views(self) -> list[tuple[bool, int]]:
        """The views of an image that `embed` averages, see `view_list`."""
        return view_list(bool(self.mirror), int(self.shift))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fills what is computed from the training split's images (N, 32, 32, 3) uint8, not learned."""
        mean, std = channel_statistics(images)
        self.mean.copy_(mean.view(3, 1, 1))
        self.std.copy_(std.view(3, 1, 1))

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _normalised_features(self, images: Tensor) -> Tensor:
        return self.features((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        # The weights are of another type where a whole module is, such as by --trainer.precision bf16-true.
        images = images.to(self.mean.dtype, memory_format=self._memory_format)
        if not (self.training and self._compiled):
            return self._normalised_features(images)
        try:
            # Copied, since a CUDA graph writes the next step's features where these are, and callbacks keep them.
            return self._compiled(self, images).clone()
        except torch._dynamo.exc.TorchDynamoException as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(
                f"model.compile_mode: this encoder cannot be compiled here ({why}); leave the option out"
            ) from error

    def embed(self, images: Tensor, shifted: bool = True) -> Tensor:
        """What is read in evaluation: (B, `feature_dim`) float32, the mean over the image's views
        (without the shifted ones if `shifted` is False)."""
        views = self.views if shifted else view_list(bool(self.mirror), 0)
        return torch.stack([self(view(images, *which)).float() for which in views]).mean(0)

    @torch.no_grad()
    def embed_all(self, loader, single_view: bool = False, shifted: bool = True) -> Tensor:
        """`embed` over a whole loader, or the features of the images alone: (N, `feature_dim`) float32.

        Every block has the loader's `batch_size` images, the last one filled up, since the rounding of the CPU's
        kernels may depend on the batch size."""
        found, done = None, 0
        for images, *_ in loader:
            images = images.to(self.mean.device)  # from where they lie, if that is not beside the network
            missing = loader.batch_size - len(images)
            filled = torch.cat([images, images[:1].expand(missing, -1, -1, -1)]) if missing else images
            features = self(filled).float() if single_view else self.embed(filled, shifted)
            if found is None:  # not a list to be joined, which would take twice the memory
                found = features.new_empty(loader.num_samples, features.shape[1])
            found[done : done + len(images)] = features[: len(images)]
            done += len(images)
        return found


def view_list(mirror: bool, shift: int) -> list[tuple[bool, int]]:
    """The views of an image that `Encoder.embed` averages: mirrored or not, moved by so many pixels in x and y."""
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


class Predictor(nn.Module):
    """images (B, 3, 32, 32) in [0, 1] → `head` of the encoder's features, the mean over its views. For export."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        # The views are taken from the buffers now: a traced graph cannot ask them, as `Encoder.embed` does.
        self.encoder, self.head, self.views = encoder, head, encoder.views

    def forward(self, images: Tensor) -> Tensor:
        return self.head(sum(self.encoder(view(images, *which)) for which in self.views) / len(self.views))


def class_path(encoder: type[Encoder]) -> str:
    return f"{encoder.__module__}.{encoder.__qualname__}"


def known_encoders(base: type[Encoder] = Encoder) -> dict[str, type[Encoder]]:
    """All subclasses of Encoder, and theirs, that this process has imported, by their full path."""
    found = {class_path(encoder): encoder for encoder in base.__subclasses__()}
    for encoder in base.__subclasses__():
        found |= known_encoders(encoder)
    return found


def build_encoder(spec: dict) -> Encoder:
    """The encoder that a checkpoint's `spec` describes, untrained. Raises InputError for an unknown one.

    Only classes that this process has imported already can be named, those of `lightning_modules` and of the run's own
    config: a checkpoint imports nothing.
    """
    known, name = known_encoders(), spec.get("class_path") if isinstance(spec, dict) else None
    if not isinstance(name, str) or name not in known:
        raise InputError(f"encoder {name!r} named by the checkpoint is not one of {', '.join(known)}")
    try:
        return known[name](**spec.get("init_args", {})).run_as()
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"the checkpoint's arguments do not fit {name}: {first_line(error)}") from error


def encoder_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors in a stage's `state_dict`, by the names that the encoder gives them."""
    return {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """Digest of all tensors, buffers too, with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()
