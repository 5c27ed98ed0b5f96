"""Several sources in one run, each with its share of the steps."""

from functools import lru_cache
from typing import Any

import numpy as np

from train.data import Source

BLOCK = 1000  # micro-steps over which the shares hold exactly


class MixedSource(Source):
    """Every micro-step sees one of several sources, in every process the same; shares hold over each `BLOCK` of them.

    One source for a whole micro-step, because each has sizes of its own.

    Args:
        sources: alike in channels and classes.
        weights: of the sources, in any unit.
        seed: of which micro-step sees which.

    Raises:
        ValueError: where the sources are not alike, or one would have less than one step in `BLOCK`.
    """

    def __init__(self, sources: list[Source], weights: list[float], seed: int):
        for name in ("channels", "classes"):
            values = [getattr(source, name) for source in sources]
            if any(value != values[0] for value in values):
                raise ValueError(f"The sources of a mixture differ in their {name}: {values}; mix only what is alike.")
        self.sources = sources
        self.counts = shares(weights)
        self.channels, self.classes, self.seed = sources[0].channels, sources[0].classes, seed
        self.sizes = [size for source in sources for size in source.sizes]
        self.empty_text = sources[0].empty_text

    def words(self) -> list[str]:
        return sorted({word for source in self.sources for word in source.words()})

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Any]:
        block, place = divmod(micro_step, BLOCK)
        number, earlier = block_order(self.counts, self.seed, block)[place]
        own_step = block * self.counts[number] + earlier
        return [(number, key) for key in self.sources[number].keys(own_step, batch_size, rank, world_size)]

    def __getitem__(self, key: tuple[int, Any]) -> dict:
        number, inner = key
        return self.sources[number][inner]


def shares(weights: list[float]) -> tuple[int, ...]:
    """How many micro-steps of a block each source has: whole numbers that sum up to `BLOCK`, by largest remainders."""
    exact = np.array(weights) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"weight={min(weights)} is less than one in {BLOCK} of {sum(weights)}; leave that source out.")
    return tuple(counts.tolist())


@lru_cache(maxsize=2)
def block_order(counts: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """For each micro-step of a block: which source it sees, and how many in the block before it saw that one."""
    order = np.random.default_rng((seed, block)).permutation(np.repeat(np.arange(len(counts)), counts))
    seen = [0] * len(counts)
    places = []
    for number in order.tolist():
        places.append((number, seen[number]))
        seen[number] += 1
    return places
