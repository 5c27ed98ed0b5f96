"""Pictures that lie somewhere: which of them a step sees, at which size, and what if one cannot be read."""

import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers.training_utils import generate_aspect_ratio_buckets
from PIL import Image, ImageOps, UnidentifiedImageError

from config import DataConfig
from localdit.data.labelled_images import Split
from train.data import Condition, Source

Key = tuple[int, int]  # row and bucket
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError)  # what PIL raises


class Records(Protocol):
    """Pictures in a fixed order, wherever they lie; each may have a caption or a label.

    Attributes:
        classes: names of the labels, where there are any.
    """

    classes: list[str] | None

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """How a person finds the picture."""
        ...

    def open(self, row: int) -> Image.Image:
        """The picture, lazily; raises an OSError or PIL's errors where it cannot be read."""
        ...

    def caption(self, row: int) -> str: ...

    def label(self, row: int) -> int: ...


class PictureSource(Source):
    """Records in a new order every epoch, each resized and cut to the nearest of the sizes.

    All pictures of a micro-step have the same size, in every process. A picture that cannot be read is replaced by the
    next one of its bucket, and told of in "unreadable".
    """

    def __init__(
        self, records: Records, config: DataConfig, seed: int, condition: Condition | None, split: Split = "train"
    ):
        super().__init__(config.resolution, seed)
        self.records = records
        self.condition = condition
        self.classes = records.classes if condition == "label" else None
        self.sizes = bucket_sizes(config)
        rows = np.array(rows_of(split, records, wanted_rows(records, config.scan), config.held_out))
        buckets = np.zeros(len(rows), dtype=np.int64)
        if len(self.sizes) > 1:
            buckets = nearest_buckets([upright_size(records, row) for row in rows.tolist()], self.sizes)
        self.members = {bucket: rows[buckets == bucket] for bucket in np.unique(buckets).tolist()}

    def words(self) -> list[str]:
        if self.condition != "caption":
            return []
        captions = (self.records.caption(row) for row in range(len(self.records)))
        return sorted({word for caption in captions for word in caption.lower().split()})

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Key]:
        """Rows and their bucket; the same bucket in all processes.

        An epoch holds every picture at least once; the last step of each size is filled up with its first pictures.
        """
        taken = batch_size * world_size
        counts = tuple(len(rows) for rows in self.members.values())
        epoch, place = divmod(micro_step, sum(math.ceil(count / taken) for count in counts))
        index, start = epoch_schedule(counts, taken, self.seed, epoch)[place]
        bucket = list(self.members)[index]
        order = epoch_order(counts[index], self.seed, epoch, bucket)
        places = (np.arange(batch_size) + start + rank * batch_size) % counts[index]
        return [(int(self.members[bucket][order[place]]), bucket) for place in places]

    def __getitem__(self, key: Key) -> dict:
        row, bucket = key
        pixels, row, unreadable = self._read(row, bucket)
        item: dict = {"name": self.records.name(row), "image": to_tensor(pixels), "unreadable": "\n".join(unreadable)}
        if self.condition == "label":
            item["label"] = self.records.label(row)
        if self.condition == "caption":
            item["caption"] = self.records.caption(row)
        return item

    def _read(self, row: int, bucket: int) -> tuple[np.ndarray, int, list[str]]:
        """The pixels of a row, or of the next one of its bucket that can be read; that row; and what could not be."""
        rows = self.members[bucket]
        first = int(np.searchsorted(rows, row))
        unreadable = []
        for offset in range(len(rows)):
            row = int(rows[(first + offset) % len(rows)])
            try:
                with self.records.open(row) as image:
                    upright = ImageOps.exif_transpose(image).convert("RGB")
                    return np.asarray(cut_to(upright, *self.sizes[bucket])), row, unreadable
            except UNREADABLE as error:
                unreadable.append(f"{self.records.name(row)}: {' '.join(str(error).split())}")
        raise ValueError(f"No picture can be read; the first is {unreadable[0]}.")


def bucket_sizes(config: DataConfig) -> list[tuple[int, int]]:
    """The heights and widths that pictures are cut to."""
    if config.bucket_multiple is None:
        return [(config.resolution, config.resolution)]
    return generate_aspect_ratio_buckets(config.resolution, config.bucket_multiple)


def wanted_rows(records: Records, scan: str | None) -> list[int]:
    """The rows that the report of `train.scan` leaves; all of them without one.

    Raises:
        ValueError: where there is no such report, or it leaves none.
    """
    if scan is None:
        return list(range(len(records)))
    try:
        report = json.loads(Path(scan).read_text(encoding="utf-8"))
        left_out = {entry["name"] for entry in report["unreadable"]}
        left_out |= {name for group in report["alike"] for name in group[1:]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.scan={scan!r} is no report of train.scan ({error}); write one anew.") from error
    rows = [row for row in range(len(records)) if records.name(row) not in left_out]
    if not rows:
        raise ValueError(f"data.scan={scan!r} leaves none of {len(records)} pictures; look into it.")
    return rows


def rows_of(split: Split, records: Records, rows: list[int], held_out: float) -> list[int]:
    """The rows to train on, or those that are held out; which they are depends on each picture's name alone.

    Raises:
        ValueError: where there is none.
    """

    def is_held_out(row: int) -> bool:
        return int.from_bytes(hashlib.sha256(records.name(row).encode()).digest()[:6]) < held_out * 2**48

    chosen = [row for row in rows if is_held_out(row) == (split == "test")]
    if not chosen:
        kind = "to validate with" if split == "test" else "to train on"
        raise ValueError(f"data.held_out={held_out} leaves none of {len(rows)} pictures {kind}; choose another share.")
    return chosen


def nearest_buckets(sizes: list[tuple[int, int]], buckets: list[tuple[int, int]]) -> np.ndarray:
    """For each (height, width) the number of the bucket whose ratio of height to width is nearest, as a factor."""
    ratios = np.log([height / width for height, width in buckets])
    wanted = np.log([height / width for height, width in sizes])
    return np.abs(wanted[:, None] - ratios[None]).argmin(axis=1)


def upright_size(records: Records, row: int) -> tuple[int, int]:
    """Height and width of a picture from its header, turned as its camera was held; (1, 1) where it cannot be read."""
    try:
        with records.open(row) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # the orientations that lie on their side
    except UNREADABLE:
        return 1, 1
    return (width, height) if turned else (height, width)


@lru_cache(maxsize=2)
def epoch_schedule(counts: tuple[int, ...], taken: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """The steps of an epoch in random order: which bucket, and from which place in its order on."""
    steps = [(index, start) for index, count in enumerate(counts) for start in range(0, count, taken)]
    return [steps[place] for place in np.random.default_rng((seed, epoch)).permutation(len(steps))]


@lru_cache(maxsize=64)
def epoch_order(length: int, seed: int, epoch: int, bucket: int = 0) -> list[int]:
    """A permutation of range(length) for one epoch, and of one bucket."""
    return np.random.default_rng((seed, epoch, bucket)).permutation(length).tolist()


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, C] to float [C, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def cut_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a picture until it just covers height x width, and cut the middle out."""
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
