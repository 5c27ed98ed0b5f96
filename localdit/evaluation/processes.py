"""Work that several processes of accelerate share, and that comes out as if one had done it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from localdit.evaluation.images import read_rgb

Item = TypeVar("Item")


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """What of a list falls to this process: every P-th item of P processes, from its own number on."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gathered(mine: Sequence[Any] | np.ndarray) -> list[Any]:
    """What all processes made of their `own_part`, in the order of the whole list, on each of them."""
    state = PartialState()
    if state.num_processes == 1:
        return list(mine)
    parts = gather_object([list(mine)])
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]


def shown(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with a bar that says how far the main process has come."""
    yield from tqdm(items, desc=what, disable=None if PartialState().is_main_process else True)


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last perhaps shorter, of which the next is begun when it is asked for."""
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


def own_pictures(paths: Sequence[Path], what: str) -> Iterator[Image.Image]:
    """The pictures that fall to this process, read one by one as RGB, with a bar."""
    for path in shown(own_part(paths), what):
        yield read_rgb(path)
