"""The pictures a run can train on: item p of a dataset is a pure function of (seed, p), for any p."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from config import DataConfig
from localdit.data import digit_scenes
from localdit.data.labelled_images import SETS, load_labelled_images

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")

Condition = Literal["caption", "label"]


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
        return {"name": f"scene {position}", "image": image, "source": seen, "caption": scene.caption}


class LabelledSet(Dataset):
    """The grey pictures of MNIST and its like, in a new order every epoch, resized to the resolution."""

    channels = 1

    def __init__(self, config: DataConfig, seed: int, condition: Condition | None):
        images, self.labels, classes = load_labelled_images(config.name, "train", config.path)
        self.images = resized(images, config.resolution)[..., None]
        self.classes = list(classes) if condition == "label" else None
        self.seed = seed

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.images))
        row = epoch_order(len(self.images), self.seed, epoch)[offset]
        item: dict = {"name": f"picture {row}", "image": to_tensor(self.images[row])}
        if self.classes is not None:
            item["label"] = int(self.labels[row])
        return item


class PhotoPatches(Dataset):
    """Endless square patches of scikit-image's CC0 photographs, each at its own place, scale and side."""

    channels = 3
    classes = None

    def __init__(self, config: DataConfig, seed: int):
        try:
            import skimage
        except ImportError as error:
            raise ImportError("The photographs come with scikit-image; install it: pip install scikit-image") from error
        folder = Path(str(skimage.__file__)).parent / "data"
        self.photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
        smallest = min(min(photo.size) for photo in self.photos)
        if config.resolution > smallest:
            raise ValueError(
                f"data.resolution={config.resolution}, but the photographs are only {smallest} pixels high."
            )
        self.resolution = config.resolution
        self.seed = seed

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng((self.seed, position))
        photo = self.photos[rng.integers(len(self.photos))]
        # a patch shows between the least that need not be enlarged and the whole height
        side = int(np.exp(rng.uniform(np.log(self.resolution), np.log(min(photo.size)))))
        left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        patch = np.asarray(photo.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC, box=box))
        return {"name": f"patch {position}", "image": to_tensor(patch[:, ::-1] if rng.random() < 0.5 else patch)}


class ImageFolder(Dataset):
    """Pictures of a folder in a new order every epoch.

    Captions come from .txt files or metadata.jsonl, classes from the names of the folders.
    """

    channels = 3

    def __init__(self, config: DataConfig, seed: int, condition: Condition | None):
        if config.path is None or not Path(config.path).is_dir():
            raise ValueError(f"data.path={config.path!r} is not a folder; give the folder of your pictures.")
        root = Path(config.path)
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ValueError(f"{root} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}); check data.path.")
        self.classes = sorted({path.parent.name for path in self.files}) if condition == "label" else None
        self.captions = read_captions(root, self.files) if condition == "caption" else None
        self.resolution = config.resolution
        self.seed = seed

    def words(self) -> list[str]:
        return sorted({word for caption in self.captions or () for word in caption.lower().split()})

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.files))
        row = epoch_order(len(self.files), self.seed, epoch)[offset]
        path = self.files[row]
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                pixels = np.asarray(crop_to_square(upright, self.resolution))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a picture ({error}); repair or remove it.") from error
        item: dict = {"name": str(path), "image": to_tensor(pixels)}
        if self.classes is not None:
            item["label"] = self.classes.index(path.parent.name)
        if self.captions is not None:
            item["caption"] = self.captions[row]
        return item


def read_captions(root: Path, files: list[Path]) -> list[str]:
    """The caption of each file: from a .txt of the same name, or from the root's metadata.jsonl (file_name, text).

    Raises:
        ValueError: where a line of metadata.jsonl cannot be read, or a picture has no caption.
    """
    metadata = {}
    listing = root / "metadata.jsonl"
    lines = read_text(listing).splitlines() if listing.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["text"], str):
                raise TypeError("its text is no text")
            metadata[root / entry["file_name"]] = entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'Line {number} of {listing} is not {{"file_name": "...", "text": "..."}}; correct it.'
            ) from error
    captions, missing = [], []
    for file in files:
        text = file.with_suffix(".txt")
        if file in metadata:
            captions.append(metadata[file])
        elif text.is_file():
            captions.append(read_text(text).strip())
        else:
            missing.append(file)
    if missing:
        raise ValueError(
            f"{missing[0]} and {len(missing) - 1} other picture(s) have no caption; put it into a .txt file of the "
            "same name or into metadata.jsonl, or set model.caption_channels to null and train on classes or nothing."
        )
    return captions


def read_text(file: Path) -> str:
    """The text of a file; raises a ValueError that names it where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(length) for one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length).tolist()


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Grey pictures uint8 [N, height, width] in another size, [N, side, side]."""
    pictures = (Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images)
    return np.stack([np.asarray(picture) for picture in pictures])


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


def build_dataset(
    config: DataConfig, seed: int, condition: Condition | None
) -> DigitScenes | ImageFolder | LabelledSet | PhotoPatches:
    """The dataset that the config names, with what the model is conditioned on.

    Raises:
        ValueError: where the data have no such condition, or cannot be loaded.
    """
    if config.name == "imagefolder":
        return ImageFolder(config, seed, condition)
    kinds = {"digit_scenes": "caption", "photo_patches": None}
    has = kinds.get(config.name, "label")
    if condition is not None and condition != has:
        remedy = {
            "caption": "set model.num_classes to null and model.caption_channels to the text encoder's width",
            "label": "set model.caption_channels to null, and model.num_classes to their number or null",
            None: "set model.caption_channels and model.num_classes to null",
        }
        raise ValueError(f"{config.name} has {has or 'nothing'} to be conditioned on, not {condition}s; {remedy[has]}.")
    if config.name in SETS:
        return LabelledSet(config, seed, condition)
    return DigitScenes(config, seed) if config.name == "digit_scenes" else PhotoPatches(config, seed)
