"""What a layer and a block ask of a GPU: operations, each of which starts a kernel, and passes over its memory.

python -m localdit.benchmarks.launches --side 64 --part layer block

Counted without a GPU, on tensors that have a shape and nothing in it. Where a picture is small, launches are what takes
a GPU's time; where it is large, passes and products are.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localdit.benchmarks.attention import inputs, modules
from localdit.command_line import Parser, counting_number, run
from localdit.mixers import sliding_window, window
from localdit.models import rope

HAS_TRITON = find_spec("triton") is not None

# what CUDA has a kernel for, where tensors without content take their parts one by one
WHOLE = (F.scaled_dot_product_attention, F.rms_norm)
# what moves nothing
FREE = {"empty", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view", "view"}


class Count(TorchDispatchMode):
    """Counts operations, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def add(self, *tensors) -> None:
        self.operations += 1
        self.bytes += sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view and function.overloadpacket.__name__ not in FREE:
            self.add(arguments, options, result)
        return result


class Whole(TorchFunctionMode):
    """Counts as one operation what is one on CUDA."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function not in WHOLE:
            return function(*arguments, **options)
        states = options["query"] if "query" in options else arguments[0]
        result = torch.empty_like(states)
        self.count.add(arguments, options, result)
        return result


def names(part: str) -> list[str]:
    """What is counted: all that is compared on a GPU, but for what needs one even to begin."""
    return [name for name in modules(part, HAS_TRITON) if not name.endswith("flex")]


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Have our code do with tensors that are empty what it does on CUDA."""
    with ExitStack() as changes:
        changes.enter_context(patch.object(rope, "COMPLEX_DEVICES", ("meta",)))
        # what has no content has no precision that could be changed
        changes.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        for mixer in (window, sliding_window):
            changes.enter_context(patch.object(mixer, "kernel_takes", lambda *_: HAS_TRITON))
        yield


@torch.no_grad()
def count(part: str, name: str, side: int) -> tuple[int, float]:
    """Operations of one forward pass, and the memory that they pass over in multiples of the input."""
    with torch.device("meta"):
        module = nn.Module.to(
            modules(part, HAS_TRITON)[name].eval(), torch.bfloat16
        )  # an attention's own `to` leaves these alone
    arguments = inputs(part, side, torch.bfloat16, "meta")
    counted = Count()
    with as_on_cuda():
        module(*arguments)  # makes the tables of the grid
        with counted, Whole(counted):
            module(*arguments)
    return counted.operations, counted.bytes / arguments[0].nbytes


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=counting_number, nargs="+", default=[64], help="sides of the square grid, in tokens"
    )
    parser.add_argument("--part", nargs="+", default=["layer", "block"], choices=["layer", "block"])
    arguments = parser.parse_args()
    for part, side in itertools.product(arguments.part, arguments.side):
        print(f"\n{part}, {side} x {side} tokens, bfloat16, not compiled")
        for name in names(part):
            operations, passes = count(part, name, side)
            print(f"  {name:30s} {operations:5d} operations   {passes:6.1f} x the input read and written")


if __name__ == "__main__":
    run("localdit.benchmarks.launches", main)
