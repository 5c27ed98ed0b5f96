"""What the trainer reads: its order, its pictures, their captions."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import (
    DataConfig,
)
from train.data import MicroStepSampler
from train.datasets import DigitScenes, ImageFolder


def test_every_position_is_seen_once_over_micro_steps_and_ranks():
    samplers = [MicroStepSampler(batch_size=4, first=0, last=10, rank=rank, world_size=3) for rank in range(3)]
    seen = [position for sampler in samplers for batch in sampler for position in batch]
    assert sorted(seen) == list(range(10 * 3 * 4))
    assert all(len(sampler) == 10 for sampler in samplers)


def test_resuming_continues_the_order_where_it_was():
    whole = list(MicroStepSampler(4, first=0, last=10, rank=1, world_size=2))
    assert list(MicroStepSampler(4, first=6, last=10, rank=1, world_size=2)) == whole[6:]


def test_digit_scenes_depend_on_seed_and_position_only():
    first, again = (DigitScenes(DataConfig(), seed=3)[7] for _ in range(2))
    other = DigitScenes(DataConfig(), seed=4)[7]
    assert torch.equal(first["image"], again["image"]) and first["caption"] == again["caption"]
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].min() >= -1 and first["image"].max() <= 1


def test_recoloured_scenes_come_with_a_source_of_the_same_shapes():
    data = DigitScenes(DataConfig(recoloured=0.5, one_digit=1.0), seed=0)
    pairs = [data[position] for position in range(60)]
    changed = [pair for pair in pairs if not torch.equal(pair["image"], pair["source"])]
    assert 15 < len(changed) < 45
    assert all(" above " not in pair["caption"] and " of " not in pair["caption"] for pair in pairs)
    for pair in changed:
        # the ground is grey, so a pixel is of the ground exactly if it has the colour of the corner
        grounds = [(picture - picture[:, :1, :1]).abs().amax(0) < 0.01 for picture in (pair["image"], pair["source"])]
        assert (grounds[0] != grounds[1]).float().mean() < 0.01


def test_image_folder_shows_every_picture_once_an_epoch_in_another_order(picture_folder):
    data = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder), resolution=32), 0, condition="caption")
    epochs = [[data[epoch * 6 + index]["caption"] for index in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data[0]["image"].shape == (3, 32, 32)


def test_image_folder_of_classes_labels_by_folder(picture_folder):
    data = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder), resolution=32), 0, condition="label")
    assert data.classes == ["cat", "dog"]
    assert sorted(data[index]["label"] for index in range(6)) == [0, 0, 0, 1, 1, 1]


def test_pictures_are_turned_as_their_camera_was_held(picture_folder):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # the right side was up
    for path in picture_folder.glob("*/*.png"):
        Image.fromarray(pixels).save(path, exif=turned)
    data = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder), resolution=32), 0, condition="caption")
    image = data[0]["image"]
    assert (image[:, :15] == -1).all() and (image[:, 17:] == 1).all()


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ('{"file_name": "cat/0.png", "text": 5}', "Line 2 of .*metadata.jsonl is not"),
        ('{"text": "a cat"}', "Line 2 of .*metadata.jsonl is not"),
        ("[]", "Line 2 of .*metadata.jsonl is not"),
        ("{", "Line 2 of .*metadata.jsonl is not"),
    ],
)
def test_a_line_of_metadata_that_cannot_be_read_is_named(picture_folder, line, phrase):
    first = '{"file_name": "cat/1.png", "text": "a cat"}'
    (picture_folder / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=phrase):
        ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder)), 0, condition="caption")


def test_a_caption_in_another_encoding_is_named(picture_folder):
    (picture_folder / "dog" / "1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"dog.1\.txt is not UTF-8 .*; save it as UTF-8"):
        ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder)), 0, condition="caption")


def test_a_picture_without_caption_and_an_unreadable_one_are_named(picture_folder):
    config = DataConfig(name="imagefolder", path=str(picture_folder), resolution=32)
    (picture_folder / "cat" / "0.png").write_bytes(b"no picture")
    data = ImageFolder(config, 0, condition="caption")
    with pytest.raises(ValueError, match=r"cat.0\.png cannot be read"):
        [data[index] for index in range(6)]
    (picture_folder / "dog" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"dog.1\.png .* no caption"):
        ImageFolder(config, 0, condition="caption")
