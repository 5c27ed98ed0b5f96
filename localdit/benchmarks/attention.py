"""Time of a layer and of a block with each token mixer, as ratios to the same without token mixing.

python -m localdit.benchmarks.attention --side 64 --dtype bfloat16
"""

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from localdit.command_line import Parser, counting_number, run
from localdit.mixers.base import TokenMixer
from localdit.mixers.full import FullAttnProcessor
from localdit.mixers.linear import LinearAttnProcessor
from localdit.mixers.sliding_window import SlidingWindowAttnProcessor
from localdit.mixers.ssm import BidirectionalSSMProcessor
from localdit.mixers.window import WindowAttnProcessor
from localdit.models.attention import LocalDiTAttention
from localdit.models.block import LocalDiTBlock

# the released model's size
HEADS, HEAD_DIM, TEXT_TOKENS = 16, 72, 120
DIM = HEADS * HEAD_DIM


class IdentityMixer(TokenMixer):
    """No mixing: every token gets its own value. Projections stay, so this is the limit of any mixer."""

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        _, _, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_output(attn.to_heads(value))


def mixers() -> dict[str, Callable[[], TokenMixer]]:
    """Makers of the compared mixers, the identity first."""
    common = (HEADS, HEAD_DIM, 1, 10000.0)  # layer 1: shifted
    return {
        "identity": lambda: IdentityMixer(*common),
        "full": lambda: FullAttnProcessor(*common),
        "window 4": lambda: WindowAttnProcessor(*common, window_size=4),
        "window 8": lambda: WindowAttnProcessor(*common, window_size=8),
        "window 16": lambda: WindowAttnProcessor(*common, window_size=16),
        "window 8 + context 4": lambda: WindowAttnProcessor(*common, window_size=8, global_context=4),
        "sliding_window 7": lambda: SlidingWindowAttnProcessor(*common, kernel_size=7),
        "linear": lambda: LinearAttnProcessor(*common),
        "ssm": lambda: BidirectionalSSMProcessor(*common, hourglass_ratio=1),
    }


def build(mixer: TokenMixer, part: str) -> nn.Module:
    """The attention layer or the whole block around a mixer."""
    if part == "layer":
        return LocalDiTAttention(DIM, HEADS, HEAD_DIM, mixer)
    return LocalDiTBlock(
        DIM,
        mixer,
        HEADS,
        HEAD_DIM,
        cross_attention=True,
        attention_residual=False,
        dropout=0.0,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_eps=1e-6,
        qk_norm="rms_norm",
        qk_norm_eps=1e-6,
        feed_forward="mlp",
        mlp_ratio=4.0,
    )


def inputs(part: str, side: int, dtype: torch.dtype, device: str) -> tuple:
    """Random inputs of the layer or block for a square grid."""
    like = {"dtype": dtype, "device": device}
    tokens = torch.randn(1, side * side, DIM, **like)
    if part == "layer":
        return tokens, (side, side)
    return tokens, torch.randn(1, 6, DIM, **like), (side, side), torch.randn(1, TEXT_TOKENS, DIM, **like)


def seconds(module: nn.Module, arguments: tuple, device: str) -> float:
    """One forward pass."""
    start = time.perf_counter()
    with torch.no_grad():
        module(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(part: str, side: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each mixer, measured in turn, round after round, so that a drift of the machine meets all alike."""
    modules = {name: build(make(), part).to(device, dtype).eval() for name, make in mixers().items()}
    arguments = inputs(part, side, dtype, device)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for repeat in range(repeats + 1):
        for name, module in modules.items():
            elapsed = seconds(module, arguments, device)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    return times


def report(part: str, side: int, dtype: str, times: dict[str, list[float]]) -> None:
    """Print the median, its ratio to the identity, and the spread of the ratio over the rounds."""
    print(f"\n{part}, {side} x {side} tokens, {dtype}")
    for name, measured in times.items():
        ratios = [mine / base for mine, base in zip(measured, times["identity"], strict=True)]
        print(
            f"  {name:22s} {1000 * median(measured):8.1f} ms   x {median(ratios):5.2f}   "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=counting_number, nargs="+", default=[32, 64], help="sides of the square grid, in tokens"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--part", nargs="+", default=["layer", "block"], choices=["layer", "block"])
    parser.add_argument("--repeats", type=counting_number, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}")
    for part in arguments.part:
        for side in arguments.side:
            for dtype in arguments.dtype:
                times = compare(part, side, getattr(torch, dtype), arguments.device, arguments.repeats)
                report(part, side, dtype, times)


if __name__ == "__main__":
    run("localdit.benchmarks.attention", main)
