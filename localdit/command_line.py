"""What the inference command lines share: their arguments, loading a pipeline, reading and writing pictures."""

import argparse
import ctypes
import itertools
import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from transformers.utils import logging as transformers_logging

from localdit.conversion import INDEX_SUFFIXES

PRETRAINED = Path(__file__).parent / "pretrained" / "digit-scenes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # as torch says on CUDA, Linux, Windows
GRID_LINE = (96, 108, 132)  # a colour that pictures seldom have at their border
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


# that the Hub does not answer, diffusers tells at length, and `load_pipeline` in one sentence
logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(lambda record: "the Hub" not in str(record.msg))


class Parser(argparse.ArgumentParser):
    """An argument parser that wants options in full, and whose errors `run` prints, in one line like all others."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help.")


def counting_number(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed_number(text: str) -> int:
    """The type of an option that seeds a generator."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in [0, 2**32)")
    return int(text)


def available_devices() -> list[str]:
    """The names of the devices that can be computed on: "cpu", and with an accelerator as "cuda:0", "cuda"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    numbered = (f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))
    return ["cpu", *numbered, accelerator.type]


def best_device() -> str:
    """An accelerator (CUDA, MPS, ...) where there is one, else the CPU."""
    return available_devices()[-1]


def start_process(device: str) -> tuple[PartialState, str]:
    """This process among those of its launcher, and its device: with several, each has an accelerator of its own."""
    state = PartialState(cpu=device == "cpu")
    return state, str(state.device) if state.num_processes > 1 and device != "cpu" else device


def check_device(device: str, dtype: str) -> None:
    """Raise a ValueError unless this machine has the device, and the device computes in that precision."""
    devices = available_devices()
    if device not in devices:
        raise ValueError(f"--device {device!r} is not available here; choose {' or '.join(devices)}.")
    if device == "cpu" and dtype == "float16":
        raise ValueError("--dtype 'float16' is for accelerators; on the CPU choose float32 or bfloat16.")


def is_checkpoint(source: str) -> bool:
    """Whether `source` is a file, a link to one, or a folder of shards, rather than a pipeline's folder or Hub id."""
    if "://" in source or os.path.isfile(source):
        return True
    files = os.listdir(source) if os.path.isdir(source) else []
    return any(file.endswith(INDEX_SUFFIXES) for file in files) and not {"model_index.json", "config.json"} & {*files}


def hide_loading_bars() -> None:
    """Show the libraries' bars of loading weights on a terminal only."""
    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], model: str | None, device: str, dtype: str, option: str = "--model"
):
    """Load a pipeline from a folder, a released checkpoint, a Hub id or, for None, the one that ships with the package.

    `option` is what the command line calls it, for the message.

    Raises:
        ValueError: where there is no such model, or its folder is damaged; the message says which and what to do.
    """
    source = model if model is not None else str(PRETRAINED)
    keep_freed_memory()
    hide_loading_bars()
    try:
        load = pipeline_class.from_single_file if is_checkpoint(source) else pipeline_class.from_pretrained
        pipeline = load(source, dtype=DTYPES[dtype])
    except Exception as error:  # loading fails in many ways, and each is one sentence to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and not os.path.isdir(source):
            reason = "it is no folder here, and the Hugging Face Hub has no such model or cannot be reached."
        raise ValueError(f"{option} {source!r} cannot be loaded: {shortened(reason)}") from error
    pipeline.set_progress_bar_config(disable=None)  # None shows the bar on a terminal and nowhere else
    return pipeline.to(device)


def shortened(text: str, length: int = 300) -> str:
    """The text, cut where it is longer than `length`."""
    return text if len(text) <= length else text[: length - 3] + "..."


def read_image(path: str) -> Image.Image:
    """Open a picture as RGB, turned the way its camera was held; raises a ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"--image {path!r} does not exist; give the path of a picture.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"--image {path!r} cannot be read as a picture ({error}); give a PNG, JPEG or WebP."
        ) from error


def check_output(output: Path) -> None:
    """Raise a ValueError unless pictures can be written to `output`; its folder is made."""
    if output.suffix.lower() != ".png":
        raise ValueError(
            f"--output {str(output)!r} does not end in .png, the format that keeps the seed with the picture; "
            f"choose {str(output.with_suffix('.png'))!r}."
        )
    if output.is_dir():
        raise ValueError(f"--output {str(output)!r} is a folder and cannot be written to as a picture; choose another.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {str(output)!r} has no folder to go to ({error}); choose another.") from error
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {str(output)!r} is in a folder that cannot be written to; choose another.")


def check_folder(option: str, path: str | Path) -> None:
    """Raise a ValueError where a folder to write to is something else; `option` is what the command line calls it."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{option} {str(path)!r} is no folder; choose another.")


def check_file(option: str, path: str | Path) -> None:
    """Raise a ValueError where a file to write to is a folder, or lies in something that is none."""
    if Path(path).is_dir():
        raise ValueError(f"{option} {str(path)!r} is a folder; name a file in it.")
    check_folder(option, Path(path).parent)


def output_paths(output: Path, count: int, overwrite: bool) -> list[Path]:
    """`count` paths made from `output`; without `overwrite` each is a new file, numbered on from those that exist."""
    numbered = (output.with_stem(f"{output.stem}-{number}") for number in itertools.count(1))
    names = itertools.chain([output] if count == 1 else [], numbered)
    return list(itertools.islice((path for path in names if overwrite or not path.exists()), count))


def save_images(images: list[Image.Image], settings: list[dict[str, Any]], output: Path, overwrite: bool) -> list[Path]:
    """Write each picture as PNG with its settings as JSON in the text chunk "parameters"; return where."""
    check_output(output)
    paths = output_paths(output, len(images), overwrite)
    for image, setting, path in zip(images, settings, paths, strict=True):
        information = PngInfo()
        information.add_text("parameters", json.dumps(setting))
        try:
            image.save(path, pnginfo=information)
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be written ({error}); choose another --output.") from error
    return paths


def image_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of equally many pictures as one, with a line between them."""
    framed = [ImageOps.expand(image, border=1, fill=GRID_LINE) for row in rows for image in row]
    return make_image_grid(framed, rows=len(rows), cols=len(rows[0]))


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep what is freed for the next tensor of this process.

    By default it gives large tensors back to the kernel, which clears every page of the next ones: up to a fifth of a
    transformer's time on a CPU. In return more memory stays taken. Where a variable of glibc's is set, such as
    MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES, the choice is left to it.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run(program: str, main: Callable[[], None]) -> None:
    """Run a command line; what the user got wrong ends it with one sentence and exit code 2."""
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        print(f"{program}: out of memory; choose a smaller --height, --width or --num_images.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
