"""Long-range test: two digits far apart always have one colour in the training pictures; do they in a model's?"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from localdit.command_line import Parser, start_process
from localdit.data.digit_scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    Glyph,
    Scene,
    group_by_class,
    load_digits,
    render_with_boxes,
)
from localdit.evaluation.generation import read_generation
from localdit.evaluation.images import list_images, to_images
from localdit.evaluation.intervals import rate_interval
from localdit.evaluation.processes import gathered, own_pictures
from localdit.evaluation.records import FILE, about_pictures, command_of, keep, make_record, scores_file

# Each digit fills a square on the falling diagonal: the upper left and the lower right one, `distance` pixels apart.
SQUARE = 16  # pixels along one side
FARTHEST = CANVAS - SQUARE  # pixels between the centres of squares in opposite corners, along either axis
PALETTE = np.array(list(COLOURS.values()))  # [colours, 3]
NO_COLOUR = -1  # what is read where no colour is certain

TOLERANCE = 100  # RGB distance within which a pixel has a colour; it reaches no second one, nor a background
MIN_INK, MAX_INK = 5, 200  # pixels of one colour in a square that holds a digit; 1 of 12,000 drawn has fewer
MIN_PURITY = 0.7  # share of the digit's colour among all coloured pixels of its square
RESAMPLES = 2000


def draw_pairs(
    count: int,
    rng: np.random.Generator,
    distance: int = FARTHEST,
    match: float = 1.0,
    split: Literal["train", "test"] = "train",
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pictures of two handwritten digits of one colour on the falling diagonal.

    Everything else is independent: the digits' classes and handwriting, the colour and the background. A model of these
    pictures makes both digits alike only where information travels from one to the other.

    Args:
        distance: pixels between the digits' centres along either axis, even, from 16 (their squares touch) to 48
            (opposite corners).
        match: the share of pictures whose digits have one colour by rule; in the others the colours are independent,
            so that Cramér's V of the colours is `match` in expectation.
        split: the handwriting to use, as for `load_digits`.

    Returns:
        the pictures uint8 [count, 64, 64, 3] and the digits' colours [count, 2], as indices into `COLOURS`.
    """
    squares = _squares(distance)
    if not 0 <= match <= 1:
        raise ValueError(f"match={match} is no share; give a number from 0 to 1.")
    handwriting = group_by_class(*load_digits(split))
    colours = rng.integers(len(COLOURS), size=(count, 2))
    matched = rng.random(count) < match
    colours[matched, 1] = colours[matched, 0]
    pictures = np.empty((count, CANVAS, CANVAS, 3), np.uint8)
    for picture, pair in zip(pictures, colours, strict=True):
        background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        picture[:] = BACKGROUNDS[background]
        for square, colour in zip(squares, pair, strict=True):
            _draw_digit(picture[square], tuple(COLOURS)[colour], background, rng, handwriting)
    return pictures, colours


def read_colours(images: Iterable[Image.Image] | np.ndarray, distance: int = FARTHEST) -> np.ndarray:
    """Read the colours of the two digits from pictures alone.

    The pixels near a colour of the palette vote in each square. There is a digit where they are neither too few nor
    too many, and nearly all agree.

    Args:
        images: pictures of 64x64 pixels, or an array as `to_images` takes it.
        distance: of the digits, as for `draw_pairs`.

    Returns:
        indices into `COLOURS`, [N, 2], or `NO_COLOUR`. Raises ValueError for pictures of another size.
    """
    squares = _squares(distance)
    pictures = to_images(images) if isinstance(images, np.ndarray) else images
    colours = [[_read_colour(pixels[square]) for square in squares] for pixels in map(_pixels, pictures)]
    return np.array(colours, np.int64).reshape(-1, 2)


def score_colours(colours: np.ndarray) -> dict:
    """Tell how often the two digits of a picture have one colour, and how far one tells the other.

    Args:
        colours: what `read_colours` returns, [N, 2].

    Returns:
        the number of "pictures"; the share that is "readable", which everything else is of: the share with "matching"
        digits with its 95% bootstrap "interval", the share that would match by "chance" if each digit kept its colours
        but knew nothing of the other, and "cramers_v": the "value" of `cramers_v` and its 95% bootstrap "interval".
        Raises ValueError where fewer than two pictures are readable.
    """
    readable = colours[(colours != NO_COLOUR).all(axis=1)]
    count = len(readable)
    if count < 2:
        raise ValueError(
            f"Too few pictures show a coloured digit in both squares ({count} of {len(colours)}, and 2 must); check "
            "the distance between the digits, or give more."
        )
    table = np.zeros((len(COLOURS), len(COLOURS)), np.int64)
    np.add.at(table, (readable[:, 0], readable[:, 1]), 1)
    matching = float(np.trace(table) / count)
    return {
        "pictures": len(colours),
        "readable": round(count / len(colours), 4),
        "matching": round(matching, 4),
        "interval": rate_interval(matching, count),
        "chance": round(float(table.sum(axis=0) @ table.sum(axis=1) / count**2), 4),
        "cramers_v": {"value": round(float(cramers_v(table)), 4), "interval": _cramers_v_interval(table)},
    }


