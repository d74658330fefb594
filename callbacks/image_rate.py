"""Images/s as the progress bar and TensorBoard show them."""

import time


class ImageRate:
    """Images/s between two measurements in a fit."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Leaves out what has passed since the last measurement: a rate across a validation would be none."""
        self._since, self._images = None, 0

    def add(self, images: int) -> None:
        self._images += images

    def measure(self) -> float | None:
        """None where nothing was measured since the last restart."""
        now = time.perf_counter()
        rate = None if self._since is None else self._images / (now - self._since)
        self._since, self._images = now, 0
        return rate
