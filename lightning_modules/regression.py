"""Logistic and softmax regression on pixels: what there is without an encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.encoders.contract import channel_statistics
from lightning_modules.stage import Stage


class PixelLinear(nn.Linear):
    """Images (B, 3, 32, 32) in [0, 1] → (B, `out_features`): a linear layer, started at zero, on normalised pixels.

    The training split's channel means μ and deviations σ are buffers, and the layer reads (x − μ)/σ. It does so
    through its weights, as (W/σ)x + b − (W/σ)μ, which leaves the batch of images as it lies in memory.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__(3 * 32 * 32, out_features)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def initialize(self, images: Tensor) -> None:
        mean, std = channel_statistics(images)
        self.mean.copy_(mean.view(3, 1, 1))
        self.std.copy_(std.view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight.view(-1, 3, 32, 32) / self.std
        bias = self.bias - (weight * self.mean).sum((1, 2, 3))
        # Channels last on both sides: flattening the images, which come that way, copies nothing.
        images, weight = (x.permute(0, 2, 3, 1).flatten(1) for x in (images, weight))
        return F.linear(images, weight, bias)


class SigmoidPair(nn.Module):
    """Logits (B, 1) or (B,) of class 1 → probabilities (B, 2) of both classes."""

    def forward(self, logits: Tensor) -> Tensor:
        probability = logits.float().sigmoid().flatten()
        return torch.stack([1 - probability, probability], dim=1)


class SoftmaxRegression(Stage):
    """Multinomial logistic regression: softmax(Wx + b) on normalised pixels x, cross-entropy loss."""

    def __init__(self, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        self.linear = PixelLinear(num_classes)

    def initialize(self, images: Tensor) -> None:
        self.linear.initialize(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        with self.in_float32():
            return self.linear(images)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    def predictor(self, features: bool = False) -> nn.Module:
        if features:
            raise InputError(f"{type(self).__name__} has no encoder whose features could be given")
        return nn.Sequential(self.linear, nn.Softmax(1))


class LogisticRegression(Stage):
    """Binary logistic regression: σ(wᵀx + b) is the probability of class 1, one logit, binary cross-entropy loss."""

    def __init__(self, num_classes: int = 2, **kwargs) -> None:
        if num_classes > 2:
            raise InputError(
                f"LogisticRegression has two classes, the data has {num_classes}: give --data.classes '[0,1]'"
            )
        super().__init__(num_classes, **kwargs)
        self.linear = PixelLinear(1)

    def initialize(self, images: Tensor) -> None:
        self.linear.initialize(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,)."""
        with self.in_float32():
            return self.linear(images).squeeze(1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, labels.to(output.dtype))

    def predicted_classes(self, output: Tensor) -> Tensor:
        return (output > 0).long()

    def probabilities(self, output: Tensor) -> Tensor:
        return SigmoidPair()(output)

    def predictor(self, features: bool = False) -> nn.Module:
        if features:
            raise InputError("LogisticRegression has no encoder whose features could be given")
        return nn.Sequential(self.linear, SigmoidPair())
