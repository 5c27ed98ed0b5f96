"""How sure a rate, or a mean, is."""

import numpy as np


def rate_interval(rate: float, count: int, resamples: int = 10_000) -> list[float]:
    """The 95% bootstrap interval [low, high] of the share `rate` of `count` cases that came out right."""
    # among cases drawn anew with replacement, the number that is right is binomial
    resampled = np.random.default_rng(0).binomial(count, rate, size=resamples) / count
    return np.quantile(resampled, [0.025, 0.975]).round(4).tolist()


def mean_interval(values: np.ndarray, resamples: int = 2_000) -> list[float]:
    """The 95% bootstrap interval [low, high] of the mean of values [N]."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975]).tolist()
