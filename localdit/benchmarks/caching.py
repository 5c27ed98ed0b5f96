"""Speed-up by diffusers' caches against what they change in the picture: `python -m localdit.benchmarks.caching`.

Every round draws one prompt from one seed, without a cache and with each in turn, by a whole call of the pipeline.
Fewer steps without a cache are there too: a cache is worth its while where it changes less for the same speed.
"""

import argparse
import ast
import contextlib
import io
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging

from localdit import LocalDiTPipeline
from localdit.command_line import (
    DTYPES,
    Parser,
    best_device,
    check_device,
    counting_number,
    load_pipeline,
    run,
    seed_number,
)

CAPTIONS = Path(__file__).parents[1] / "data" / "digit_scenes_held_out.txt"
PLAIN = "no cache"

WHAT_THEY_DO = {
    "first block": "runs the first block of every step; where what that adds differs from the last time by less than\n"
    "the threshold (relative), what the other blocks added then is added again in their place",
    "taylorseer": "runs every attention (lite: all the blocks) in each n-th step only, the first three apart, and in\n"
    "between extrapolates what it gave (lite: what the model gave) by a Taylor series over the steps",
    "mag": "after a fifth of the steps adds, at most three times in a row, what all blocks added last, while the\n"
    "change that a calibration run found in its length from step to step sums up to less than the threshold",
    "faster": "below timestep 641 runs the guidance's unconditional half in each n-th step only, and guesses it from\n"
    "the other half's spectrum in between, where every second attention is extrapolated as well",
    "pyramid": "keeps what an attention gave and runs it in each n-th step only, between timesteps 100 and 800 or in\n"
    "all; self-attention and attention to the text each have their n",
}


@dataclass
class Measured:
    """What was measured of one setting, drawing by drawing.

    Attributes:
        seconds: of the whole call, by the clock.
        processor: seconds that the processor worked for it, which says more where it works for others too.
        pictures: 8-bit values as floats, [height, width, 3] each.
        mixed, fed: elements of the tokens that went through the mixers and the feed-forwards.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    mixed: int = 0
    fed: int = 0


def caches(pipe: DiffusionPipeline, steps: int, mag_ratios: list[float]) -> dict[str, Any]:
    """The compared caches by name; a first block whose threshold is 0 never skips, so it shows what hooks cost."""
    timestep: dict[str, Any] = {"current_timestep_callback": lambda: pipe.current_timestep}
    faster = {"tensor_format": "BCHW", "attention_weight_callback": lambda _: 0.5, **timestep}
    found: dict[str, Any] = {}
    for threshold in (0.0, 0.05, 0.1, 0.2, 0.4):
        found[f"first block, threshold {threshold:g}"] = FirstBlockCacheConfig(threshold)
    for interval in (2, 3, 5):
        found[f"taylorseer, every {interval}"] = TaylorSeerCacheConfig(interval)
    found["taylorseer, every 2, lite"] = TaylorSeerCacheConfig(2, use_lite_mode=True)
    for threshold in (0.01, 0.03, 0.06):
        found[f"mag, threshold {threshold:g}"] = MagCacheConfig(
            threshold, num_inference_steps=steps, mag_ratios=mag_ratios
        )
    for interval in (2, 5):
        found[f"faster, every {interval}"] = FasterCacheConfig(unconditional_batch_skip_range=interval, **faster)
    pyramids: dict[str, dict[str, Any]] = {
        "self 2": {},
        "self 2, all timesteps": {"spatial_attention_timestep_skip_range": (-1, 1001)},
        "self 2, text 3": {"cross_attention_block_skip_range": 3},
    }
    for name, more in pyramids.items():
        found[f"pyramid, {name}"] = PyramidAttentionBroadcastConfig(2, **more, **timestep)
    return found


@contextlib.contextmanager
def enabled(transformer: Any, config: Any) -> Iterator[None]:
    """The transformer with a cache, or without one for None."""
    if config is not None:
        transformer.enable_cache(config)
    try:
        yield
    finally:
        if config is not None:
            transformer.disable_cache()


@contextlib.contextmanager
def counted(transformer: Any, measured: Measured) -> Iterator[None]:
    """Add to `measured` the tokens that come to the mixers and feed-forwards."""

    def mix(_: Any, inputs: tuple, __: Any) -> None:
        measured.mixed += inputs[1].numel()  # after the attention that the mixer belongs to

    def feed(_: Any, inputs: tuple, __: Any) -> None:
        measured.fed += inputs[0].numel()

    blocks = transformer.transformer_blocks
    hooks = [block.attn.get_processor().register_forward_hook(mix) for block in blocks]
    hooks += [block.ff.register_forward_hook(feed) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw(pipe: Any, config: Any, prompt: str, seed: int, steps: int, measured: Measured) -> None:
    """Draw a picture with a cache, or without one for None, and note it in `measured`."""
    generator = torch.Generator().manual_seed(seed)
    with enabled(pipe.transformer, config), counted(pipe.transformer, measured):
        start, worked = time.perf_counter(), time.process_time()
        image = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt").images[0]
        picture = (image.float().cpu() * 255).round().permute(1, 2, 0)  # which waits for the device
        measured.seconds.append(time.perf_counter() - start)
        measured.processor.append(time.process_time() - worked)
    measured.pictures.append(picture)


def calibrated(pipe: Any, prompt: str, seed: int, steps: int) -> list[float]:
    """The ratios that MagCache wants of a model and its sampler, which its calibration prints and gives by no call."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        draw(pipe, MagCacheConfig(num_inference_steps=steps, calibrate=True), prompt, seed, steps, Measured())
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    ratios = ast.literal_eval(lines[-1]) if lines else []
    if len(ratios) != steps:
        raise ValueError(
            f"The calibration of MagCache saw {len(ratios)} calls of the transformer in {steps} steps; "
            "compare with a sampler that makes one call a step."
        )
    return ratios


