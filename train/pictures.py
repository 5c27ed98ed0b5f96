"""Pictures that lie somewhere: how they are read and cut, and what if one cannot be read."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from config import DataConfig
from localdit.data.labelled_images import Split
from train.buckets import BucketSource, Key, bucket_sizes, nearest_buckets, rows_of
from train.data import Condition

TRIED = 1000  # pictures in the place of one that cannot be read


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
        """The picture, lazily; raises where it cannot be read."""
        ...

    def caption(self, row: int) -> str:
        """What is written beside the picture; raises a ValueError where nothing is."""
        ...

    def label(self, row: int) -> int: ...


class PictureSource(BucketSource):
    """Records, each resized and cut to the nearest of the sizes.

    A picture that cannot be read is replaced by the next one of its bucket, and told of in "unreadable".
    """

    def __init__(
        self, records: Records, config: DataConfig, seed: int, condition: Condition | None, split: Split = "train"
    ):
        self.records = records
        self.condition = condition
        self.classes = records.classes if condition == "label" else None
        sizes = bucket_sizes(config)
        rows = np.array(rows_of(split, wanted_rows(records, config.scan), records.name, config.held_out))
        buckets = np.zeros(len(rows), dtype=np.int64)
        if len(sizes) > 1:
            buckets = nearest_buckets([upright_size(records, row) for row in rows.tolist()], sizes)
        super().__init__(sizes, {bucket: rows[buckets == bucket] for bucket in np.unique(buckets).tolist()}, seed)

    def words(self) -> list[str]:
        if self.condition != "caption":
            return []
        captions = (self._caption_or_nothing(row) for row in range(len(self.records)))
        return sorted({word for caption in captions for word in caption.lower().split()})

    def _caption_or_nothing(self, row: int) -> str:
        try:
            return self.records.caption(row)
        except ValueError:  # it is told of when its turn comes
            return ""

    def __getitem__(self, key: Key) -> dict:
        row, bucket = key
        rows = self.members[bucket]
        first, unreadable = int(np.searchsorted(rows, row)), []
        for offset in range(min(len(rows), TRIED)):
            row = int(rows[(first + offset) % len(rows)])
            try:
                return {**self._item(row, bucket), "unreadable": "\n".join(unreadable)}
            except Exception as error:  # damaged bytes make a decoder fail in any way
                unreadable.append(f"{self.records.name(row)}: {reason(error)}")
        raise ValueError(f"None of {len(unreadable)} pictures in a row can be read; the first is {unreadable[0]}.")

    def _item(self, row: int, bucket: int) -> dict:
        """The picture of a row, with what the model is conditioned on."""
        with self.records.open(row) as image:
            pixels = upright_pixels(image, *self.sizes[bucket])
        item: dict = {"name": self.records.name(row), "image": to_tensor(pixels)}
        if self.condition == "label":
            item["label"] = self.records.label(row)
        if self.condition == "caption":
            item["caption"] = self.records.caption(row)
        return item


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


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


def upright_size(records: Records, row: int) -> tuple[int, int]:
    """Height and width of a picture from its header, turned as its camera was held; (1, 1) where it cannot be read."""
    try:
        with records.open(row) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # the orientations that lie on their side
    except Exception:  # it is told of when its turn comes
        return 1, 1
    return (width, height) if turned else (height, width)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, C] to float [C, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def upright_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A picture as its camera was held, resized and cut: uint8 [height, width, 3]."""
    return np.asarray(cut_to(as_rgb(ImageOps.exif_transpose(image)), height, width))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in 8 bits of red, green and blue, white where it is transparent; of an animation the first frame.

    Raises:
        ValueError: for numbers of which it is not known what is black and what is white.
    """
    if image.mode.startswith("I"):  # whole numbers of 16 bits, which PIL's own conversion cuts at 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8")
        return Image.fromarray(np.round(pixels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def cut_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize a picture until it just covers height x width, and cut the middle out."""
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
