"""Time and memory of a layer and of a block with each token mixer, as ratios to the same without token mixing.

python -m localdit.benchmarks.attention --side 64 --dtype bfloat16
python -m localdit.benchmarks.attention --part block --side 128 256 --memory

Where the project has set itself a goal, the line says whether this machine reaches it.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import nn

from localdit.benchmarks.memory import apart, forget_peak, peak_memory
from localdit.command_line import (
    DTYPES,
    Parser,
    best_device,
    check_device,
    counting_number,
    keep_freed_memory,
    run,
)
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


# ratios to reach: part, mixer, fp32 and bf16
GOALS = {
    "layer": {
        "window 4": (1.08, 1.20),
        "window 8": (1.10, 1.25),
        "window 16": (1.18, 1.40),
        "window 8 + context 4": (1.15, 1.35),
        "sliding_window 7": (1.22, 1.60),
        "linear": (1.08, 1.20),
    },
    "block": {
        "window 4": (1.02, None),
        "window 4, streamed": (None, 1.03),
        "window 8": (1.02, None),
        "window 8, streamed": (None, 1.03),
        "window 16": (1.04, None),
        "window 16, streamed": (None, 1.06),
        "window 8 + context 4": (1.05, 1.08),
        "sliding_window 7": (1.03, 1.15),
        "linear": (1.02, 1.07),
    },
}
GPU_GOAL = 1.05  # of a block with windows at 64 x 64 tokens in bf16
TRAINING_ALLOWANCE = 0.05  # what a training step may take more than a block's forward
STREAMED_GOALS = {128: 0.85}  # time in bf16, by the grid's side
MEMORY_GOALS = {128: 3.2, 256: 2.0}  # in multiples of the block's input


class ValueAlone(torch.autograd.Function):
    """Hands the value on, and its gradient to query and key as well, so that their projections work backward, too."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, gradient, gradient


class IdentityMixer(TokenMixer):
    """No mixing: every token gets its own value. Projections stay, so this is the limit of any mixer."""

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        value = ValueAlone.apply(attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        return attn.to_output(attn.to_heads(value))


def mixers(gpu: bool = False) -> dict[str, Callable[[], TokenMixer]]:
    """Makers of the compared mixers, the identity first, and for a GPU those that are for it."""
    common = (HEADS, HEAD_DIM, 1, 10000.0)  # layer 1: shifted
    made: dict[str, Callable[[], TokenMixer]] = {
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
    if gpu:
        made |= {
            "window 4, Triton": lambda: WindowAttnProcessor(*common, window_size=4, backend="triton"),
            "window 8, Triton": lambda: WindowAttnProcessor(*common, window_size=8, backend="triton"),
            "window 16, Triton": lambda: WindowAttnProcessor(*common, window_size=16, backend="triton"),
            "window 8 + context 4, Triton": lambda: WindowAttnProcessor(
                *common, window_size=8, global_context=4, backend="triton"
            ),
            "sliding_window 7, Triton": lambda: SlidingWindowAttnProcessor(*common, kernel_size=7, backend="triton"),
            "sliding_window 7, flex": lambda: SlidingWindowAttnProcessor(*common, kernel_size=7, backend="flex"),
        }
    return made


class PixArtBlock(BasicTransformerBlock):
    """diffusers' block of PixArt, called as ours is."""

    def __init__(self):
        super().__init__(
            DIM,
            HEADS,
            HEAD_DIM,
            cross_attention_dim=DIM,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
        )

    def forward(self, hidden_states, modulation, grid, text):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden_states, encoder_hidden_states=text, timestep=modulation.flatten(1))


class SanaBlock(SanaTransformerBlock):
    """diffusers' block of SANA, called as ours is."""

    def __init__(self):
        super().__init__(
            DIM,
            num_attention_heads=DIM // 32,
            attention_head_dim=32,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=DIM,
            mlp_ratio=2.5,
        )

    def forward(self, hidden_states, modulation, grid, text):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden_states, None, text, None, modulation.flatten(1), *grid)


def modules(part: str, gpu: bool = False) -> dict[str, nn.Module]:
    """All that is compared, the identity first: our mixers, streamed windows, and two blocks of diffusers."""
    built: dict[str, nn.Module] = {name: build(make(), part) for name, make in mixers(gpu).items()}
    if part == "block":
        for name in [name for name in mixers() if name.startswith("window")]:
            block = build_block(mixers()[name]())
            block.set_streaming(True, None)
            built[f"{name}, streamed"] = block
    if part != "layer":
        built.update({"PixArt, diffusers": PixArtBlock(), "SANA, diffusers": SanaBlock()})
    return built


def build(mixer: TokenMixer, part: str) -> nn.Module:
    """The attention layer or the whole block around a mixer."""
    if part == "layer":
        return LocalDiTAttention(DIM, HEADS, HEAD_DIM, mixer)
    return build_block(mixer)


def build_block(mixer: TokenMixer) -> LocalDiTBlock:
    """A block of the released size around a mixer."""
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


def inputs(part: str, side: int, dtype: torch.dtype, device: str, batch: int = 1) -> tuple:
    """Random inputs of the layer or block for a square grid."""
    like = {"dtype": dtype, "device": device}
    tokens = torch.randn(batch, side * side, DIM, **like)
    if part == "layer":
        return tokens, (side, side)
    return tokens, torch.randn(batch, 6, DIM, **like), (side, side), torch.randn(batch, TEXT_TOKENS, DIM, **like)