def compare(
    pipe: Any, prompts: list[str], steps: int, seed: int, repeats: int, chosen: Callable[[str], bool] = lambda _: True
) -> dict[str, Measured]:
    """What each setting takes and draws, in turn, prompt after prompt; the last prompt calibrates and warms up.

    Args:
        pipe: a `LocalDiTPipeline`.
        prompts: two at least; number i is drawn from seed + i.
        steps: of the sampler.
        seed: of the first prompt's picture.
        repeats: rounds of each prompt.
        chosen: which caches to compare with none, by name.
    """
    *prompts, other = prompts
    configs = caches(pipe, steps, calibrated(pipe, other, seed + len(prompts), steps))
    fewer = {f"{PLAIN}, {count} steps": (None, count) for count in (3 * steps // 4, steps // 2) if 0 < count < steps}
    settings = {PLAIN: (None, steps), **fewer}
    settings |= {name: (config, steps) for name, config in configs.items() if chosen(name)}
    results = {name: Measured() for name in settings}
    rounds = [(other, len(prompts)), *((prompt, number) for number, prompt in enumerate(prompts))]
    for number, (prompt, place) in enumerate(rounds[:1] + rounds[1:] * repeats):
        # forwards and backwards, so that none always comes after the same one
        for name, (config, count) in list(settings.items())[:: -1 if number % 2 else 1]:
            draw(pipe, config, prompt, seed + place, count, results[name] if number else Measured())  # 0 warms up
    return results


def noise_ratio(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise ratio of 8-bit values in dB; infinite where they are the same."""
    error = (picture - reference).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def decibels(ratio: float) -> str:
    return "same" if ratio == math.inf else f"{ratio:.1f}"


def report(results: dict[str, Measured]) -> None:
    """Print the table: speed, how much of the work was done, and how far the pictures are from the uncached ones."""
    plain = results[PLAIN]
    print("\n                                    speed-up (spread)    CPU  mixers   MLPs  PSNR (worst)  |change|")
    for name, mine in results.items():
        speed = [base / own for base, own in zip(plain.seconds, mine.seconds, strict=True)]
        processor = [base / own for base, own in zip(plain.processor, mine.processor, strict=True)]
        pairs = list(zip(mine.pictures, plain.pictures, strict=True))
        ratios = [noise_ratio(*pair) for pair in pairs]
        change = mean((own - base).abs().mean().item() for own, base in pairs)
        psnr = f"{decibels(median(ratios))} ({decibels(min(ratios))})"
        print(
            f"{name:30s} {median(speed):7.2f} ({min(speed):.2f} to {max(speed):.2f}) {median(processor):6.2f}  "
            f"{mine.mixed / plain.mixed:6.0%} {mine.fed / plain.fed:6.0%}  {psnr:>12s}  {change:8.2f}"
        )
    print(
        "\nspeed-up: of the call over no cache, median of the rounds, by the clock; CPU: by the processor's time.\n"
        "mixers, MLPs: share of the tokens' passes through them that were made. PSNR in dB, its median and worst, and\n"
        "mean |change| in 0..255, to the uncached picture of the same seed.\n"
    )
    for name, text in WHAT_THEY_DO.items():
        print(f"{name}: {text}.")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="folder or Hub id; by default the one that ships with the package")
    parser.add_argument("--captions", type=Path, default=CAPTIONS, help="file of a prompt a line")
    parser.add_argument("--prompts", type=counting_number, default=8, help="how many of them, spread over the file")
    parser.add_argument("--repeats", type=counting_number, default=1, help="rounds of each prompt")
    parser.add_argument("--settings", nargs="+", default=[""], help="parts of the names of the settings to compare")
    parser.add_argument("--num_inference_steps", type=counting_number)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default=best_device())
    options = parser.parse_args()
    check_device(options.device, options.dtype)
    captions = options.captions.read_text(encoding="utf-8").split("\n")
    captions = [line.strip() for line in captions if line.strip()]
    if len(captions) <= options.prompts:
        raise ValueError(
            f"--prompts {options.prompts} and one to warm up are more than the {len(captions)} lines of "
            f"{str(options.captions)!r}; give fewer or another file."
        )
    logging.set_verbosity_error()  # FasterCache says at every start that it is experimental
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # it calls that as torch will not have it
    pipe = load_pipeline(LocalDiTPipeline, options.pipeline, options.device, options.dtype, "--pipeline")
    pipe.set_progress_bar_config(disable=True)
    steps = pipe.call_default("num_inference_steps", options.num_inference_steps)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{options.dtype}, {steps} steps, {options.prompts} prompts x {options.repeats}"
    )
    prompts = captions[:: len(captions) // (options.prompts + 1)][: options.prompts + 1]
    results = compare(
        pipe,
        prompts,
        steps,
        options.seed,
        options.repeats,
        lambda name: any(part in name for part in options.settings),
    )
    report(results)


if __name__ == "__main__":
    run("localdit.benchmarks.caching", main)
