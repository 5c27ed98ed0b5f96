"""How the cost grows: measured for one block of the released size, and counted for whole pictures and trainings.

python -m localdit.benchmarks.scale --dtype bfloat16
python -m localdit.benchmarks.scale --part modelled --tflops 790 --utilisation 0.4 --dollars_per_hour 3

The model is arithmetic: multiply-adds of every matrix product and convolution, two operations each, over what a device
does in a second. Norms, activations, softmax and memory are in the utilisation, which is assumed unless measured.
"""

import argparse
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from localdit import LocalDiTTransformer2DModel
from localdit.benchmarks import plots
from localdit.benchmarks.attention import build, inputs, mixers, seconds, verdict
from localdit.command_line import (
    DTYPES,
    Parser,
    best_device,
    check_device,
    check_folder,
    counting_number,
    keep_freed_memory,
    run,
)
from localdit.mixers.base import TokenMixer
from localdit.mixers.full import FullAttnProcessor
from localdit.mixers.linear import LinearAttnProcessor
from localdit.mixers.sliding_window import SlidingWindowAttnProcessor, build_tiles
from localdit.mixers.ssm import BidirectionalSSMProcessor
from localdit.mixers.window import WindowAttnProcessor, build_window_layout

Grid = tuple[int, int]  # height and width in tokens

MODELS: dict[str, dict] = {
    "window 8": {"token_mixers": ("window",), "mixer_options": {"window": {"window_size": 8}}},
    "full": {"token_mixers": ("full",)},
}
FLAT = 1.05  # a token of a local mixer, or of a linear one, is to take so much of the first size's time at most
PLOT = "scale.png"
PIXELS_PER_TOKEN = 16  # along one side: 8 of the autoencoder, 2 of the patch
TEXT_TOKENS = 120

# Flan-T5-XXL's encoder (config.json of google/flan-t5-xxl): 24 layers, width 4096, gated feed-forward of 10240
T5_PER_TOKEN = 24 * (4 * 4096**2 + 3 * 4096 * 10240)
# of stabilityai/sdxl-vae
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_TILE = 1024  # pixels; larger pictures are decoded in tiles of that side, whose overlap is left out

# Pictures that PixArt-alpha saw with captions, steps x batch (arXiv 2310.00426, table 4), by their side in pixels
STAGES = {256: (150_000 + 90_000) * 178 * 64, 512: 100_000 * 40 * 64, 1024: 16_000 * 12 * 32}
PASSES = 3  # a training step is a forward pass and a backward pass of twice its work


