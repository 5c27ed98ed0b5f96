"""The digit scene reader: finds the digits of a 64x64 picture, their colours and places, and its background."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from localdit.data.digit_scenes import BACKGROUNDS, CANVAS, COLOURS, DIGITS

STRIDE = 4  # pixels along one side of a cell of the grid in which digits are looked for
CELLS = CANVAS // STRIDE
CROP = 28  # samples along one side of the square in which a digit is recognised


@dataclass(frozen=True)
class Reading:
    """One digit found in a picture: its centre (x, y) in pixels, and the probability that a digit is there."""

    colour: str
    digit: int
    centre: tuple[float, float]
    score: float


@dataclass(frozen=True)
class SceneReading:
    """What was found in one picture; the digits come with the most certain one first."""

    digits: tuple[Reading, ...]
    background: str


def _convolution(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    padding = (kernel_size - stride + 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


class DigitSceneReader(nn.Module):
    """Two small convolutional networks, one to find digits and one to recognise them.

    The first looks for digit centres in a 16x16 grid (after Zhou et al. 2019, "Objects as Points"), and for the width,
    height and colour of each digit. The second sees one digit at a time, as the ink of its colour in a square of 28x28
    samples around it, so that colour, size and place no longer matter.
    """

    def __init__(self):
        super().__init__()
        self.cells = nn.Sequential(
            *_convolution(3, 24, kernel_size=4, stride=2),
            *_convolution(24, 48, kernel_size=4, stride=2),
            *_convolution(48, 48),
        )
        self.surroundings = nn.Sequential(
            *_convolution(48, 48, kernel_size=4, stride=2), *_convolution(48, 48), *_convolution(48, 48)
        )
        self.merge = nn.Sequential(*_convolution(48, 48), *_convolution(48, 48))
        self.cell_head = nn.Conv2d(48, 3 + len(COLOURS), 1)
        self.background_head = nn.Linear(48, len(BACKGROUNDS))
        self.recognise = nn.Sequential(
            *_convolution(1, 24),
            *_convolution(24, 24),
            nn.MaxPool2d(2),
            *_convolution(24, 48),
            *_convolution(48, 48),
            nn.MaxPool2d(2),
            *_convolution(48, 96),
            *_convolution(96, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, len(DIGITS)),
        )

    def forward(self, images):
        """Look for digits in images, float [B, 3, 64, 64] in [0, 1].

        Returns:
            for every cell the logit of a digit's centre [B, 16, 16], the logarithm of the width and height of its ink
            in units of 32 pixels [B, 2, 16, 16] and the logits of its colour [B, 6, 16, 16]; and for the whole picture
            the logits of the background [B, 3].
        """
        cells = self.cells(2 * images - 1)  # [B, 48, 16, 16]
        surroundings = self.surroundings(cells)  # [B, 48, 8, 8]
        merged = self.merge(cells + F.interpolate(surroundings, scale_factor=2.0))
        centre, size, colour = self.cell_head(merged).split([1, 2, len(COLOURS)], dim=1)
        return centre.squeeze(1), size, colour, self.background_head(surroundings.mean(dim=(2, 3)))

    @torch.no_grad()
    def read(self, images, threshold: float = 0.3) -> list[SceneReading]:
        """Read pictures on the CPU: a list of PIL images or uint8 [B, 64, 64, 3]; raises ValueError for other sizes.

        A digit is reported where the probability of a centre is at least threshold and no lower than in the eight
        cells around, unless that place lies within a digit that is more certain.
        """
        self.eval()
        pictures = _to_tensor(images)
        readings = []
        for start in range(0, len(pictures), 64):
            readings += self._read(pictures[start : start + 64], threshold)
        return readings

    def _read(self, pictures: torch.Tensor, threshold: float) -> list[SceneReading]:
        centre, size, colour, background = self(pictures)
        background = background.argmax(dim=1)
        picture, place, colour, score = locate(centre, size, colour, threshold)
        if len(picture):
            digit = self.recognise(crop_ink(pictures, picture, place, colour, background[picture])).argmax(dim=1)
        else:
            digit = picture
        found = [[] for _ in pictures]
        for index in range(len(picture)):
            middle = (float(place[index, 0]), float(place[index, 1]))
            name = tuple(COLOURS)[int(colour[index])]
            found[int(picture[index])].append(Reading(name, int(digit[index]), middle, float(score[index])))
        names = [tuple(BACKGROUNDS)[index] for index in background.tolist()]
        return [SceneReading(tuple(digits), name) for digits, name in zip(found, names, strict=True)]


def locate(centre, size, colour, threshold: float = 0.3):
    """Turn what `DigitSceneReader.forward` says of the cells into a list of n digits.

    A peak and the eight cells around it vote on the digit, each as strongly as it is sure to be the centre. A digit
    whose centre lies within a more certain one is dropped.

    Returns:
        the index of the picture [n], the (x, y, width, height) in pixels [n, 4], the index of the colour [n] and the
        probability of being a digit [n], with the most certain digits first.
    """
    found = centre.sigmoid()  # [B, 16, 16]
    peaks = (found >= threshold) & (found == F.max_pool2d(found, 3, stride=1, padding=1))
    picture, row, column = peaks.nonzero(as_tuple=True)
    order = found[peaks].argsort(descending=True)
    picture, row, column = picture[order], row[order], column[order]

    def around(values):
        """Gather the neighbourhoods [n, C, 3, 3] of the peaks from values [B, C, 16, 16]."""
        windows = F.pad(values, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, C, 16, 16, 3, 3]
        return windows[picture, :, row, column]

    vote = around(found.unsqueeze(1))  # [n, 1, 3, 3]
    vote = vote / vote.sum(dim=(2, 3), keepdim=True)
    step = torch.tensor([-1.0, 0.0, 1.0])
    x = STRIDE * (column + 0.5 + (vote * step).sum(dim=(1, 2, 3)))
    y = STRIDE * (row + 0.5 + (vote * step[:, None]).sum(dim=(1, 2, 3)))
    size = 32 * (around(size) * vote).sum(dim=(2, 3)).exp()  # [n, 2]
    colour = (around(colour) * vote).sum(dim=(2, 3)).argmax(dim=1)
    place = torch.cat([x[:, None], y[:, None], size], dim=1)

    distance = (place[:, None, :2] - place[None, :, :2]).abs()  # [n, n, 2]
    within = (distance < size / 2).all(dim=2) & (picture[:, None] == picture)
    keep = ~within.tril(diagonal=-1).any(dim=1)
    return picture[keep], place[keep], colour[keep], found[picture, row, column][keep]


def crop_ink(pictures, picture, place, colour, background):
    """Cut digits out of their pictures, as ink in [0, 1] whatever their colour, size and place.

    Args:
        pictures: float [B, 3, 64, 64] in [0, 1].
        picture: for each of n digits, the index of its picture [n].
        place: its (x, y, width, height) in pixels [n, 4].
        colour, background: the indices of its colour and its background [n].

    Returns:
        ink [n, 1, 28, 28] in a square slightly larger than the digit.
    """
    ground = torch.tensor(list(BACKGROUNDS.values()))[background, None] / 255  # [n, 1]
    direction = torch.tensor(list(COLOURS.values()))[colour] / 255 - ground  # [n, 3]
    direction = direction / direction.square().sum(dim=1, keepdim=True)
    ink = torch.einsum("nchw,nc->nhw", pictures[picture] - ground[:, :, None, None], direction)
    square = torch.zeros(len(place), 2, 3)
    square[:, 0, 0] = square[:, 1, 1] = (1.15 * place[:, 2:].amax(dim=1) + 1) / CANVAS
    square[:, :, 2] = 2 * place[:, :2] / CANVAS - 1
    grid = F.affine_grid(square, [len(place), 1, CROP, CROP], align_corners=False)
    return F.grid_sample(ink.clamp(0, 1).unsqueeze(1), grid, align_corners=False)


def load_reader(path: str | Path) -> DigitSceneReader:
    """Load a reader that was saved after training; raises FileNotFoundError or ValueError when path holds none."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no reader at {path}; train one: python -m localdit.evaluation.digit_scenes train --output {path}"
        )
    reader = DigitSceneReader()
    try:
        reader.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not hold the weights of a DigitSceneReader.") from error
    return reader.eval()


def _to_tensor(images) -> torch.Tensor:
    """Bring a list of PIL images or uint8 [B, 64, 64, 3] to float [B, 3, 64, 64] in [0, 1]."""
    if not isinstance(images, np.ndarray):
        images = [np.asarray(image.convert("RGB")) for image in images]
    for image in images:
        if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"The reader takes RGB pictures of {CANVAS}x{CANVAS} pixels in uint8, "
                f"but one has the shape {image.shape} (height, width, channels) in {image.dtype}."
            )
    if len(images) == 0:
        return torch.empty(0, 3, CANVAS, CANVAS)
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2) / 255
