"""What an encoder sees of an image: the views in a fit's first batch."""

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.figures import draw_gallery, save
from errors import require


class ViewSheet(Callback):
    """Draws the views of some images of a fit's first batch into `views.png`, and to TensorBoard as `train/views`.

    Does nothing where the data makes one view of each image.

    Args:
        images: how many; the first ones of the batch.
        pictures: false: nothing is drawn.
    """

    def __init__(self, images: int = 8, pictures: bool = True) -> None:
        require(1 <= images <= 100, "view_sheet.images", images, "1..100")
        self.images, self.pictures = images, pictures

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if batch_idx or trainer.current_epoch or not self.pictures or not trainer.loggers:
            return
        sizes, count = batch[0] if isinstance(batch[0], list) else [batch[0]], len(batch[1])
        if trainer.is_global_zero and sum(map(len, sizes)) > count:
            chosen = range(min(self.images, count))
            rows = [[(view, "") for x in sizes for view in self._pixels(x, i, count)] for i in chosen]
            figure = draw_gallery(rows, "a row is an image: its views in the first batch")
            save(trainer, figure, "views.png", "train/views")

    @staticmethod
    def _pixels(views: Tensor, image: int, images: int) -> Tensor:
        """(V, S, S, 3) uint8, of the views (B · V, 3, S, S) of one image of B."""
        own = views.unflatten(0, (images, -1))[image]
        return (own.detach().float() * 255).round().byte().permute(0, 2, 3, 1).cpu()
