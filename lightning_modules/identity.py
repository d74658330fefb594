"""Whether a checkpoint is one of the module that is about to load it."""

from typing import Any

from torch import Tensor, nn

from errors import InputError

# What only labelled images have; it is compared where both sides have it.
LABELS = ("class_names", "labels_sha256")
HINT = "start from the run's own --config RUN/config.yaml"


def agree(prefix: str, own: dict[str, Any], saved: Any) -> None:
    """Raises InputError where a checkpoint says something else than this command."""
    for name, value in own.items():
        if name == "images" and "pixels_sha256" in own:  # which says more
            continue
        found = saved.get(name) if isinstance(saved, dict) else None
        if name in LABELS and name in (saved or {}) and not (found and value):
            continue
        if found != value:
            raise InputError(f"the checkpoint's {prefix}{name} is {found}, this command's is {value}; {HINT}")


def check_shapes(module: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Raises InputError unless `state_dict` has the module's tensors, all of them and no others."""
    shapes, own = ({k: tuple(v.shape) for k, v in d.items()} for d in (state_dict, module.state_dict()))
    for name in [*own, *shapes]:
        if shapes.get(name) != own.get(name):
            found, expected = shapes.get(name, "missing"), own.get(name, "no such tensor")
            raise InputError(f"the checkpoint's {name} is {found}, this command's model expects {expected}; {HINT}")
