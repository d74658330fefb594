"""Logistic and softmax regression on pixels: what there is without an encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from lightning_modules.encoders import channel_statistics
from lightning_modules.stage import Stage


class PixelNormalizer(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] → (B, 3072), each channel with the training split's mean 0 and deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def initialize(self, images: Tensor) -> None:
        mean, std = channel_statistics(images)
        self.mean.copy_(mean.view(3, 1, 1))
        self.std.copy_(std.view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # The linear layer's own order of pixels does not matter, but it must be one for any memory format.
        return ((images - self.mean) / self.std).flatten(1)


class SoftmaxRegression(Stage):
    """Multinomial logistic regression: softmax(Wx + b) on normalised pixels x, cross-entropy loss."""

    def __init__(self, num_classes: int = 10, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)
        self.normalizer = PixelNormalizer()
        self.linear = nn.Linear(3 * 32 * 32, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def initialize(self, images: Tensor) -> None:
        self.normalizer.initialize(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.normalizer(images))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)


class LogisticRegression(Stage):
    """Binary logistic regression: σ(wᵀx + b) is the probability of class 1, one logit, binary cross-entropy loss."""

    def __init__(self, num_classes: int = 2, **kwargs) -> None:
        if num_classes != 2:
            raise InputError(f"LogisticRegression has two classes, the data has {num_classes}: give --data.classes '[0,1]'")
        super().__init__(num_classes, **kwargs)
        self.normalizer = PixelNormalizer()
        self.linear = nn.Linear(3 * 32 * 32, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def initialize(self, images: Tensor) -> None:
        self.normalizer.initialize(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,)."""
        return self.linear(self.normalizer(images)).squeeze(1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, labels.to(output.dtype))

    def predicted_classes(self, output: Tensor, labels: Tensor) -> Tensor:
        return (output > 0).long()

    def predict_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        probability = self(batch[0]).float().sigmoid()
        return torch.stack([1 - probability, probability], dim=1)
