"""The encoder of the report that this project grew from."""

from torch import Tensor, nn

from errors import require
from lightning_modules.encoders.contract import Encoder


class ReportEncoder(Encoder):
    """The two-convolution network of the report this project grew from, layer for layer; 5.3 million weights.

    Conv 3→32, ReLU, max-pool, conv 32→64, ReLU, max-pool, linear 4096→1024, ReLU, linear 1024→512, ReLU, and a
    linear layer to `feature_dim`, the report's `z_dim`. Trained with `z_dim: null`, its loss reads these features.
    """

    def __init__(self, feature_dim: int = 32) -> None:
        super().__init__()
        require(feature_dim >= 1, "encoder feature_dim", feature_dim, "at least 1")
        self.feature_dim = feature_dim
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(),
            nn.Linear(512, feature_dim),
        )  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.net(images)
