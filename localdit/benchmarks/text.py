"""What it saves to do a text's work once: `python -m localdit.benchmarks.text`.

Takes turns, round after round: a generation as the pipelines do it, and with one saving after the other left out.
Weights are random, of the sizes that --config and --text_encoder name; nothing is decoded.
"""

import argparse
import inspect
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from diffusers.utils import logging as diffusers_logging

from localdit import LocalDiTTransformer2DModel
from localdit.benchmarks.pipeline import (
    CONFIGS,
    TEXT_ENCODERS,
    TEXT_TOKENS,
    TILE,
    Settings,
    build_pipeline,
    build_text_encoder,
)
from localdit.command_line import DTYPES, Parser, best_device, check_device, counting_number, run

PROMPT = "a red seven to the left of a blue three on a white background"
PLAIN = "as it is"
PATCH = 2  # latents along a token's side

Switch = Callable[[Any], AbstractContextManager]


@dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        switches: what turns savings of a pipeline off.
        distinct: whether no two pictures have the same prompts.
        base: the way that this one is told as a ratio to.
    """

    switches: tuple[Switch, ...] = ()
    distinct: bool = False
    base: str = PLAIN


def read_every_step(pipeline: Any) -> AbstractContextManager:
    """Project the text, to keys and values too, in every step."""
    return mock.patch.object(pipeline.transformer, "keep_text_states", nullcontext)


def keep_padding(pipeline: Any) -> AbstractContextManager:
    """Leave texts as long as they may be."""
    module = inspect.getmodule(pipeline.transformer_conditions)
    return mock.patch.object(module, "_rounded_up", lambda length, longest: longest)


def halve(pipeline: Any) -> AbstractContextManager:
    """Run the two halves of a guided step one after the other."""
    forward = pipeline.transformer.forward

    def forward_twice(hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor]:
        batch = len(hidden_states)

        def half(value: Any, number: int) -> Any:
            rows = isinstance(value, torch.Tensor) and len(value) == batch
            return value.chunk(2)[number] if rows else value

        parts = [
            forward(half(hidden_states, number), **{name: half(value, number) for name, value in arguments.items()})[0]
            for number in range(2)
        ]
        return (torch.cat(parts),)

    return mock.patch.object(pipeline.transformer, "forward", forward_twice)


WAYS = {
    PLAIN: Way(),
    "each picture's text encoded": Way(distinct=True),
    "texts padded to their limit": Way((keep_padding,)),
    "texts read in every step": Way((read_every_step,)),
    "and guidance in two batches": Way((read_every_step, halve), base="texts read in every step"),
}


def build(settings: Settings) -> Any:
    """A pipeline without a VAE, which counts sizes in latents; its transformer reads what its text encoder writes."""
    text_encoder = build_text_encoder(settings)
    config = {**CONFIGS[settings.config][0], "caption_channels": text_encoder.config.d_model}
    transformer = LocalDiTTransformer2DModel(**config)
    pipeline = build_pipeline(settings, text_encoder=text_encoder, transformer=transformer)
    return pipeline.to(device=settings.device, dtype=DTYPES[settings.dtype])


def seconds(pipeline: Any, way: Way, side: int, pictures: int, settings: Settings) -> float:
    """One generation of so many pictures of `side` x `side` latents."""
    numbers = [f" {number}" if way.distinct else "" for number in range(pictures)]
    with ExitStack() as stack:
        for switch in way.switches:
            stack.enter_context(switch(pipeline))
        start = time.perf_counter()
        pipeline(
            [PROMPT + number for number in numbers],
            negative_prompt=["blurred" + number for number in numbers],
            height=side,
            width=side,
            num_inference_steps=settings.steps,
            output_type="latent",
        )
        if settings.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start


def compare(side: int, pictures: int, settings: Settings) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns, after one round to warm up."""
    pipeline = build(settings)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(settings.repeats + 1):
        for name, way in WAYS.items():
            elapsed = seconds(pipeline, way, side, pictures, settings)
            if turn:
                times[name].append(elapsed)
    return times


def report(side: int, times: dict[str, list[float]]) -> None:
    """Print the median of each way, and by how much it is slower than the one it is compared to."""
    print(f"\n{side} x {side} latents")
    for name, mine in times.items():
        base = WAYS[name].base
        ratios = [own / other for own, other in zip(mine, times[base], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        told = "" if name == PLAIN else f"   x {median(ratios):.2f} ({spread}) of {base!r}"
        print(f"  {name:28s} {median(mine):8.2f} s{told}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=counting_number, nargs="+", default=[32, 64], help="sides of the picture, in latents"
    )
    parser.add_argument("--pictures", type=counting_number, default=4, help="of a batch, all of the same prompt")
    parser.add_argument("--config", default="small", choices=CONFIGS, help="transformer")
    parser.add_argument("--text_encoder", default="base", choices=TEXT_ENCODERS, help="of Flan-T5; the released is xxl")
    parser.add_argument("--steps", type=counting_number, default=20)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeats", type=counting_number, default=3)
    parser.add_argument("--device", default=best_device())
    arguments = vars(parser.parse_args())
    sides, pictures = arguments.pop("side"), arguments.pop("pictures")
    settings = Settings(**arguments, tile=TILE)
    check_device(settings.device, settings.dtype)
    for side in sides:
        if side % PATCH:
            raise ValueError(f"--side {side} is not a multiple of {PATCH} latents (one token); choose one.")
    diffusers_logging.set_verbosity_error()  # of what a cast may cost, which random weights do not feel
    print(
        f"torch {torch.__version__}, {settings.device}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"{settings.dtype}, {settings.steps} steps, {pictures} pictures, texts of {len(PROMPT.split())} tokens of "
        f"{TEXT_TOKENS}, random weights of the config {settings.config} and of Flan-T5 {settings.text_encoder}"
    )
    for side in sides:
        report(side, compare(side, pictures, settings))


if __name__ == "__main__":
    run("localdit.benchmarks.text", main)
