"""The triangular learning rate."""

from collections.abc import Callable


def triangle(total: int, warmup: float) -> Callable[[int], float]:
    """Learning rate factor at step s of `total`: 0 → 1 over the share `warmup`, then 1 → 0; within them never 0 itself.

    A function, of which LambdaLR saves nothing: a resumed fit follows the schedule of its own length.
    """
    peak = warmup * total

    def factor(step: int) -> float:
        rising = (step + 1) / peak if step + 1 < peak else 1.0
        return max(0.0, min(rising, (total - step) / max(total - peak, 1.0)))

    return factor
