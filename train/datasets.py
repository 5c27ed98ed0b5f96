"""The pictures a run can train on: item p of these is a pure function of (seed, p), for any p."""

from pathlib import Path

import numpy as np
from PIL import Image

from config import DataConfig
from localdit.data import digit_scenes
from localdit.data.labelled_images import SETS, Split, load_labelled_images
from train.buckets import epoch_order
from train.data import Condition, Source
from train.pictures import PictureSource, to_tensor
from train.precomputed import PrecomputedSource
from train.records import RECORDS, load_records
from train.streaming import StreamSource

BEYOND_SEEDS = 2**32  # no run has such a seed
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")


class DigitScenes(Source):
    """Endless captioned digit scenes; position p is drawn from a generator seeded by (seed, p)."""

    def __init__(self, config: DataConfig, seed: int):
        super().__init__(config.resolution, seed)
        if config.resolution != digit_scenes.CANVAS:
            raise ValueError(
                f"data.resolution={config.resolution}, but digit scenes are {digit_scenes.CANVAS} pixels wide; "
                f"set {digit_scenes.CANVAS}."
            )
        self.config = config

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


class LabelledSet(Source):
    """The grey pictures of MNIST and its like, in a new order every epoch, resized to the resolution."""

    channels = 1

    def __init__(self, config: DataConfig, seed: int, condition: Condition | None, split: Split = "train"):
        super().__init__(config.resolution, seed)
        images, self.labels, classes = load_labelled_images(config.name, split, config.path)
        self.images = resized(images, config.resolution)[..., None]
        self.classes = list(classes) if condition == "label" else None

    def every(self, count: int | None) -> dict[int, list[int]]:
        return super().every(len(self.images))  # the first epoch

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.images))
        row = epoch_order(len(self.images), self.seed, epoch)[offset]
        item: dict = {"name": f"picture {row}", "image": to_tensor(self.images[row])}
        if self.classes is not None:
            item["label"] = int(self.labels[row])
        return item


class PhotoPatches(Source):
    """Endless square patches of scikit-image's CC0 photographs, each at its own place, scale and side."""

    def __init__(self, config: DataConfig, seed: int):
        super().__init__(config.resolution, seed)
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

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng((self.seed, position))
        photo = self.photos[rng.integers(len(self.photos))]
        # a patch shows between the least that need not be enlarged and the whole height
        side = int(np.exp(rng.uniform(np.log(self.resolution), np.log(min(photo.size)))))
        left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        patch = np.asarray(photo.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC, box=box))
        return {"name": f"patch {position}", "image": to_tensor(patch[:, ::-1] if rng.random() < 0.5 else patch)}


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Grey pictures uint8 [N, height, width] in another size, [N, side, side]."""
    pictures = (Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images)
    return np.stack([np.asarray(picture) for picture in pictures])


def build_dataset(config: DataConfig, seed: int, condition: Condition | None, split: Split = "train") -> Source:
    """The source that the config names, with what the model is conditioned on; for "test" other pictures of its kind.

    Raises:
        ValueError: where the data have no such condition, or cannot be loaded.
    """
    if config.name == "precomputed":
        return PrecomputedSource(config, seed, condition, split)
    if config.name == "huggingface" and config.streaming:
        return StreamSource(config, seed, condition, split)
    if config.name in RECORDS:
        return PictureSource(load_records(config, condition), config, seed, condition, split)
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
        return LabelledSet(config, seed, condition, split)
    endless = DigitScenes if config.name == "digit_scenes" else PhotoPatches
    return endless(config, seed if split == "train" else seed + BEYOND_SEEDS)
