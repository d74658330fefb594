"""The supervised baseline: the same network trained with cross-entropy."""

import torch.nn.functional as F
from torch import Tensor, nn

from errors import require
from lightning_modules.encoder_stage import EncoderStage
from lightning_modules.encoders.contract import Encoder
from lightning_modules.means import Mean
from lightning_modules.stage import Batch


class SupervisedEncoder(EncoderStage):
    """An encoder and a linear classifier trained together with cross-entropy.

    Validation does without the shifted views, which would take a tenth of a fit's time: `val/accuracy` is the same in a
    fit and in `validate`. `test` and `predict` use these views. So does `val/views_accuracy`, which `validate` adds: it
    is the one to compare with `test/accuracy`.

    Args:
        encoder: the network; probes can be put on it as on a triplet encoder.
        label_smoothing: share of each label spread over all classes in the training loss.
    """

    def __init__(self, encoder: Encoder, label_smoothing: float = 0.0, num_classes: int = 10, **kwargs) -> None:
        super().__init__(encoder, num_classes=num_classes, **kwargs)
        require(0 <= label_smoothing < 1, "model.label_smoothing", label_smoothing, "in [0, 1)")
        self.classifier = nn.Linear(encoder.feature_dim, num_classes)
        self.label_smoothing, self.views_accuracy = label_smoothing, Mean()

    def forward(self, images: Tensor, shifted: bool = True) -> Tensor:
        """Logits (B, num_classes): of the images alone while training, of the mean over their views otherwise."""
        features = self.encoder(images) if self.training else self.encoder.embed(images, shifted)
        with self.in_float32():
            return self.classifier(features.to(self.classifier.weight.dtype))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels, label_smoothing=self.label_smoothing if self.training else 0.0)

    def evaluation_step(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels, *_ = batch
        output = self(images, shifted=split == "test")
        self.record(split, batch_idx, self.loss(output, labels), self.predicted_classes(output) == labels)
        if self.trainer.state.fn == "validate":
            correct = self.predicted_classes(self(images)) == labels
            self.views_accuracy.update(correct.sum(), len(labels))
            self.log("val/views_accuracy", self.views_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        return {"output": output}

    def prediction_head(self) -> nn.Module:
        return nn.Sequential(self.classifier, nn.Softmax(1))
