"""What the training state in a checkpoint must look like, so that a fit can go on from it."""

from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor


def restorable(trainer: Trainer) -> dict[str, list]:
    """The state of optimiser and schedule as `fits` compares it with a checkpoint's."""
    (optimizer,) = trainer.optimizers
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def moments_fit(state: Any) -> bool:  # of each weight that has been stepped: the same names, its shape or a number
        if not isinstance(state, dict) or not state.keys() <= set(range(len(weights))):
            return False
        first = next(iter(state.values()), None)
        return all(isinstance(m, dict) and m.keys() == first.keys() for m in state.values()) and all(
            x is None or isinstance(x, Tensor) and x.shape in (weights[i].shape, ())
            for i, moments in state.items()
            for x in moments.values()
        )

    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return {"optimizer_states": [{**optimizer.state_dict(), "state": moments_fit}], "lr_schedulers": schedules}


def fits(value: Any, own: Any) -> bool:
    """Whether `value` is made as `own` is: the same keys, lengths, kinds of values, shapes of tensors.

    A function in `own` says itself what fits.
    """
    if callable(own):
        return own(value)
    if isinstance(own, dict):
        return isinstance(value, dict) and value.keys() == own.keys() and all(fits(value[k], own[k]) for k in own)
    if isinstance(own, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(own) and all(map(fits, value, own))
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (own.shape, own.dtype)
    if type(own) in (int, float):
        return type(value) in (int, float)
    return type(value) is type(own)
