"""Time of whole transformers, one guided step of a picture: ours beside those of PixArt-Sigma and SANA.

python -m localdit.benchmarks.transformers --size 1024 2048 4096 --batch 1 8 --dtype bfloat16

Weights are random, in the published configurations; the layers differ in number, so the speed per layer is told, too.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import ModelMixin, PixArtTransformer2DModel, SanaTransformer2DModel
from diffusers.utils import logging

from localdit import LocalDiTTransformer2DModel
from localdit.benchmarks.attention import compile_without_limit
from localdit.benchmarks.memory import forget_peak, gibibytes, peak_memory
from localdit.command_line import DTYPES, Parser, best_device, check_device, counting_number, run

TEXT_TOKENS = 300
# speed per layer of our windows against PixArt-Sigma's, to be reached on a GPU in bf16, by pixels along a side
GOALS = {1024: 1.6, 2048: 3.0, 4096: 8.0}


@dataclass(frozen=True)
class Contestant:
    """A transformer, and how many pixels one of its latents stands for along a side."""

    build: Callable[..., Any]
    pixels: int
    streams: bool = False


def windows(num_layers: int | None, **options: Any) -> LocalDiTTransformer2DModel:
    """The released size with windows of 8 x 8 tokens."""
    return LocalDiTTransformer2DModel(
        num_layers=num_layers or 18, mixer_options={"window": {"window_size": 8, **options}}
    )


def pixart(num_layers: int | None) -> PixArtTransformer2DModel:
    """PixArt-Sigma-XL-2-1024-MS."""
    return PixArtTransformer2DModel(
        num_layers=num_layers or 28, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
    )


def sana(num_layers: int | None) -> SanaTransformer2DModel:
    """SANA 600M for 1024 pixels, whose autoencoder leaves a quarter of the tokens."""
    return SanaTransformer2DModel(
        num_layers=num_layers or 28,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    )


CONTESTANTS = {
    "PixArt-Sigma": Contestant(pixart, 8),
    "SANA 0.6B": Contestant(sana, 32),
    "LocalDiT, windows": Contestant(windows, 8),
    "LocalDiT, windows, streamed": Contestant(windows, 8, streams=True),
    "LocalDiT, windows + context 4": Contestant(partial(windows, global_context=4), 8),
    "LocalDiT, windows, Triton": Contestant(partial(windows, backend="triton"), 8),  # on a CPU as without
}


def inputs(model: ModelMixin, contestant: Contestant, size: int, batch: int) -> dict[str, Any]:
    """What a guided step gives the model for so many pictures of size x size pixels: twice as many rows."""
    config: Any = model.config
    like = {"dtype": model.dtype, "device": model.device}
    rows, side = 2 * batch, size // contestant.pixels
    arguments: dict[str, Any] = {
        "hidden_states": torch.randn(rows, config.in_channels, side, side, **like),
        "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, config.caption_channels, **like),
        "timestep": torch.full((rows,), 500, device=model.device),
        "encoder_attention_mask": torch.ones(rows, TEXT_TOKENS, device=model.device),
    }
    if getattr(model, "use_additional_conditions", False):
        ratio = torch.ones(1, 1, **like)
        arguments["added_cond_kwargs"] = {"resolution": ratio.expand(1, 2) * size, "aspect_ratio": ratio}
    elif isinstance(model, PixArtTransformer2DModel):
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return arguments


@torch.no_grad()
def seconds(model: Callable, arguments: dict[str, Any], device: str) -> float:
    """One step."""
    start = time.perf_counter()
    model(**arguments)
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def load(contestant: Contestant, num_layers: int | None, dtype: str, device: str, compiled: bool) -> Any:
    """The transformer with random weights."""
    with torch.device(device):
        model = contestant.build(num_layers).to(DTYPES[dtype]).eval()
    if contestant.streams:
        model.enable_window_streaming()
    if compiled:
        model.compile_repeated_blocks()
    return model


def compare(
    models: dict[str, Any], size: int, batch: int, device: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each model, in turn, round after round, and the bytes that one step takes beside the weights."""
    times: dict[str, list[float]] = {name: [] for name in models}
    peaks = {}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            given = inputs(model, CONTESTANTS[name], size, batch)
            before = forget_peak(device) if not repeat else 0
            elapsed = seconds(model, given, device)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
            else:
                peaks[name] = peak_memory(device) - before
    return times, peaks


def report(
    size: int, batch: int, steps: int, layers: dict[str, int], times: dict[str, list[float]], peaks: dict[str, int]
) -> None:
    """Print a step's time and what follows of it; the goal is of the windows' speed per layer."""
    print(f"\n{size} x {size} pixels, {batch} at a time, guided")
    rival = median(times["PixArt-Sigma"]) / layers["PixArt-Sigma"]
    for name, measured in times.items():
        step = median(measured)
        speed = rival / (step / layers[name])
        goal = GOALS.get(size) if name in ("LocalDiT, windows", "LocalDiT, windows, Triton") else None
        verdict = "" if goal is None else f"   goal {goal:.1f}: {'pass' if speed >= goal else 'falls short'}"
        print(
            f"  {name:30s} {1000 * step:9.1f} ms a step ({1000 * min(measured):.1f} to {1000 * max(measured):.1f})   "
            f"{batch / (steps * step):9.3f} pictures/s in {steps} steps   peak {gibibytes(peaks[name])}   "
            f"per layer {speed:5.2f} x PixArt-Sigma{verdict}"
        )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=counting_number, nargs="+", default=[1024], help="pixels along a side")
    parser.add_argument("--batch", type=counting_number, nargs="+", default=[1], help="pictures at a time")
    parser.add_argument("--steps", type=counting_number, default=20, help="steps of a picture, to tell pictures/s")
    parser.add_argument("--layers", type=counting_number, help="build so many instead of the published number")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of all transformers")
    parser.add_argument("--repeats", type=counting_number, default=5)
    parser.add_argument("--device", default=best_device())
    arguments = parser.parse_args()
    check_device(arguments.device, arguments.dtype)
    for size in arguments.size:
        if size % 32:
            raise ValueError(f"--size {size} is not a multiple of 32 pixels, a latent of SANA; choose one.")
    where = f"{torch.get_num_threads()} threads, {platform.machine()}"
    if arguments.device != "cpu":
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else arguments.device
    logging.set_verbosity_error()  # of what a cast may cost, which random weights do not feel
    print(f"torch {torch.__version__}, {where}, {arguments.dtype}{', compiled' if arguments.compile else ''}")
    if arguments.compile:
        compile_without_limit()
    models = {
        name: load(contestant, arguments.layers, arguments.dtype, arguments.device, arguments.compile)
        for name, contestant in CONTESTANTS.items()
    }
    layers = {name: len(model.transformer_blocks) for name, model in models.items()}
    for size, batch in itertools.product(arguments.size, arguments.batch):
        times, peaks = compare(models, size, batch, arguments.device, arguments.repeats)
        report(size, batch, arguments.steps, layers, times, peaks)


if __name__ == "__main__":
    run("localdit.benchmarks.transformers", main)
