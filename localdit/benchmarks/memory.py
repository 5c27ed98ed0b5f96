"""The memory that a measurement takes, on its own in a process."""

import ctypes
import gc
import multiprocessing
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from localdit.command_line import OUT_OF_MEMORY


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function` returns, computed in a process of its own, which gives all its memory back.

    Raises:
        MemoryError: where the memory did not do.
        RuntimeError: where the process failed otherwise; it has printed why.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["localdit", function.__module__])  # once for all processes
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None and process.exitcode == -9:  # of Linux, which ends what takes too much
        raise MemoryError("the process was killed, as systems do when the memory runs out")
    if answer is None:
        raise RuntimeError(f"The process ended with exit code {process.exitcode}; what it printed says why.")
    if isinstance(answer, MemoryError):
        raise answer
    return answer


def _answer(connection: Connection, function: Callable, arguments: tuple) -> None:
    try:
        connection.send(function(*arguments))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        connection.send(MemoryError("out of memory"))


def forget_peak(device: str) -> int:
    """Have the peak begin anew; returns the bytes that are taken."""
    gc.collect()
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    if platform.system() == "Linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free but not given back would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """The most bytes taken since `forget_peak`; without Linux and without an accelerator, those taken now."""
    if device != "cpu":
        return torch.accelerator.max_memory_allocated()
    if platform.system() != "Linux":
        return psutil.Process().memory_info().rss
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def free_memory(device: str) -> int:
    """Bytes that can still be taken."""
    return psutil.virtual_memory().available if device == "cpu" else torch.accelerator.get_memory_info(device)[0]


def gibibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"