def matrices(module: nn.Module) -> int:
    """Multiply-adds of one token that goes through all linear maps and convolutions of a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def mixing(mixer: TokenMixer, grid: Grid) -> int:
    """Multiply-adds of a mixer on one grid, beside the linear maps that every token goes through."""
    tokens = grid[0] * grid[1]
    width = mixer.num_attention_heads * mixer.attention_head_dim
    if isinstance(mixer, FullAttnProcessor):
        return 2 * width * tokens**2  # scores and weighted sums
    if isinstance(mixer, WindowAttnProcessor):
        cells = min(mixer.global_context, grid[0]) * min(mixer.global_context, grid[1])
        windows = build_window_layout(*grid, mixer.window_size, mixer.shift).shapes
        pairs = sum(window.count * window.tokens * (window.tokens + cells) for window in windows)
        return 2 * width * pairs + 3 * width**2 * cells
    if isinstance(mixer, SlidingWindowAttnProcessor):
        tiles, _ = build_tiles(*grid, mixer.kernel_size, mixer.dilation)
        return 2 * width * sum(group.queries.numel() * group.keys.shape[1] for group in tiles)
    if isinstance(mixer, LinearAttnProcessor):
        return tokens * width * (2 * mixer.attention_head_dim + 1)  # state, its reading, and the normaliser
    if isinstance(mixer, BidirectionalSSMProcessor):
        block = math.ceil((tokens * mixer.hourglass_ratio) ** 0.5)
        return 2 * width * block**2 * mixer.kernel.frequency.shape[1] * 2  # the kernels; the FFT is not counted
    return 0  # no mixing


def block_multiply_adds(block: Any, grid: Grid, text_tokens: int) -> int:
    """Multiply-adds of a block for one picture."""
    tokens, mixer = grid[0] * grid[1], block.attn.get_processor()
    total = tokens * (matrices(block.attn) + matrices(block.ff)) + mixing(mixer, grid)
    if block.cross_attn is not None:
        cross = block.cross_attn
        width = cross.to_q.out_features
        total += tokens * (matrices(cross.to_q) + matrices(cross.to_out) + 2 * width * text_tokens)
        total += text_tokens * (matrices(cross.to_k) + matrices(cross.to_v))
    return total


def multiply_adds(model: Any, grid: Grid, text_tokens: int = 0) -> int:
    """Multiply-adds of one forward pass of one picture, all that `FlopCounterMode` counts, without running it."""
    tokens, condition = grid[0] * grid[1], model.adaln_single
    total = sum(block_multiply_adds(block, grid, text_tokens) for block in model.transformer_blocks)
    total += tokens * (matrices(model.pos_embed) + matrices(model.proj_out)) + matrices(condition)
    if model.caption_projection is not None:
        total += text_tokens * matrices(model.caption_projection)
    if model.use_additional_conditions:
        total += matrices(condition.emb.resolution_embedder)  # height and width, one after the other
    return total


@lru_cache
def autoencoder_flops(pixels: int, way: str) -> float:
    """Floating-point operations of `way`, "encode" or "decode", for a square picture."""
    side = min(pixels, VAE_TILE)
    shape = {"encode": (1, 3, side, side), "decode": (1, 4, side // 8, side // 8)}[way]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        getattr(AutoencoderKL(**VAE), way)(torch.empty(shape))
    return counter.get_total_flops() * (pixels / side) ** 2


def released_size(name: str) -> LocalDiTTransformer2DModel:
    """The transformer of 0.4B parameters with the mixers of that name, without any weights."""
    with torch.device("meta"):
        return LocalDiTTransformer2DModel(**MODELS[name])


def forward_flops(model: LocalDiTTransformer2DModel, pixels: int) -> float:
    """Floating-point operations of a forward pass of a square picture."""
    side = pixels // PIXELS_PER_TOKEN
    return 2 * multiply_adds(model, (side, side), TEXT_TOKENS)


@dataclass(frozen=True)
class Device:
    """What computing costs.

    Args:
        tflops: 10^12 dense operations that the device can do in a second.
        utilisation: share of them that is reached, in (0, 1].
        dollars_per_hour: its price.
    """

    tflops: float
    utilisation: float
    dollars_per_hour: float

    def hours(self, flops: float) -> float:
        return flops / (self.tflops * self.utilisation * 1e12) / 3600


def picture_flops(model: LocalDiTTransformer2DModel, pixels: int, steps: int) -> float:
    """Operations of a square picture: guided steps, a text and the empty one, and the decoding."""
    texts = 2 * TEXT_TOKENS * 2 * T5_PER_TOKEN
    return steps * 2 * forward_flops(model, pixels) + texts + autoencoder_flops(pixels, "decode")


def report_pictures(device: Device, sizes: list[int], steps: int) -> None:
    """Print what pictures of some sizes cost."""
    print(
        f"\nA picture: {steps} steps with guidance, T5-XXL on two texts, SDXL's decoder (in tiles above {VAE_TILE} px)"
    )
    print(" pixels  tokens     mixers  TFLOP a step  a picture  an hour  dollars for 1000")
    models = {name: released_size(name) for name in MODELS}
    for pixels in sizes:
        for name, model in models.items():
            picture = picture_flops(model, pixels, steps)
            hours = device.hours(picture)
            print(
                f"{pixels:7d} {(pixels // PIXELS_PER_TOKEN) ** 2:7d} {name:>10s} "
                f"{2 * forward_flops(model, pixels) / 1e12:13.2f} {picture / 1e12:10.1f} {1 / hours:8.0f} "
                f"{1000 * hours * device.dollars_per_hour:17.2f}"
            )


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        name: what is done.
        mixers: whose, or "" for the frozen networks.
        pictures: how many go through it.
        flops: operations of each.
    """

    name: str
    mixers: str
    pictures: float
    flops: float


def training_stages(pairs: float, epochs: list[float]) -> list[Stage]:
    """All stages of a training on `pairs`, so many epochs each; the frozen networks see each pair once a stage."""
    models = {name: released_size(name) for name in MODELS}
    stages = [Stage("T5-XXL, once", "", pairs, 2 * TEXT_TOKENS * T5_PER_TOKEN)]
    for pixels, epoch in zip(STAGES, epochs, strict=True):
        once = min(1.0, epoch) * pairs
        stages.append(Stage(f"{pixels} px, encoder, once", "", once, autoencoder_flops(pixels, "encode")))
        for name, model in models.items():
            stages.append(Stage(f"{pixels} px", name, epoch * pairs, PASSES * forward_flops(model, pixels)))
    return stages


