"""Data: which picture each step sees is a pure function of seed, step and rank."""

import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from train.stopping import SIGNALS

Condition = Literal["caption", "label"]


class Source(Dataset):
    """Pictures to train on: `keys` says which ones a micro-step sees, and `source[key]` is one of them, ready.

    An item has "image" [C, H, W] in [-1, 1], "name" for people, and "caption" or "label" as asked for. Here the keys
    are positions, of which there is no end.

    Attributes:
        channels: of the pictures.
        classes: names of the labels, where there are any.
        empty_text: the states [L, D] and the mask [L] of the empty caption, where the items have states of theirs.
        sizes: heights and widths that may come, each all over a micro-step.
    """

    channels = 3
    classes: list[str] | None = None
    empty_text: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, resolution: int, seed: int):
        self.seed = seed
        self.sizes = [(resolution, resolution)]

    def words(self) -> list[str]:
        """The words of all captions; none where there are no captions."""
        return []

    def every(self, count: int | None) -> dict[int, list[Any]]:
        """The keys of all pictures, each once, by the number of their size; of an endless source `count`.

        Raises:
            ValueError: where the source is endless and there is no count.
        """
        if count is None:
            raise ValueError("These pictures have no end; set pictures to how many of them to take.")
        return {0: list(range(count))}

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Any]:
        """What one process sees in one micro-step: a pure function of the seed and the arguments."""
        start = (micro_step * world_size + rank) * batch_size
        return list(range(start, start + batch_size))


class MicroStepSampler:
    """The keys of each micro-batch of one process, from the micro-step `first` up to `last`, exclusive."""

    def __init__(self, source: Source, batch_size: int, first: int, last: int, rank: int, world_size: int):
        self.source = source
        self.batch_size = batch_size
        self.micro_steps = range(first, last)
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Any]]:
        for micro_step in self.micro_steps:
            yield self.source.keys(micro_step, self.batch_size, self.rank, self.world_size)

    def __len__(self) -> int:
        return len(self.micro_steps)


def build_loader(
    sampler: MicroStepSampler, num_workers: int, worker_init_fn: Callable[[int], None] | None = None
) -> DataLoader:
    """Micro-batches for one process; the number of workers changes nothing but the speed."""
    return DataLoader(
        sampler.source,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
    )


def end_workers(batches: Iterator) -> None:
    """Let the workers of a loader's iterator go; at the interpreter's exit they would not hear its SIGTERM."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def leave_signals_to_the_trainer(_worker: int) -> None:
    """A signal to the whole process group must not end the workers before the trainer has finished its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
