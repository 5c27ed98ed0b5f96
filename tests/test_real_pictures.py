"""Real pictures to score against: what training sees, in files."""

import numpy as np
import pytest
from PIL import Image

from config import DataConfig, ModelConfig, RealPicturesConfig, TrainConfig
from localdit.data.labelled_images import load_labelled_images
from train.datasets import build_dataset, resized
from train.real_pictures import write_pictures

CLASSES = ModelConfig(caption_channels=None, num_classes=10, in_channels=1)


def recipe(tmp_path, model: ModelConfig, **data) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path / "run"), model=model, data=DataConfig(**data))


def test_the_files_hold_the_held_out_pictures_at_the_size_of_training(tmp_path):
    run = recipe(tmp_path, CLASSES, name="sklearn_digits", resolution=16)
    count = write_pictures(RealPicturesConfig(run, str(tmp_path / "images")))
    held_out = load_labelled_images("sklearn_digits", "test")[0]
    written = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").glob("*.png"))]
    assert count == len(written) == len(held_out)
    expected = {picture.tobytes() for picture in resized(held_out, 16)}
    assert {picture.tobytes() for picture in written} == expected
    assert not (tmp_path / "prompts.txt").exists()


def test_captions_stand_beside_the_pictures_and_all_in_one_file(tmp_path):
    run = recipe(tmp_path, ModelConfig(caption_channels=8), name="digit_scenes", resolution=64)
    assert write_pictures(RealPicturesConfig(run, str(tmp_path / "images"), count=4)) == 4
    source = build_dataset(run.data, run.seed, "caption", "test")
    captions = (tmp_path / "prompts.txt").read_text().splitlines()
    assert captions == [source[number]["caption"] for number in range(4)]
    assert [(tmp_path / "images" / f"{number:05}.txt").read_text() for number in range(4)] == captions
    pixels = np.asarray(Image.open(tmp_path / "images" / "00002.png"))
    seen = (source[2]["image"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(pixels - seen).max() <= 0.5
    assert (build_dataset(run.data, run.seed, "caption", "train")[2]["image"] != source[2]["image"]).any()


def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path):
    scenes = recipe(tmp_path, ModelConfig(caption_channels=8), name="digit_scenes", resolution=64)
    digits = recipe(tmp_path, CLASSES, name="sklearn_digits", resolution=16)
    with pytest.raises(ValueError, match="have no end"):
        write_pictures(RealPicturesConfig(scenes, str(tmp_path / "images")))
    with pytest.raises(ValueError, match="count=5000 are more pictures than there are"):
        write_pictures(RealPicturesConfig(digits, str(tmp_path / "images"), count=5000))
    assert not (tmp_path / "images").exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        write_pictures(RealPicturesConfig(digits, str(tmp_path), count=5))
