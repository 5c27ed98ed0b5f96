"""Stopping by a signal: noticed by all processes at the same step boundary, so that a checkpoint can be kept."""

import signal
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = timedelta(hours=2)  # of processes that wait while the main one draws, scores or writes alone
STOPPED = 75  # the exit code of a run that a signal stopped: EX_TEMPFAIL, "try again", which a job script can ask for


class Stopped(Exception):
    """A run ended early, at a signal, with its checkpoint written."""


class StopSignals:
    """Within `with StopSignals() as stop`, the signals of `SIGNALS` are noted instead of ending the process.

    A second Ctrl-C interrupts at once, as ever.
    """

    def __init__(self):
        self.noted: signal.Signals | None = None
        # flags travel by gloo between CPUs: to read one off a GPU would wait for all the work that is queued there
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number)

    def interrupt_sampling(self, pipeline, _step: int, _timestep, tensors: dict) -> dict:
        """A pipeline's `callback_on_step_end` that leaves out what remains once this process was told to stop."""
        pipeline._interrupt = self.noted is not None
        return tensors

    def agreed(self) -> bool:
        """Whether any process was told to stop; all processes call this together and hear the same."""
        if self._group is None:
            return self.noted is not None
        flag = torch.tensor([self.noted is not None], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
