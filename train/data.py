"""Data: which picture each step sees is a pure function of seed, step and rank."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from config import DataConfig
from localdit.data import digit_scenes

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DigitScenes(Dataset):
    """Endless captioned digit scenes; position p is drawn from a generator seeded by (seed, p)."""

    channels = 3
    classes = None

    def __init__(self, config: DataConfig, seed: int):
        if config.resolution != digit_scenes.CANVAS:
            raise ValueError(
                f"data.resolution={config.resolution}, but digit scenes are {digit_scenes.CANVAS} pixels wide; "
                f"set {digit_scenes.CANVAS}."
            )
        for name in ("one_digit", "recoloured"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"data.{name}={getattr(config, name)} is outside [0, 1].")
        self.config = config
        self.seed = seed

    def words(self) -> list[str]:
        phrases = [*digit_scenes.COLOURS, *digit_scenes.DIGITS, *digit_scenes.RELATIONS, *digit_scenes.BACKGROUNDS]
        return sorted({"a", "on", "background", *" ".join(phrases).split()})

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng((self.seed, position))
        scene = digit_scenes.sample_scene(rng, num_digits=1 if rng.random() < self.config.one_digit else 2)
        source = digit_scenes.recolour(scene, rng) if rng.random() < self.config.recoloured else scene
        geometry = rng.integers(2**32)  # handwriting, sizes and places are the same in both pictures
        image = to_tensor(digit_scenes.render(scene, np.random.default_rng(geometry)))
        seen = image if source is scene else to_tensor(digit_scenes.render(source, np.random.default_rng(geometry)))
        return {"image": image, "source": seen, "caption": scene.caption}


class ImageFolder(Dataset):
    """Pictures of a folder in a new order every epoch, each with a caption (a .txt) or a class (its folder)."""

    channels = 3

    def __init__(self, config: DataConfig, seed: int, labels: bool):
        if config.path is None or not Path(config.path).is_dir():
            raise ValueError(f"data.path={config.path!r} is not a folder; give the folder of your pictures.")
        root = Path(config.path)
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ValueError(f"{root} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}); check data.path.")
        self.classes = sorted({path.parent.name for path in self.files}) if labels else None
        if not labels:
            missing = [path for path in self.files if not path.with_suffix(".txt").is_file()]
            if missing:
                raise ValueError(
                    f"{missing[0]} and {len(missing) - 1} other picture(s) have no caption; put it into a .txt file of "
                    "the same name, or train on classes (model.num_classes)."
                )
        self.resolution = config.resolution
        self.seed = seed

    def words(self) -> list[str]:
        captions = (path.with_suffix(".txt").read_text(encoding="utf-8") for path in self.files)
        return sorted({word for caption in captions for word in caption.lower().split()})

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.files))
        path = self.files[epoch_order(len(self.files), self.seed, epoch)[offset]]
        try:
            with Image.open(path) as image:
                pixels = np.asarray(crop_to_square(image.convert("RGB"), self.resolution))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a picture ({error}); repair or remove it.") from error
        if self.classes is not None:
            return {"image": to_tensor(pixels), "label": self.classes.index(path.parent.name)}
        return {"image": to_tensor(pixels), "caption": path.with_suffix(".txt").read_text(encoding="utf-8").strip()}


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(length) for one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length).tolist()


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, C] to float [C, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` pixels and cut the middle out."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


class MicroStepSampler:
    """The positions of each micro-batch of one process, from the micro-step `first` up to `last`, exclusive."""

    def __init__(self, batch_size: int, first: int, last: int, rank: int, world_size: int):
        self.batch_size = batch_size
        self.micro_steps = range(first, last)
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in self.micro_steps:
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return len(self.micro_steps)


def build_dataset(config: DataConfig, seed: int, labels: bool) -> DigitScenes | ImageFolder:
    """The dataset that the config names, with labels (of class folders) or captions."""
    if config.name == "imagefolder":
        return ImageFolder(config, seed, labels)
    if labels:
        raise ValueError("digit_scenes has captions, not classes; set model.num_classes to null.")
    return DigitScenes(config, seed)


def build_loader(dataset: Dataset, sampler: MicroStepSampler, num_workers: int) -> DataLoader:
    """Micro-batches for one process; the number of workers changes nothing but the speed."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
