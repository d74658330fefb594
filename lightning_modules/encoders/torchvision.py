"""Any classification network of torchvision as an encoder, among them ResNet-18 for 32×32 images."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models import get_model, list_models

from errors import InputError, first_line
from lightning_modules.encoders.contract import Encoder


class TorchvisionEncoder(Encoder):
    """A torchvision classification model, untrained, without its last linear layer, whose inputs are the features.

    Args:
        model: torchvision's name, such as resnet18, vgg11_bn or mobilenet_v3_small (`torchvision.models.` may stand
            before it).
        stem: `cifar` replaces a ResNet's 7×7 stride-2 convolution and max-pool by one 3×3 convolution, as is usual
            for 32×32 images (K. He et al., 2016, section 4.2); `imagenet` leaves the model as it is.
        image_size: images are enlarged to this many pixels first, for models that need more than 32.
    """

    def __init__(
        self, model: str = "resnet18", stem: Literal["cifar", "imagenet"] = "cifar", image_size: int = 32
    ) -> None:
        super().__init__()
        name = model.removeprefix("torchvision.models.")
        if name not in list_models(module=models):  # detection and others would download a pretrained backbone
            raise InputError(f"TorchvisionEncoder model {model}: torchvision has no such classification model")
        self.net = get_model(name, weights=None)
        if getattr(self.net, "aux_logits", False):
            raise InputError(f"TorchvisionEncoder model {model}: has auxiliary outputs; choose one without")
        if stem == "cifar":
            if not isinstance(getattr(self.net, "conv1", None), nn.Conv2d) or not hasattr(self.net, "maxpool"):
                raise InputError(f"TorchvisionEncoder stem cifar: {model} has no ResNet's stem; give stem: imagenet")
            self.net.conv1 = nn.Conv2d(3, self.net.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.net.maxpool = nn.Identity()
        linear = [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(
                f"TorchvisionEncoder model {model}: ends in no linear layer whose inputs could be features"
            )
        parent, _, last = linear[-1].rpartition(".")
        self.feature_dim = self.net.get_submodule(linear[-1]).in_features
        setattr(self.net.get_submodule(parent), last, nn.Identity())
        self.image_size = image_size
        self._check(model)

    @torch.no_grad()
    def _check(self, model: str) -> None:
        hint = f"it does not map {self.image_size}×{self.image_size} images to features"
        try:
            found = self.eval()(torch.zeros(1, 3, 32, 32))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"TorchvisionEncoder model {model}: {hint} ({first_line(error)}); give image_size: 224"
            ) from error
        if not isinstance(found, Tensor) or found.shape != (1, self.feature_dim):
            raise InputError(f"TorchvisionEncoder model {model}: {hint}; choose a classification model")
        self.train()

    def features(self, images: Tensor) -> Tensor:
        if self.image_size != images.shape[-1]:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=False)
        return self.net(images)
