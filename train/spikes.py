"""Losses that leave their course: told from the noise, so that a run can go back to before."""

from collections import deque
from statistics import median

REMEMBERED = 10  # means of the loss over `log_every` steps
NEEDED = 5  # of them, before one can stand out


class SpikeWatch:
    """Knows the last losses, and whether a new one is far above their median.

    Args:
        factor: how many times the median is too far; None to find nothing.
        recent: the last losses, oldest first.
    """

    def __init__(self, factor: float | None, recent: list[float]):
        self.factor = factor
        self.recent = deque(recent, maxlen=REMEMBERED)

    def is_spike(self, loss: float | None) -> bool:
        """Whether this loss is too far above the last ones; if not, it is one of them from now on."""
        if self.factor is None or loss is None:
            return False
        if len(self.recent) >= NEEDED and loss > self.factor * median(self.recent):
            return True
        self.recent.append(loss)
        return False