def cramers_v(tables: np.ndarray, samplings: int = 1) -> np.ndarray:
    """Cramér's V of tables of counts [..., K, K]: 0 where rows and columns are independent, 1 where one tells all.

    Noise alone would raise it, by about (rows - 1) (columns - 1) / (n - 1) in its square, which is taken off (Bergsma
    2013, "A bias-correction for Cramér's V and Tschuprow's T"), once for each of the `samplings` that the counts went
    through. It is 0 where one side never varies, or the counts are too few to tell.
    """
    total = tables.sum(axis=(-2, -1))
    rows, columns = tables.sum(axis=-1), tables.sum(axis=-2)  # [..., K]
    expected = rows[..., :, None] * columns[..., None, :] / total[..., None, None]
    deviation = np.square(tables - expected) / np.where(expected > 0, expected, 1)
    row_freedom, column_freedom = (rows > 0).sum(axis=-1) - 1, (columns > 0).sum(axis=-1) - 1
    noise = samplings / (total - 1)
    squared = deviation.sum(axis=(-2, -1)) / total - noise * row_freedom * column_freedom
    largest = np.minimum(row_freedom - noise * row_freedom**2, column_freedom - noise * column_freedom**2)
    return np.sqrt(np.clip(squared / np.where(largest > 0, largest, np.inf), 0, 1))


def _cramers_v_interval(table: np.ndarray) -> list[float]:
    """The 95% bootstrap interval of Cramér's V over the pictures of a table [K, K]."""
    count = int(table.sum())
    cells = np.random.default_rng(0).multinomial(count, table.ravel() / count, size=RESAMPLES)
    values = cramers_v(cells.reshape(RESAMPLES, *table.shape), samplings=2)
    return (np.quantile(values, [0.025, 0.975]).round(4) + 0.0).tolist()  # 0 rather than -0


def _squares(distance: int) -> list[tuple[slice, slice]]:
    """Where the squares of the upper left and the lower right digit lie: slices of rows and columns."""
    if distance not in range(SQUARE, FARTHEST + 1, 2):
        raise ValueError(
            f"distance={distance} is no even number of pixels from {SQUARE} to {FARTHEST}; "
            f"give {FARTHEST} for opposite corners."
        )
    first = (FARTHEST - distance) // 2
    sides = [slice(start, start + SQUARE) for start in (first, first + distance)]
    return [(side, side) for side in sides]


def _draw_digit(
    square: np.ndarray, colour: str, background: str, rng: np.random.Generator, handwriting: list[np.ndarray]
) -> None:
    """Draw a random digit into a part of a picture [16, 16, 3], as large as fits."""
    scene = Scene(Glyph(colour, int(rng.integers(10))), background)
    picture, ((left, top, width, height),) = render_with_boxes(scene, rng, handwriting)
    digit = Image.fromarray(picture[top : top + height, left : left + width])
    # bilinear, because bicubic would overshoot into colours that are not in the scene
    digit = ImageOps.contain(digit, (SQUARE, SQUARE), Image.Resampling.BILINEAR)
    left, top = (SQUARE - digit.width) // 2, (SQUARE - digit.height) // 2
    square[top : top + digit.height, left : left + digit.width] = np.asarray(digit)


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.size != (CANVAS, CANVAS):
        raise ValueError(
            f"A picture has {picture.width} x {picture.height} pixels; those of this test have {CANVAS} x {CANVAS}."
        )
    return np.asarray(picture.convert("RGB"), np.int64)


def _read_colour(square: np.ndarray) -> int:
    """The colour of the digit in part of a picture, int [16, 16, 3]."""
    apart = np.square(square[:, :, None] - PALETTE).sum(axis=-1)  # [16, 16, colours]
    votes = (apart <= TOLERANCE**2).sum(axis=(0, 1))  # [colours]
    winner = int(votes.argmax())
    certain = MIN_INK <= votes[winner] <= MAX_INK and votes[winner] >= MIN_PURITY * votes.sum()
    return winner if certain else NO_COLOUR


def score_folder(folder: str | Path, distance: int = FARTHEST) -> list[dict[str, Any]]:
    """Records of how far the digits of a folder's pictures go together; several processes each read a part.

    Returns:
        records of "long_range_readable", "long_range_matching" (its "detail" tells the share by chance) and
        "long_range_cramers_v": see `score_colours`.

    Raises:
        ValueError: where a picture cannot be read or has another size, or too few show two digits.
    """
    paths = list_images(folder)
    colours = read_colours(own_pictures(paths, f"colours of {folder}"), distance)
    scores = score_colours(np.array(gathered(colours)))
    common = {
        "generated": about_pictures(folder, paths, [(CANVAS, CANVAS)]),
        "generation": read_generation(folder),
        "settings": {"distance": distance},
    }
    readable, association = scores["readable"], scores["cramers_v"]
    return [
        make_record("long_range_readable", readable, rate_interval(readable, scores["pictures"]), **common),
        make_record("long_range_matching", scores["matching"], scores["interval"], detail=scores, **common),
        make_record("long_range_cramers_v", association["value"], association["interval"], **common),
    ]


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog="python -m localdit.evaluation long-range",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help=f"folder with pictures of {CANVAS}x{CANVAS} pixels")
    parser.add_argument(
        "--distance", type=int, default=FARTHEST, help="pixels between the digits' centres along either axis"
    )
    parser.add_argument("--output", help=f"where lines are added, {FILE} beside the folder unless said")
    options = parser.parse_args(arguments)
    start_process("cpu")
    output = scores_file(options.folder, options.output)
    keep(score_folder(options.folder, options.distance), output, command_of(parser, arguments))
