"""How sure a rate is."""

import numpy as np


def rate_interval(rate: float, count: int, resamples: int = 10_000) -> list[float]:
    """The 95% bootstrap interval [low, high] of the share `rate` of `count` cases that came out right."""
    # among cases drawn anew with replacement, the number that is right is binomial
    resampled = np.random.default_rng(0).binomial(count, rate, size=resamples) / count
    return np.quantile(resampled, [0.025, 0.975]).round(4).tolist()
