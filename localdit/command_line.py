"""What the inference command lines share: loading a pipeline, reading and writing pictures."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

PRETRAINED = Path(__file__).parent / "pretrained" / "digit-scenes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_pipeline(pipeline_class: type[DiffusionPipeline], model: str | None, device: str, dtype: str):
    """Load a pipeline from a folder, a Hub id or, for None, the one that ships with the package.

    Raises:
        ValueError: where there is no such model, or its folder is damaged; the message says which and what to do.
    """
    source = model if model is not None else str(PRETRAINED)
    try:
        pipeline = pipeline_class.from_pretrained(source, dtype=DTYPES[dtype])
    except Exception as error:  # loading fails in many ways, and each is one sentence to the user
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"--model {source!r} cannot be loaded ({reason[0] if reason else type(error).__name__}); "
            "give a complete pipeline folder or a Hub id, or leave --model out for the shipped pipeline."
        ) from error
    return pipeline.to(device)


def read_image(path: str) -> Image.Image:
    """Open a picture as RGB; raises a ValueError where it cannot be read or has no pixels."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"--image {path!r} does not exist; give the path of a picture.") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"--image {path!r} cannot be read as a picture ({error}); give a PNG, JPEG or WebP."
        ) from error


def output_paths(output: Path, count: int, overwrite: bool) -> list[Path]:
    """`count` paths made from `output`; without `overwrite` each is a new file, numbered on from those that exist."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {str(output)!r} must end in .png, the format that keeps the seed with the picture.")
    numbered = (output.with_stem(f"{output.stem}-{number}") for number in itertools.count(1))
    names = itertools.chain([output] if count == 1 else [], numbered)
    return list(itertools.islice((path for path in names if overwrite or not path.exists()), count))


def save_images(images: list[Image.Image], settings: list[dict[str, Any]], output: Path, overwrite: bool) -> list[Path]:
    """Write each picture as PNG with its settings as JSON in the text chunk "parameters"; return where."""
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = output_paths(output, len(images), overwrite)
    for image, setting, path in zip(images, settings, paths, strict=True):
        information = PngInfo()
        information.add_text("parameters", json.dumps(setting))
        image.save(path, pnginfo=information)
    return paths


def image_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of equally many pictures as one."""
    return make_image_grid([image for row in rows for image in row], rows=len(rows), cols=len(rows[0]))


def run(program: str, main: Callable[[], None]) -> None:
    """Run a command line; what the user got wrong ends it with one sentence and exit code 2."""
    try:
        main()
    except (ValueError, TypeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
