"""Rows of pictures in several sizes: which of them a micro-step sees, all of one size, in every process."""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from diffusers.training_utils import generate_aspect_ratio_buckets

from config import DataConfig
from localdit.data.labelled_images import Split
from train.data import Source

Key = tuple[int, int]  # row and bucket


class BucketSource(Source):
    """Rows in a new order every epoch; all of a micro-step have the same size, in every process.

    Args:
        sizes: height and width of each bucket.
        members: the rows of each bucket that has any, ascending.
        seed: of the order.
    """

    def __init__(self, sizes: list[tuple[int, int]], members: dict[int, np.ndarray], seed: int):
        self.seed = seed
        self.sizes = sizes
        self.members = members

    def every(self, count: int | None) -> dict[int, list[Key]]:
        return {bucket: [(row, bucket) for row in rows.tolist()] for bucket, rows in self.members.items()}

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Key]:
        """Rows and their bucket; the same bucket in all processes.

        An epoch holds every picture at least once; the last step of each size is filled up with its first pictures.
        """
        taken = batch_size * world_size
        counts = tuple(len(rows) for rows in self.members.values())
        epoch, place = divmod(micro_step, sum(math.ceil(count / taken) for count in counts))
        index, start = epoch_schedule(counts, taken, self.seed, epoch)[place]
        bucket = list(self.members)[index]
        order = epoch_order(counts[index], self.seed, epoch, bucket)
        places = (np.arange(batch_size) + start + rank * batch_size) % counts[index]
        return [(int(self.members[bucket][order[place]]), bucket) for place in places]


def bucket_sizes(config: DataConfig) -> list[tuple[int, int]]:
    """The heights and widths that pictures are cut to."""
    if config.bucket_multiple is None:
        return [(config.resolution, config.resolution)]
    return generate_aspect_ratio_buckets(config.resolution, config.bucket_multiple)


def rows_of(split: Split, rows: list[int], name: Callable[[int], str], held_out: float) -> list[int]:
    """The rows to train on, or those that are held out; which they are depends on each picture's name alone.

    Raises:
        ValueError: where there is none.
    """

    def is_held_out(row: int) -> bool:
        return int.from_bytes(hashlib.sha256(name(row).encode()).digest()[:6]) < held_out * 2**48

    chosen = [row for row in rows if is_held_out(row) == (split == "test")]
    if not chosen:
        kind = "to validate with" if split == "test" else "to train on"
        raise ValueError(f"data.held_out={held_out} leaves none of {len(rows)} pictures {kind}; choose another share.")
    return chosen


def nearest_buckets(sizes: list[tuple[int, int]], buckets: list[tuple[int, int]]) -> np.ndarray:
    """For each (height, width) the number of the bucket whose ratio of height to width is nearest, as a factor."""
    ratios = np.log([height / width for height, width in buckets])
    wanted = np.log([height / width for height, width in sizes])
    return np.abs(wanted[:, None] - ratios[None]).argmin(axis=1)


@lru_cache(maxsize=2)
def epoch_schedule(counts: tuple[int, ...], taken: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """The steps of an epoch in random order: which bucket, and from which place in its order on."""
    steps = [(index, start) for index, count in enumerate(counts) for start in range(0, count, taken)]
    return [steps[place] for place in np.random.default_rng((seed, epoch)).permutation(len(steps))]


@lru_cache(maxsize=64)
def epoch_order(length: int, seed: int, epoch: int, bucket: int = 0) -> list[int]:
    """A permutation of range(length) for one epoch, and of one bucket."""
    return np.random.default_rng((seed, epoch, bucket)).permutation(length).tolist()
