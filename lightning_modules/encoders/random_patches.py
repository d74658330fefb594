"""Features that no gradient has touched: responses to patches of training images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import require
from lightning_modules.encoders.contract import Encoder

BLOCK = 64  # patches worked on at once, so that their responses fit into memory


class RandomPatches(Encoder):
    """How much each part of an image resembles `patches` random patches of training images; nothing is learned.

    Each patch is brought to mean 0 and variance 1, whitened (ZCA), and multiplied with the random patches, which are
    treated the same and have length 1. What of a response r exceeds the threshold, max(0, r − α) and
    max(0, −r − α), is averaged over each quarter of the image: `feature_dim` is 8 · `patches` (A. Coates & A. Ng,
    "The Importance of Encoding Versus Training with Sparse Coding and Vector Quantization", 2011, "random patches"
    with soft threshold; L. Thiry et al., "The Unreasonable Effectiveness of Patches in Deep Convolutional Kernels
    Methods", 2021).

    Args:
        patches: how many.
        size: their side in pixels.
        threshold: α.
        contrast_eps: added to a patch's variance (pixels from 0 to 1).
        whitening_eps: added to the variance of each direction of the patches.
    """

    def __init__(
        self,
        patches: int = 1000,
        size: int = 6,
        threshold: float = 0.25,
        contrast_eps: float = 1e-4,
        whitening_eps: float = 0.1,
    ) -> None:
        super().__init__()
        require(patches >= 1, "RandomPatches patches", patches, "at least 1")
        require(1 <= size <= 16, "RandomPatches size", size, "1..16 pixels")
        require(threshold >= 0, "RandomPatches threshold", threshold, "0 or more")
        require(contrast_eps > 0 and whitening_eps > 0, "RandomPatches eps", (contrast_eps, whitening_eps), "above 0")
        self.feature_dim, self.size, self.threshold = 8 * patches, size, threshold
        self.contrast_eps, self.whitening_eps = contrast_eps, whitening_eps
        # Drawn here, as other networks' first weights are: image, row and column as shares of what there is.
        self.register_buffer("places", torch.rand(3, patches))
        self.register_buffer("weight", torch.zeros(patches, 3, size, size))
        self.register_buffer("bias", torch.zeros(patches))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Cuts the patches out of the training images (N, 32, 32, 3) uint8; mean and std stay 0 and 1, since each patch
        is normalised by itself."""
        size, n, images = self.size, len(images), images.cpu()  # Apple's GPUs have no float64
        known = self._normalised(images[:: max(1, n // 500)])  # some 100,000 patches, for 3 · size² directions
        mean = known.mean(0)
        variance, directions = torch.linalg.eigh((known - mean).T.double() @ (known - mean).double() / len(known))
        whiten = (directions / (variance + self.whitening_eps).sqrt() @ directions.T).float()
        ends = torch.tensor([[n], [33 - size], [33 - size]])
        of, row, column = (self.places.cpu() * ends).long().minimum(ends - 1)  # a rounded share may be 1
        cut = torch.stack([images[i, y : y + size, x : x + size] for i, y, x in zip(of, row, column)])
        chosen = F.normalize((self._normalised(cut) - mean) @ whiten, dim=1)
        weight = chosen @ whiten  # what the whitened patch is multiplied with, as weights of the patch itself
        self.weight.copy_(weight.view_as(self.weight))
        self.bias.copy_(-weight @ mean)

    def _normalised(self, images: Tensor) -> Tensor:
        """All patches of images (N, H, W, 3) uint8, at every other place: (M, 3 · size²), each with mean 0 and
        variance 1 but for `contrast_eps`."""
        patches = F.unfold(images.permute(0, 3, 1, 2).float() / 255, self.size, stride=2).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(1, keepdim=True)
        return patches / (patches.square().mean(1, keepdim=True) + self.contrast_eps).sqrt()

    def features(self, images: Tensor) -> Tensor:
        kind = images.dtype if images.dtype == torch.float64 else torch.float32
        with torch.autocast(images.device.type, enabled=False):  # a patch's mean is taken out after the convolution
            given, images = images.dtype, images.to(kind)
            grey, squares = images.mean(1, keepdim=True), images.square().mean(1, keepdim=True)
            mean = F.avg_pool2d(grey, self.size, 1)
            variance = F.avg_pool2d(squares, self.size, 1) - mean.square()
            inverse, found = (variance.clamp_min(0) + self.contrast_eps).rsqrt(), []
            for weight, bias in zip(self.weight.to(kind).split(BLOCK), self.bias.to(kind).split(BLOCK)):
                # A normalised patch's response from the raw one's, whose mean and deviation all weights share.
                raw = F.conv2d(images, weight) - weight.flatten(1).sum(1).view(-1, 1, 1) * mean
                response = raw * inverse + bias.view(-1, 1, 1)
                for sign in (1, -1):
                    found.append(F.adaptive_avg_pool2d(F.relu(sign * response - self.threshold), 2).flatten(1))
        return torch.cat(found, dim=1).to(given)
