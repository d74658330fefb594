"""The table of a model's parts before a fit."""

from pytorch_lightning.callbacks import ModelSummary


class ModelParts(ModelSummary):
    """Lightning's summary of the parts that have weights: losses and metrics without any are left out."""

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *args, **kwargs) -> None:
        kept = [i for i, count in enumerate(dict(summary_data)["Params"]) if count.strip() != "0"]
        columns = [(name, [cells[i] for i in kept]) for name, cells in summary_data]
        ModelSummary.summarize(columns, *args, **kwargs)