def report_training(device: Device, pairs: float, epochs: list[float]) -> None:
    """Print the price of a training, stage by stage."""
    print(f"\nTraining on {pairs / 1e6:g}M pairs, a step being {PASSES} forward passes")
    print("                 stage     mixers  epochs  pictures  GFLOP each  GPU-hours  dollars")
    stages = training_stages(pairs, epochs)
    for stage in stages:
        hours = device.hours(stage.pictures * stage.flops)
        print(
            f"{stage.name:>22s} {stage.mixers:>10s} {stage.pictures / pairs:7.2f} {stage.pictures:9.3g} "
            f"{stage.flops / 1e9:11.0f} {hours:10.0f} {hours * device.dollars_per_hour:8.0f}"
        )
    for name in MODELS:
        hours = device.hours(sum(stage.pictures * stage.flops for stage in stages if stage.mixers in ("", name)))
        print(f"{'all':>22s} {name:>10s} {'':29s} {hours:10.0f} {hours * device.dollars_per_hour:8.0f}")


@dataclass
class Growth:
    """Measured seconds of a block, round after round, and its multiply-adds, for so many tokens in all."""

    tokens: int
    work: int
    seconds: list[float] = field(default_factory=list)


def batched(arguments: tuple, batch: int) -> tuple:
    """A block's inputs for one picture, as those of `batch` pictures."""
    return tuple(part.repeat(batch, 1, 1) if isinstance(part, torch.Tensor) else part for part in arguments)


def measure(
    makers: dict[str, Callable[[], TokenMixer]],
    sizes: list[tuple[int, int]],
    longest: float,
    dtype: torch.dtype,
    device: str,
    repeats: int,
) -> dict[tuple[str, int, int], Growth]:
    """Times by mixer, side of the grid and batch, in turn, round after round.

    Args:
        makers: of the mixers, by name.
        sizes: pairs of side and batch; the first warms up and tells how long the others would take.
        longest: seconds; what would take longer, were it as fast as the first size, is left out.
        dtype, device: of the block and its inputs.
        repeats: rounds.
    """
    blocks = {name: build(make(), "block").to(device, dtype).eval() for name, make in makers.items()}
    given = {size: batched(inputs("block", size[0], dtype, device), size[1]) for size in sizes}
    results: dict[tuple[str, int, int], Growth] = {}
    for name, block in blocks.items():
        work = {
            (side, batch): batch * block_multiply_adds(block, (side, side), text_tokens=given[side, batch][3].shape[1])
            for side, batch in sizes
        }
        once = min(seconds(block, given[sizes[0]], device) for _ in range(2))
        for side, batch in sizes:
            if (side, batch) == sizes[0] or once * work[side, batch] / work[sizes[0]] <= longest:
                results[name, side, batch] = Growth(batch * side * side, work[side, batch])
    for _ in range(repeats):
        for (name, side, batch), growth in results.items():
            growth.seconds.append(seconds(blocks[name], given[side, batch], device))
    return results


def growth_ratios(
    results: dict[tuple[str, int, int], Growth], name: str, size: tuple[int, int], first: tuple[int, int]
) -> list[float]:
    """Time of a token over that at the first size, round by round."""
    growth, base = results[name, *size], results[name, *first]
    return [
        (mine / growth.tokens) / (other / base.tokens) for mine, other in zip(growth.seconds, base.seconds, strict=True)
    ]


def report(results: dict[tuple[str, int, int], Growth], first: tuple[int, int]) -> None:
    """Print the time of a token, and how it and the counted work of a token grew from the first size."""
    print(f"\nOne block: time of a token, and its growth over {first[0]} x {first[0]} tokens at batch {first[1]}")
    print("mixer                   side  batch  us a token         growth (spread)   work  GFLOP/s")
    for (name, side, batch), growth in results.items():
        base = results[name, *first]
        ratios = growth_ratios(results, name, (side, batch), first)
        work = (growth.work / growth.tokens) / (base.work / base.tokens)
        usual = median(growth.seconds)
        goal = FLAT if name.startswith(("window", "sliding_window", "linear")) and batch == first[1] else None
        print(
            f"{name:22s} {side:5d} {batch:6d} {1e6 * usual / growth.tokens:11.1f}   "
            f"x {median(ratios):5.2f} ({min(ratios):5.2f} to {max(ratios):5.2f}) {work:6.2f} "
            f"{2 * growth.work / usual / 1e9:8.1f}{verdict(median(ratios), goal)}"
        )


