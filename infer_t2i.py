"""Text to image from the command line: python infer_t2i.py --prompt "a red seven on a black background"."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from config import SampleConfig
from localdit import LocalDiTPipeline
from localdit.command_line import (
    DTYPES,
    Parser,
    best_device,
    check_device,
    check_output,
    counting_number,
    image_grid,
    load_pipeline,
    run,
    save_images,
    seed_number,
)

MOST_PICTURES = 1000  # of one call, which holds them all in memory


def add_sample_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The arguments that both command lines take."""
    parser.add_argument("--prompt", nargs="+", required=True, help="one text or several")
    parser.add_argument("--negative_prompt", help="what to steer away from")
    parser.add_argument(
        "--model", help="pipeline folder, Hub id or released checkpoint; by default the shipped digit scenes"
    )
    parser.add_argument("--height", type=int, help="pixels; by default the model's")
    parser.add_argument("--width", type=int, help="pixels; by default the model's")
    parser.add_argument("--num_inference_steps", type=int, help="by default the model's")
    parser.add_argument("--guidance_scale", type=float, help="1 turns guidance off; by default the model's")
    parser.add_argument(
        "--seed", type=seed_number, help="of the first picture, the next count up; by default drawn at random"
    )
    parser.add_argument("--num_images", type=counting_number, default=1, help="pictures per prompt")
    parser.add_argument("--output", type=Path, default=Path(output), help="a .png; numbered where there are several")
    parser.add_argument("--overwrite", action="store_true", help="write over existing files")
    parser.add_argument("--grid", action="store_true", help="one picture with a row per prompt")
    parser.add_argument("--device", default=best_device(), help="cpu, cuda, mps; by default the best there is")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for what can be seen to be wrong before the model is loaded."""
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise ValueError("--prompt holds an empty text; say what to draw.")
    if (pictures := arguments.num_images * len(arguments.prompt)) > MOST_PICTURES:
        raise ValueError(
            f"--num_images={arguments.num_images} makes {pictures} pictures; draw {MOST_PICTURES} at most."
        )
    if arguments.seed is not None and arguments.seed + pictures > 2**32:
        raise ValueError(f"--seed={arguments.seed} leaves no seeds for {pictures} pictures, which count up to 2**32.")
    check_device(arguments.device, arguments.dtype)
    check_output(arguments.output)


def sample_config(arguments: argparse.Namespace) -> SampleConfig:
    """The sampling settings of a command line, with a seed drawn where none was given."""
    return SampleConfig(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        strength=getattr(arguments, "strength", None),
        seed=arguments.seed if arguments.seed is not None else torch.seed() % (2**32 - MOST_PICTURES),
        num_images=arguments.num_images,
    )


def call_arguments(sample: SampleConfig) -> dict:
    """What a pipeline is called with: a generator for each picture, so that none depends on its batch."""
    seeds = range(sample.seed, sample.seed + len(sample.prompts) * sample.num_images)
    return {
        "prompt": sample.prompt,
        "negative_prompt": sample.negative_prompt,
        "height": sample.height,
        "width": sample.width,
        "num_inference_steps": sample.num_inference_steps,
        "guidance_scale": sample.guidance_scale,
        "num_images_per_prompt": sample.num_images,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }


def resolved(sample: SampleConfig, pipeline: DiffusionPipeline) -> dict:
    """The settings that a pipeline has drawn with, its own defaults where none were given."""
    height, width = pipeline.default_size(sample.height, sample.width)
    steps = pipeline.call_default("num_inference_steps", sample.num_inference_steps)
    guidance_scale = pipeline.guidance_scale
    used = replace(sample, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance_scale)
    return {name: value for name, value in asdict(used).items() if value is not None}


def write(
    images: list,
    sample: SampleConfig,
    pipeline: DiffusionPipeline,
    arguments: argparse.Namespace,
    before: list | None = None,
) -> None:
    """Save the pictures with their settings, print where they are and by which seeds."""
    common = {**resolved(sample, pipeline), "model": arguments.model or "digit-scenes", "dtype": arguments.dtype}
    if "image" in arguments:
        common["image"] = arguments.image
        common["strength"] = pipeline.call_default("strength", sample.strength)
    if arguments.grid:
        rows = [images[start : start + sample.num_images] for start in range(0, len(images), sample.num_images)]
        images = [image_grid([[*(before or []), *row] for row in rows])]
        settings = [common]
    else:
        prompts = [prompt for prompt in sample.prompts for _ in range(sample.num_images)]
        settings = [
            {**common, "prompt": prompt, "seed": sample.seed + index, "num_images": 1}
            for index, prompt in enumerate(prompts)
        ]
    paths = save_images(images, settings, arguments.output, arguments.overwrite)
    for path, setting in zip(paths, settings, strict=True):
        print(f"{path} (seed {setting['seed']})")


def main() -> None:
    parser = Parser(description="Generate pictures from text.")
    add_sample_arguments(parser, output="output/t2i.png")
    arguments = parser.parse_args()
    check_arguments(arguments)
    sample = sample_config(arguments)
    pipeline = load_pipeline(LocalDiTPipeline, arguments.model, arguments.device, arguments.dtype)
    images = pipeline(**call_arguments(sample)).images
    write(images, sample, pipeline, arguments)


if __name__ == "__main__":
    run("infer_t2i", main)
