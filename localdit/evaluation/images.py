"""Pictures of a folder, read one by one in a fixed order."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
OTHERS = {".gif", ".avif", ".heic", ".jp2", ".npy", ".npz"}  # pictures, too, perhaps
LARGEST = 4096  # pixels a side to scale to; no extractor sees more than a part of that
RESIZE = "PIL bicubic"  # which averages over all that a pixel covers


def find_images(folder: str | Path) -> list[Path]:
    """The pictures in a folder and the folders in it, by name.

    Raises:
        ValueError: where there is no folder, or no picture in it, or a link of a picture's name leads nowhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give one with pictures.")
    found = sorted(path for path in files_in(folder) if path.suffix.lower() in SUFFIXES)
    if broken := [path for path in found if path.is_symlink() and not path.exists()]:
        raise ValueError(f"{str(broken[0])!r} is a link that leads nowhere; mend it or take it away.")
    if not found:
        raise ValueError(f"{str(folder)!r} holds no picture; give a folder of {', '.join(sorted(SUFFIXES))} files.")
    return found


def files_in(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it, be they there by a link; each folder once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here) / name for name in names)


def list_images(folder: str | Path) -> list[Path]:
    """What `find_images` finds, with a warning of what might be pictures, too."""
    found = find_images(folder)
    others = [path for path in files_in(Path(folder)) if path.suffix.lower() in OTHERS]
    if others:
        logger.warning("Files of other kinds are left out (%d, such as %s).", len(others), others[0].name)
    return found


def read_rgb(path: str | Path) -> Image.Image:
    """A picture as RGB, turned the way its camera was held.

    Raises:
        ValueError: where it cannot be read.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F"):
                raise ValueError("its pixels have no known range; save it with 8 or 16 bits a channel")
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            if upright.has_transparency_data and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("it is transparent in places; put it on a background")
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture ({error}); mend it or take it away.") from error


def to_images(pictures: np.ndarray | torch.Tensor) -> list[Image.Image]:
    """Arrays as pictures: uint8 [N, H, W, 3], or float in [0, 1], [N, H, W, 3] or as a tensor [N, 3, H, W].

    Raises:
        ValueError: where they are of another shape or range, or hold NaN.
    """
    if isinstance(pictures, torch.Tensor):
        pictures = pictures.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    if pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"Pictures of shape {list(pictures.shape)} are no [N, height, width, 3]; give colours.")
    if pictures.dtype != np.uint8:
        if bad := np.flatnonzero(~np.isfinite(pictures).all(axis=(1, 2, 3))).tolist():
            raise ValueError(f"Pictures {bad[:5]} hold pixels that are no numbers; leave them out, or draw them again.")
        if pictures.min() < 0 or pictures.max() > 1:
            raise ValueError(f"Pixels reach from {pictures.min():.3g} to {pictures.max():.3g}; scale them to [0, 1].")
        pictures = (pictures * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in pictures]


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, at `size` x `size` pixels."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def read_sized(paths: Iterable[Path], like: Path, size: int | None) -> Iterator[Image.Image]:
    """The pictures as squares of `size`, or as they are if they all have the size of the picture `like`.

    Raises:
        ValueError: where one differs in size, and no size is given, or cannot be read.
    """
    width, height = read_rgb(like).size
    for path in paths:
        image = read_rgb(path)
        if size is not None:
            image = square(image, size)
        elif image.size != (width, height):
            raise ValueError(
                f"{path.name} has {image.width} x {image.height} pixels and {like.name} {width} x {height}; give "
                "--size to cut and scale all to squares of one size."
            )
        yield image
