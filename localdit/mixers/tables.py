"""Tables that depend on a grid and not on what lies on it: made once, and kept for the next call."""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

Made = TypeVar("Made")


def kept(states: torch.Tensor, make: Callable[..., Made], *arguments) -> Made:
    """What `make(*arguments)` returns for the sake of some states, from an earlier call where it may be.

    Neither a graph nor a fake tensor may leave its own tables to others.
    """
    of_graph = torch.compiler.is_compiling() or (states.is_cuda and torch.cuda.is_current_stream_capturing())
    if type(states) is torch.Tensor and not of_graph:
        return _made_once(make, *arguments)
    return make(*arguments)


@lru_cache(maxsize=256)  # several grids times the shifts of a model's layers
def _made_once(make: Callable[..., Made], *arguments) -> Made:
    # A tensor born in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return make(*arguments)