def plot(results: dict[tuple[str, int, int], Growth], first: tuple[int, int], folder: Path) -> Path:
    """Write `folder/scale.png`: how the time of a token grows with the grid, mixer by mixer."""
    figure, panel = plots.panels(1)
    lines: dict[str, dict[int, float]] = {}
    for name, side, batch in results:
        if batch == first[1]:
            lines.setdefault(name, {})[side] = median(growth_ratios(results, name, (side, batch), first))
    for name, line in lines.items():
        panel.plot(list(line), list(line.values()), marker="o", label=name)
    panel.set(title="time of a token in one block", xlabel="tokens along a side", ylabel=f"over that at {first[0]}")
    panel.set_xscale("log")
    panel.set_ylim(bottom=0)
    ticks = sorted({side for line in lines.values() for side in line})
    panel.set_xticks(ticks, [str(side) for side in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    return plots.write(figure, folder / PLOT)


def options_of_command_line() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["measured", "modelled"], choices=["measured", "modelled"])
    group = parser.add_argument_group("measured")
    group.add_argument("--mixers", nargs="+", default=list(mixers()), choices=list(mixers()))
    group.add_argument("--side", type=counting_number, nargs="+", default=[32, 64, 128, 256], help="of the square grid")
    group.add_argument("--batch", type=counting_number, nargs="+", default=[1, 2, 4, 8], help="at the first side")
    group.add_argument(
        "--longest", type=float, default=30.0, help="seconds of a pass; what would take more is left out"
    )
    group.add_argument("--keep_freed_memory", action="store_true", help="as infer_t2i.py and the trainer do")
    group.add_argument("--repeats", type=counting_number, default=3)
    group.add_argument("--dtype", default="float32" if best_device() == "cpu" else "bfloat16", choices=list(DTYPES))
    group.add_argument("--device", default=best_device())
    group.add_argument("--output", type=Path, help=f"folder for the plot, {PLOT}")
    group = parser.add_argument_group("modelled")
    group.add_argument("--pixels", type=counting_number, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    group.add_argument("--steps", type=counting_number, default=20)
    group.add_argument("--pairs", type=float, default=40e6, help="of picture and caption")
    group.add_argument("--epochs", type=float, nargs=3, help="at 256, 512, 1024 px; by default PixArt-alpha's pictures")
    group.add_argument("--tflops", type=float, default=790, help="of the device; an H200 in bf16, as measured")
    group.add_argument("--utilisation", type=float, default=0.4, help="share of them that is reached: assumed")
    group.add_argument("--dollars_per_hour", type=float, default=3.0, help="price of the device: assumed")
    options = parser.parse_args()
    check_device(options.device, options.dtype)
    if options.output is not None:
        check_folder("--output", options.output)
    numbers = [options.pairs, *(options.epochs or ()), options.tflops, options.utilisation, options.dollars_per_hour]
    if not all(0 < number < math.inf for number in numbers) or options.utilisation > 1:
        raise ValueError(
            f"--pairs, --epochs, --tflops, --utilisation and --dollars_per_hour are {numbers}; give numbers above 0, "
            "and a --utilisation of 1 at most."
        )
    if wrong := [pixels for pixels in options.pixels if pixels % PIXELS_PER_TOKEN]:
        raise ValueError(f"--pixels {wrong[0]} is not a multiple of {PIXELS_PER_TOKEN}, the side of a token.")
    return options


def main() -> None:
    options = options_of_command_line()
    if options.keep_freed_memory:
        keep_freed_memory()
    if "measured" in options.part:
        threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
        print(f"torch {torch.__version__}, {options.device}, {threads}, {options.dtype}, {options.repeats} rounds")
        first, *batches = options.batch
        sizes = [(side, first) for side in options.side] + [(options.side[0], batch) for batch in batches]
        makers = {name: make for name, make in mixers().items() if name in options.mixers}
        dtype = DTYPES[options.dtype]
        results = measure(makers, sizes, options.longest, dtype, options.device, options.repeats)
        report(results, sizes[0])
        if options.output is not None:
            print(f"\n{plot(results, sizes[0], options.output)}")
    if "modelled" in options.part:
        device = Device(options.tflops, options.utilisation, options.dollars_per_hour)
        print(
            f"\n{device.tflops:g} TFLOP/s, of which {device.utilisation:.0%} are taken to be reached, "
            f"at {device.dollars_per_hour:g} dollars an hour"
        )
        report_pictures(device, options.pixels, options.steps)
        epochs = options.epochs or [pictures / options.pairs for pictures in STAGES.values()]
        report_training(device, options.pairs, epochs)


if __name__ == "__main__":
    run("localdit.benchmarks.scale", main)
