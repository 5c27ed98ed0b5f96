"""Data: which picture each step sees is a pure function of seed, step and rank."""

import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from train.stopping import SIGNALS


class MicroStepSampler:
    """The positions of each micro-batch of one process, from the micro-step `first` up to `last`, exclusive."""

    def __init__(self, batch_size: int, first: int, last: int, rank: int, world_size: int):
        self.batch_size = batch_size
        self.micro_steps = range(first, last)
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in self.micro_steps:
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return len(self.micro_steps)


def build_loader(dataset: Dataset, sampler: MicroStepSampler, num_workers: int) -> DataLoader:
    """Micro-batches for one process; the number of workers changes nothing but the speed."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_the_trainer,
    )


def leave_signals_to_the_trainer(_worker: int) -> None:
    """A signal to the whole process group must not end the workers before the trainer has finished its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
