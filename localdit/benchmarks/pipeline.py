"""Where the seconds and the memory of a LocalDiTPipeline go: text encoder, transformer, VAE, at several sizes.

python -m localdit.benchmarks.pipeline --config released --dtype bfloat16 --output output/pipeline

Weights are random, of the sizes that --config and --text_encoder name; pictures are square, one at a time, guided.
"""

import argparse
import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.benchmarks import plots
from localdit.benchmarks.memory import apart, forget_peak, free_memory, gibibytes, peak_memory
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

TEXT_TOKENS = 120  # of the released model
PARTS = ("text encoder", "transformer", "VAE, whole", "VAE, in tiles")
PLOT = "pipeline.png"
TILE = 1024  # the pipelines' own
# what is kept at once, as multiples of a token's width, of the widest channels of a pixel and of a picture; measured
TOKEN_WIDTHS, PIXEL_WIDTHS, PICTURES = 16, 4.5, 3

# of SDXL, which the released model decodes with
SDXL_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
SMALL_VAE = {**SDXL_VAE, "block_out_channels": (32, 64, 128, 128)}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
# transformer (its settings, where they are not the released model's) and VAE
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "released": ({}, SDXL_VAE),
    "small": ({"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}, SMALL_VAE),
    "tiny": ({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 64}, TINY_VAE),
}
# of T5 1.1 and Flan-T5: width, layers, heads, width of the feed-forward; a head is 64 wide
TEXT_ENCODERS = {
    "tiny": (64, 1, 1, 64),
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    config: str
    text_encoder: str
    steps: int
    dtype: str
    device: str
    repeats: int
    tile: int


@dataclass(frozen=True)
class Measurement:
    """Median seconds, and the most bytes taken at once, weights included; or why there are none."""

    seconds: float = 0.0
    peak: int = 0
    missing: str = ""


def build_text_encoder(settings: Settings) -> T5EncoderModel:
    """A T5 encoder of that size."""
    width, layers, heads, feed_forward = TEXT_ENCODERS[settings.text_encoder]
    config = T5Config(d_model=width, num_layers=layers, num_heads=heads, d_ff=feed_forward, d_kv=64)
    config.update({"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"})
    return T5EncoderModel(config).eval()


def build_transformer(settings: Settings) -> LocalDiTTransformer2DModel:
    """A transformer of that size."""
    return LocalDiTTransformer2DModel(**CONFIGS[settings.config][0])


def build_vae(settings: Settings) -> AutoencoderKL:
    """An autoencoder of that size."""
    config = dict(CONFIGS[settings.config][1])
    blocks = len(config["block_out_channels"])
    config.update(down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks)
    return AutoencoderKL(**config)


def build_pipeline(settings: Settings, **components: torch.nn.Module) -> Any:
    """A pipeline of the given components and no others."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    parts = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
        "scheduler": DPMSolverMultistepScheduler(),
        **dict.fromkeys(("text_encoder", "transformer", "vae")),
    }
    pipeline = LocalDiTPipeline(**{**parts, **components})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_tile_size = settings.tile
    return pipeline


def work(part: str, size: int, settings: Settings) -> tuple[Any, Callable[[], Any]]:
    """A pipeline of what a part needs, and what it does there for a picture of `size` x `size` pixels."""
    place = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    latent_size = size // vae_scale(settings)
    if part == "text encoder":
        pipeline = build_pipeline(settings, text_encoder=build_text_encoder(settings)).to(**place)
        return pipeline, functools.partial(pipeline.encode_prompt, "a red seven", max_sequence_length=TEXT_TOKENS)
    if part == "transformer":
        pipeline = build_pipeline(settings, transformer=build_transformer(settings)).to(**place)
        text, no_text = torch.randn(2, 1, TEXT_TOKENS, pipeline.transformer.config.caption_channels, **place)
        mask = torch.ones(1, TEXT_TOKENS, device=settings.device)
        call = functools.partial(
            pipeline,
            height=latent_size,  # without a VAE a pipeline counts in latents
            width=latent_size,
            num_inference_steps=settings.steps,
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=no_text,
            negative_prompt_attention_mask=mask,
            output_type="latent",
        )
        return pipeline, call
    pipeline = build_pipeline(settings, vae=build_vae(settings)).to(**place)
    if part == "VAE, whole":
        pipeline.vae_tile_size = None
    latents = torch.randn(1, pipeline.vae.config.latent_channels, latent_size, latent_size, **place)
    return pipeline, functools.partial(pipeline.decode, latents, "pt")


def vae_scale(settings: Settings) -> int:
    """Pixels along one side of a latent."""
    return 2 ** (len(CONFIGS[settings.config][1]["block_out_channels"]) - 1)


@torch.no_grad()
def measure(part: str, size: int, settings: Settings) -> Measurement:
    """Do a part's work, on an accelerator once more before that, to warm up."""
    keep_freed_memory()  # as infer_t2i.py does
    diffusers_logging.set_verbosity_error()  # of what a cast may cost, which random weights do not feel
    pipeline, do = work(part, size, settings)
    accelerated = settings.device != "cpu"
    if accelerated and (index := torch.device(settings.device).index):
        torch.accelerator.set_device_index(index)
    models = [component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)]
    weights = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
    before = forget_peak(settings.device)
    times = []
    for _ in range(settings.repeats + accelerated):
        start = time.perf_counter()
        do()
        if accelerated:
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return Measurement(median(times[accelerated:]), weights + peak_memory(settings.device) - before)


def estimate(part: str, size: int, settings: Settings) -> int:
    """About how many bytes a part takes at once, weights included."""
    builders = {"text encoder": build_text_encoder, "transformer": build_transformer}
    with torch.device("meta"):
        model = builders.get(part, build_vae)(settings)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if part == "transformer":
        tokens = 2 * (size // vae_scale(settings) // model.config.patch_size) ** 2
        numbers += TOKEN_WIDTHS * tokens * model.inner_dim
    if part.startswith("VAE"):
        at_once = min(settings.tile, size) if part == "VAE, in tiles" else size
        numbers += PIXEL_WIDTHS * model.config.block_out_channels[1] * at_once**2 + PICTURES * 3 * size**2
    return int(numbers * DTYPES[settings.dtype].itemsize)


def measure_apart(part: str, size: int, settings: Settings) -> Measurement:
    """`measure` in a process of its own, so that its peak is this part's; not where the memory would not do."""
    needed, free = estimate(part, size, settings), free_memory(settings.device)
    if needed > free:
        return Measurement(missing=f"skipped: it takes about {gibibytes(needed)}, and {gibibytes(free)} are free")
    try:
        return apart(measure, part, size, settings)
    except MemoryError as error:
        return Measurement(missing=f"failed: {error}")


def measure_size(size: int, settings: Settings) -> dict[str, Measurement]:
    """The parts of a picture of that size; one that is not cut has no decoding in tiles."""
    with torch.device("meta"):
        vae = build_vae(settings)
    cut = build_pipeline(settings, vae=vae).is_cut(size, size)
    return {part: measure_apart(part, size, settings) for part in PARTS if cut or part != "VAE, in tiles"}


def run_parts(measured: dict[str, Measurement]) -> dict[str, Measurement]:
    """The parts that a generation runs: of the two ways to decode the one that the pipeline takes."""
    unused = "VAE, whole" if "VAE, in tiles" in measured else None
    return {part: measurement for part, measurement in measured.items() if part != unused}


def report(size: int, measured: dict[str, Measurement], settings: Settings) -> None:
    """Print seconds, their share of a generation where all of it was measured, and the peak of each part."""
    parts = run_parts(measured)
    shared = {} if any(measurement.missing for measurement in parts.values()) else parts
    total = sum(measurement.seconds for measurement in parts.values())
    print(f"\n{size} x {size} pixels")
    for part, measurement in measured.items():
        if measurement.missing:
            print(f"  {part:14s} {measurement.missing}")
            continue
        share = f"{measurement.seconds / total:6.1%}" if part in shared else "     -"
        steps = f"   {settings.steps} steps of {measurement.seconds / settings.steps:.4g} s"
        note = steps if part == "transformer" else ""
        print(f"  {part:14s} {measurement.seconds:10.2f} s  {share}  {gibibytes(measurement.peak):>10s}{note}")


def plot(results: dict[int, dict[str, Measurement]], folder: Path) -> Path:
    """Write `folder/pipeline.png`: where a generation's seconds go, and the peak of each part."""
    figure, (seconds, memory) = plots.panels(2)
    places = range(len(results))
    below = [0.0] * len(results)
    for number, part in enumerate(PARTS):
        measured = [result.get(part, Measurement()) for result in results.values()]
        spent = [run_parts(result).get(part, Measurement()).seconds for result in results.values()]
        seconds.bar(places, spent, bottom=below, color=f"C{number}")
        below = [sum(pair) for pair in zip(below, spent, strict=True)]
        shifted = [place + (number - 1.5) / 5 for place in places]
        memory.bar(shifted, [each.peak / 2**30 for each in measured], width=0.2, color=f"C{number}", label=part)
    seconds.set(title="seconds of a generation", xlabel="pixels along a side")
    memory.set(title="peak of each part, GiB", xlabel="pixels along a side")
    for panel in (seconds, memory):
        panel.set_xticks(places, [str(size) for size in results])
        panel.grid(alpha=0.3, axis="y")
    memory.legend(fontsize="small")
    return plots.write(figure, folder / PLOT)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=counting_number, nargs="+", default=[512, 1024, 2048, 4096], help="sides of the picture, pixels"
    )
    parser.add_argument("--config", default="released", choices=CONFIGS, help="transformer and VAE")
    parser.add_argument("--text_encoder", default="base", choices=TEXT_ENCODERS, help="of Flan-T5; the released is xxl")
    parser.add_argument("--steps", type=counting_number, default=20)
    parser.add_argument("--tile", type=counting_number, default=TILE, help="pixels along the side of a tile")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeats", type=counting_number, default=1)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--output", type=Path, help=f"folder for the plot, {PLOT}")
    arguments = vars(parser.parse_args())
    sizes, output = arguments.pop("size"), arguments.pop("output")
    settings = Settings(**arguments)
    check_device(settings.device, settings.dtype)
    token = vae_scale(settings) * 2
    for size in sizes:
        if size % token:
            raise ValueError(f"--size {size} is not a multiple of {token} pixels (one token); choose one.")
    if output is not None:
        check_folder("--output", output)
    print(
        f"torch {torch.__version__}, {settings.device}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"{settings.dtype}, random weights of the config {settings.config} and of Flan-T5 {settings.text_encoder} "
        "(the released text encoder is xxl, 4.8 billion parameters)"
    )
    results = {}
    for size in sizes:
        results[size] = measure_size(size, settings)
        report(size, results[size], settings)
    if output is not None:
        print(f"\n{plot(results, output)}")


if __name__ == "__main__":
    run("localdit.benchmarks.pipeline", main)
