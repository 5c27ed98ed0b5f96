"""The features of a set of pictures, computed once, with all that a score has to tell of them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from localdit.evaluation.extractors import FeatureExtractor
from localdit.evaluation.files import write_whole
from localdit.evaluation.images import list_images, read_rgb, read_sized, to_images
from localdit.evaluation.processes import gathered, in_batches, own_part, shown
from localdit.evaluation.records import about_pictures, in_memory

EXTRACTOR = ("name", "family", "sha256", "dimension", "preprocessing")  # what a score tells of one


@dataclass(frozen=True)
class Features:
    """What an extractor makes of pictures.

    Args:
        values: [N, D].
        logits: of classes, [N, K], from extractors that know some.
        extractor: its name, family, sha256, dimension and preprocessing.
        pictures: their source, count, formats, size in pixels and the filter that scaled them.
    """

    values: np.ndarray
    logits: np.ndarray | None
    extractor: dict[str, Any]
    pictures: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write them to a .safetensors file, under its name when it is whole."""
        arrays = {"values": self.values} | ({"logits": self.logits} if self.logits is not None else {})
        told = {"extractor": json.dumps(self.extractor), "pictures": json.dumps(self.pictures)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_whole(Path(path).parent, Path(path).name, lambda draft: save_file(arrays, draft, told))


def load_features(path: str | Path) -> Features:
    """What `Features.save` wrote.

    Raises:
        ValueError: where the file is none of these, or damaged.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("it is no file")
        with safe_open(path, framework="np") as file:
            told = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            logits = file.get_tensor("logits") if "logits" in file.keys() else None  # noqa: SIM118, as it is no mapping
            features = Features(file.get_tensor("values"), logits, told["extractor"], told["pictures"])
        check_whole(features)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{str(path)!r} holds no features ({error}); make them by --save_reference.") from error
    return features


def check_whole(features: Features) -> None:
    """Raise a ValueError where arrays do not fit what is told of them, or hold what is no number."""
    if missing := {*EXTRACTOR} - {*features.extractor} | {"count", "size"} - {*features.pictures}:
        raise ValueError(f"it does not tell {', '.join(sorted(missing))}")
    shape = [features.pictures["count"], features.extractor["dimension"]]
    if list(features.values.shape) != shape:
        raise ValueError(f"it holds {list(features.values.shape)} values, and tells of {shape}")
    arrays = [features.values] if features.logits is None else [features.values, features.logits]
    if any(len(array) != shape[0] or array.ndim != 2 or not np.isfinite(array).all() for array in arrays):
        raise ValueError("some of its values are missing or no numbers")


def features_of_images(
    images: np.ndarray | torch.Tensor | Iterable[Image.Image], extractor: FeatureExtractor, batch_size: int = 32
) -> Features:
    """Features of pictures in memory: PIL, uint8 [N, H, W, 3], or float in [0, 1] (tensors are [N, 3, H, W]).

    Raises:
        ValueError: where there is none, or a pixel is no number.
    """
    pictures = to_images(images) if isinstance(images, np.ndarray | torch.Tensor) else list(images)
    if not pictures:
        raise ValueError("There are no pictures; give at least one.")
    extracted = [extractor(pictures[first : first + batch_size]) for first in range(0, len(pictures), batch_size)]
    sizes = {picture.size for picture in pictures}
    told = in_memory(len(pictures), sizes.pop() if len(sizes) == 1 else None)
    return Features(*joined(extracted), about(extractor), told)


def features_of_folder(
    folder: str | Path, extractor: FeatureExtractor, batch_size: int = 32, size: int | None = None
) -> Features:
    """Features of the pictures in a folder, read once; several processes of accelerate each read a part.

    Args:
        size: pixels of the squares that pictures are cut and scaled to before; None wants all of one size.

    Raises:
        ValueError: where there is no picture, or one cannot be read, or they differ in size.
    """
    paths = list_images(folder)
    progress = shown(own_part(paths), f"{extractor.family} of {folder}")
    extracted = [extractor(batch) for batch in in_batches(read_sized(progress, paths[0], size), batch_size)]
    values, logits = joined(extracted) if extracted else ([], None)  # there may be more processes than pictures
    rows = gathered(values if logits is None else list(zip(values, logits, strict=True)))
    values, logits = map(np.stack, zip(*rows, strict=True)) if isinstance(rows[0], tuple) else (np.stack(rows), None)
    sides = (size, size) if size is not None else read_rgb(paths[0]).size
    return Features(values, logits, about(extractor), about_pictures(folder, paths, [sides], size is not None))


def joined(extracted: list) -> tuple[np.ndarray, np.ndarray | None]:
    """Batches of features and logits as one array of each; raises a ValueError for features that are no numbers."""
    values = torch.cat([batch.features for batch in extracted]).float().cpu().numpy()
    if bad := len(values) - int(np.isfinite(values).all(axis=1).sum()):
        raise ValueError(
            f"The extractor's features are no numbers in places (pictures: {bad} of {len(values)}); its weights are "
            "damaged, so give another."
        )
    if extracted[0].logits is None:
        return values, None
    return values, torch.cat([batch.logits for batch in extracted]).float().cpu().numpy()


def about(extractor: FeatureExtractor) -> dict[str, Any]:
    return {name: getattr(extractor, name) for name in EXTRACTOR}
