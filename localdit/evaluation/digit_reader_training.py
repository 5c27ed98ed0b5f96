"""Training of the digit scene reader, on scenes drawn more wildly than those a generator learns from."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from localdit.data.digit_scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    group_by_class,
    render_with_boxes,
    sample_scene,
)
from localdit.evaluation.digit_reader import CELLS, STRIDE, DigitSceneReader, crop_ink

BATCH_SIZE = 32
SPREAD = 3.0  # standard deviation, in pixels, of a digit's mark on the map; digits can stand 5 pixels apart


@dataclass
class Batch:
    """Scenes, and what is to be read in them; B scenes with n digits in all."""

    pictures: torch.Tensor  # float [B, 3, 64, 64] in [0, 1]
    background: torch.Tensor  # index [B]
    picture: torch.Tensor  # the scene a digit belongs to, index [n]
    place: torch.Tensor  # (x, y, width, height) in pixels, float [n, 4]
    digit: torch.Tensor  # [n]
    colour: torch.Tensor  # index [n]


def train_reader(
    images: np.ndarray, labels: np.ndarray, steps: int = 2500, seed: int = 0, bf16: bool = False
) -> DigitSceneReader:
    """Train a reader on scenes drawn with the given handwriting.

    Args:
        images, labels: handwritten digits uint8 [N, 28, 28] and their classes [N], every class among them.
        steps: the number of batches of 32 scenes, at least 1.
        seed: fixes the weights the reader starts from and every scene it sees.
        bf16: compute in bfloat16, which is faster on a CPU that has instructions for it.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not a positive number of training steps.")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    reader = convert_conv2d_weight_memory_format(DigitSceneReader().train(), torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.15)
    handwriting = []
    for step in range(steps):
        if step % 25 == 0:
            handwriting = group_by_class(_distort(images), labels)
        loss = _loss(reader, _draw_batch(handwriting, rng), bf16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    return convert_conv2d_weight_memory_format(reader, torch.contiguous_format).eval()


def _loss(reader: DigitSceneReader, batch: Batch, bf16: bool) -> torch.Tensor:
    # The finder will be a little off when it reads, so the digit is recognised in a square that is a little off.
    jitter = torch.randn_like(batch.place) * torch.tensor([1.2, 1.2, 1.5, 1.5])
    ink = crop_ink(batch.pictures, batch.picture, batch.place + jitter, batch.colour, batch.background[batch.picture])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        centre, size, colour, background = reader(batch.pictures)
        digit = reader.recognise(ink.contiguous(memory_format=torch.channels_last))

    cell = STRIDE * (torch.arange(CELLS) + 0.5)
    across, down = cell - batch.place[:, 0, None], cell - batch.place[:, 1, None]  # [n, 16]
    near = torch.exp(-(across[:, None, :] ** 2 + down[:, :, None] ** 2) / (2 * SPREAD**2))  # [n, 16, 16]
    nearness = torch.zeros(len(centre), CELLS, CELLS)
    for index, near_one in zip(batch.picture.tolist(), near, strict=True):
        nearness[index] = torch.maximum(nearness[index], near_one)
    centre_loss = F.binary_cross_entropy_with_logits(centre.float(), nearness, reduction="sum") / len(centre)
    # Only the cells close to a digit's centre are asked for its size and colour.
    index, row, column = (near > 0.3).nonzero(as_tuple=True)
    asked = batch.picture[index]
    size_loss = F.l1_loss(size.float()[asked, :, row, column], torch.log(batch.place[index, 2:] / 32))
    colour_loss = F.cross_entropy(colour.float()[asked, :, row, column], batch.colour[index])
    background_loss = F.cross_entropy(background.float(), batch.background)
    digit_loss = F.cross_entropy(digit.float(), batch.digit, label_smoothing=0.05)
    return 0.3 * centre_loss + size_loss + colour_loss + background_loss + digit_loss


def _draw_batch(handwriting: list[np.ndarray], rng: np.random.Generator) -> Batch:
    """Draw scenes of every combination, also of the held-out ones: a reader must know no language."""
    pictures = np.empty((BATCH_SIZE, CANVAS, CANVAS, 3), np.uint8)
    background, digits = [], []
    for index in range(BATCH_SIZE):
        scene = sample_scene(rng, held_out=rng.random() < 0.1)
        pictures[index], boxes = render_with_boxes(
            scene, rng, handwriting, max_rotation=12.0, max_shear=0.2, max_stretch=0.15
        )
        background.append(tuple(BACKGROUNDS).index(scene.background))
        for glyph, (left, top, width, height) in zip(scene.glyphs, boxes.tolist(), strict=True):
            place = (left + width / 2, top + height / 2, float(width), float(height))
            digits.append((index, place, glyph.digit, tuple(COLOURS).index(glyph.colour)))
    picture, place, digit, colour = (torch.tensor(column) for column in zip(*digits, strict=True))
    spoiled = _spoil(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    return Batch(spoiled, torch.tensor(background), picture, place, digit, colour)


def _distort(images: np.ndarray) -> np.ndarray:
    """Bend handwritten digits uint8 [N, 28, 28] elastically and change the thickness of their strokes."""
    ink = torch.from_numpy(images).unsqueeze(1) / 255  # [N, 1, 28, 28]
    count, size = len(ink), ink.shape[-1]
    bend = F.interpolate(0.06 * torch.randn(count, 2, 6, 6), size=(size, size), mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(ink.shape), align_corners=False)
    ink = F.grid_sample(ink, identity + bend.permute(0, 2, 3, 1), align_corners=False)
    thicker, thinner = F.max_pool2d(ink, 3, stride=1, padding=1), -F.max_pool2d(-ink, 3, stride=1, padding=1)
    change = 0.6 * torch.rand(count, 1, 1, 1) - 0.3
    ink = ink + change.clamp(min=0) * (thicker - ink) + (-change).clamp(min=0) * (thinner - ink)
    ink = ink / ink.amax(dim=(2, 3), keepdim=True)
    return (255 * ink.squeeze(1)).round().byte().numpy()


def _spoil(pictures: torch.Tensor) -> torch.Tensor:
    """Make pictures [B, 3, 64, 64] imperfect: duller or tinted, blurred, blotchy, noisy, each by a random amount."""
    count = len(pictures)
    contrast = 1 - 0.2 * torch.rand(count, 3, 1, 1)
    pictures = 0.5 + contrast * (pictures - 0.5) + 0.05 * torch.randn(count, 3, 1, 1)
    blur = (1.5 * torch.rand(count, 1, 1, 1) - 0.5).clamp(min=0)
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    pictures = pictures + blur * (F.avg_pool2d(padded, 3, stride=1) - pictures)
    blotches = F.interpolate(torch.randn(count, 3, 16, 16), scale_factor=4.0, mode="bilinear")
    amounts = 0.05 * torch.rand(2, count, 1, 1, 1)
    pictures = pictures + amounts[0] * blotches + amounts[1] * torch.randn_like(pictures)
    return pictures.clamp(0, 1).contiguous(memory_format=torch.channels_last)
