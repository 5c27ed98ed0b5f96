"""Where the time of a step goes, measured without making the host wait for the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


class Stopwatch:
    """Adds up seconds by name: of the host, or on a CUDA device of the work that was queued in between."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def attach(self, name: str, module: nn.Module) -> None:
        """Let the time of a module's forward passes count for `name`."""
        running: list[AbstractContextManager] = []

        def before(*_) -> None:
            running.append(self(name))
            running[-1].__enter__()

        def after(*_) -> None:
            running.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    @contextmanager
    def __call__(self, name: str, waits: bool = False) -> Iterator[None]:
        """Within, the time counts for `name`; `waits` says that it is the host that waits or works."""
        if waits or not self.on_gpu:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits for the device."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1e3
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