def seconds(module: nn.Module, arguments: tuple, device: str, training: bool = False) -> float:
    """One forward pass, or in training one forward and backward pass."""
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        output = module(*arguments)
        if training:
            output.sum().backward()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def compare(
    part: str,
    side: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    chosen: list[str] | None = None,
    compiled: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each module, measured in turn, round after round, so that a drift of the machine meets all alike."""
    training = part == "training"
    built = modules(part, device != "cpu")
    compared = {name: module for name, module in built.items() if not chosen or name in ("identity", *chosen)}
    for module in compared.values():
        module.to(device, dtype).train(training)
        if compiled:
            module.compile()
    arguments = inputs(part, side, dtype, device)
    arguments[0].requires_grad_(training)  # as the output of the block before
    times: dict[str, list[float]] = {name: [] for name in compared}
    for repeat in range(repeats + 1):
        for name, module in compared.items():
            elapsed = seconds(module, arguments, device, training)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    return times


def compile_without_limit() -> None:
    """Have torch compile every row for every size, though all share their code, and raise where it does not."""
    settings = torch._dynamo.config
    settings.recompile_limit = settings.accumulated_recompile_limit = 1024
    settings.fail_on_recompile_limit_hit, settings.automatic_dynamic_shapes = True, False


def goal_of(part: str, name: str, side: int, dtype: str, device: str = "cpu") -> float | None:
    """The ratio to reach, or None where none is set."""
    if device != "cpu":
        aimed = (part, side, dtype) == ("block", 64, "bfloat16") and name.startswith("window")
        return GPU_GOAL if aimed else None
    if name.endswith("streamed") and side in STREAMED_GOALS:
        return STREAMED_GOALS[side] if dtype == "bfloat16" else None
    if side != 64:
        return None
    if part == "training":
        goal = goal_of("block", name, side, dtype) or goal_of("block", f"{name}, streamed", side, dtype)
        return None if goal is None else goal + TRAINING_ALLOWANCE
    return GOALS[part].get(name, (None, None))[dtype == "bfloat16"]


def verdict(measured: float, goal: float | None) -> str:
    """Whether a goal is reached, by the two digits after the point that are printed."""
    if goal is None:
        return ""
    return f"   goal {goal:.2f}: {'pass' if round(measured, 2) <= goal else 'falls short'}"


def report(part: str, side: int, dtype: str, device: str, times: dict[str, list[float]]) -> None:
    """Print the median, its ratio to the identity, the spread of the ratio over the rounds, and the goal."""
    print(f"\n{part}, {side} x {side} tokens, {dtype}")
    for name, measured in times.items():
        ratios = [mine / base for mine, base in zip(measured, times["identity"], strict=True)]
        goal = goal_of(part, name, side, dtype, device)
        print(
            f"  {name:30s} {1000 * median(measured):8.2f} ms   x {median(ratios):5.2f}   "
            f"({min(ratios):.2f} to {max(ratios):.2f}){verdict(median(ratios), goal)}"
        )


@torch.no_grad()
def extra_memory(part: str, name: str, side: int, dtype: str, device: str) -> float:
    """The most memory that one forward takes beside weights and input, in multiples of the input."""
    module = modules(part, device != "cpu")[name].to(device, DTYPES[dtype]).eval()
    small = inputs(part, 32, DTYPES[dtype], device)
    module(*small)  # what libraries keep for good
    arguments = inputs(part, side, DTYPES[dtype], device)
    before = forget_peak(device)
    module(*arguments)
    return (peak_memory(device) - before) / arguments[0].nbytes


def report_memory(part: str, side: int, dtype: str, device: str, chosen: list[str] | None) -> None:
    """Print each module's extra memory, measured in a process of its own."""
    print(f"\nextra memory of one forward, {part}, {side} x {side} tokens, {dtype}, in multiples of its input")
    for name in modules(part, device != "cpu"):
        if not chosen or name in ("identity", *chosen):
            multiple = apart(extra_memory, part, name, side, dtype, device)
            goal = MEMORY_GOALS.get(side) if name.endswith("streamed") else None
            print(f"  {name:30s} {multiple:8.1f}{verdict(multiple, goal)}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=counting_number, nargs="+", default=[32, 64], help="sides of the square grid, in tokens"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--part",
        nargs="+",
        default=["layer", "block"],
        choices=["layer", "block", "training"],
        help="training is a block's forward and backward",
    )
    parser.add_argument("--mixer", nargs="+", help="names of the rows to measure beside the identity; all by default")
    parser.add_argument("--memory", action="store_true", help="measure a forward's memory instead of its time")
    parser.add_argument("--compile", action="store_true", help="compile what is measured")
    parser.add_argument("--keep_freed_memory", action="store_true", help="as infer_t2i.py and the trainer do")
    parser.add_argument("--repeats", type=counting_number, default=5)
    parser.add_argument("--device", default=best_device())
    arguments = parser.parse_args()
    known = list({name: None for part in arguments.part for name in modules(part, arguments.device != "cpu")})
    for name in arguments.mixer or []:
        if name not in known:
            raise ValueError(f"--mixer {name!r} is not known; choose among {known}.")
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}")
    if arguments.keep_freed_memory:
        keep_freed_memory()
    if arguments.compile:
        compile_without_limit()
    for part, side, dtype in itertools.product(arguments.part, arguments.side, arguments.dtype):
        check_device(arguments.device, dtype)
        if arguments.memory:
            report_memory(part, side, dtype, arguments.device, arguments.mixer)
        else:
            measured = (part, side, DTYPES[dtype], arguments.device, arguments.repeats, arguments.mixer)
            report(part, side, dtype, arguments.device, compare(*measured, compiled=arguments.compile))


if __name__ == "__main__":
    run("localdit.benchmarks.attention", main)
