"""Data sets that are read as they come."""

import io
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from config import DataConfig
from tests.training import tiny_config
from train.data import MicroStepSampler, build_loader
from train.datasets import build_dataset
from train.trainer import Trainer

COUNT = 24
BROKEN = 5


@pytest.fixture
def parquet(tmp_path):
    """Four Parquet files of pictures whose grey value is their number, with captions and labels; one is broken."""
    import datasets

    folder = tmp_path / "parquet"
    folder.mkdir()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    for part in range(4):
        rows = {"image": [], "text": [], "label": []}
        for number in range(part * 6, part * 6 + 6):
            encoded = io.BytesIO()
            Image.new("RGB", (40, 32), (10 * number,) * 3).save(encoded, "png")
            rows["image"].append({"bytes": b"broken" if number == BROKEN else encoded.getvalue(), "path": None})
            rows["text"].append(f"a red {number}")
            rows["label"].append(number % 2)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{part:05d}.parquet")
    return folder


def stream(folder, condition="caption", **settings):
    config = DataConfig(name="huggingface", path=str(folder), streaming=True, resolution=32, num_workers=0, **settings)
    return build_dataset(config, 3, condition)


def number_of(item: dict) -> int:
    return round((item["image"][0, 0, 0].item() + 1) * 127.5 / 10)


def read(source, steps, rank=0, world_size=1) -> list[dict]:
    return [source[key] for step in steps for key in source.keys(step, 3, rank, world_size)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_shows_every_picture_once_an_epoch_in_another_order(parquet, world_size):
    steps, epochs = COUNT // 3 // world_size, []
    for epoch in range(2):
        part = range(epoch * steps, (epoch + 1) * steps)
        items = [item for rank in range(world_size) for item in read(stream(parquet), part, rank, world_size)]
        assert all(item["caption"] == f"a red {number_of(item)}" for item in items)
        assert sum(bool(item["unreadable"]) for item in items) == 1
        counts = Counter(number_of(item) for item in items)
        assert sum(counts.values()) == COUNT  # for the broken one another stands in, perhaps of the next epoch
        assert len(set(range(COUNT)) - {BROKEN} - counts.keys()) == 0
        epochs.append([number_of(item) for item in items])
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_a_key_says_which_picture_whatever_was_read_before(parquet):
    whole = [number_of(item) for item in read(stream(parquet), range(16))]
    source = stream(parquet)
    for step in (11, 2, 9, 10, 15, 0):  # onwards and back
        assert [number_of(item) for item in read(source, [step])] == whole[3 * step : 3 * step + 3]
    assert [number_of(item) for item in read(pickle.loads(pickle.dumps(source)), [4])] == whole[12:15]
    keys = source.every(COUNT)[0]
    assert [number_of(source[key]) for key in keys] == whole[:COUNT]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(parquet, num_workers):
    sampler = MicroStepSampler(stream(parquet), 3, first=2, last=7, rank=0, world_size=1)
    seen = [batch["caption"] for batch in build_loader(sampler, num_workers)]
    assert len(seen) == 5 and seen == [batch["caption"] for batch in build_loader(sampler, 0)]


def test_labels_have_their_names(parquet):
    source = stream(parquet, "label")
    assert source.classes == ["even", "odd"]
    assert all(item["label"] == number_of(item) % 2 for item in read(source, range(4)))


def test_a_run_on_a_stream_resumes_to_the_bit(parquet, tmp_path):
    config = tiny_config(tmp_path / "whole", max_steps=8, checkpoint_every=4, sample_every=100)
    data = DataConfig(name="huggingface", path=str(parquet), streaming=True, resolution=64, num_workers=0)
    config = replace(config, data=data, model=replace(config.model, caption_channels=None, num_classes=2))
    whole = Trainer(config)
    whole.train()
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    Trainer(replace(parts, max_steps=5)).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000005")
    resumed = Trainer(replace(parts, resume="latest"))
    resumed.train()
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "condition", "phrase"),
    [
        ({"held_out": 0.1}, None, "data.held_out=0.1 needs to know all pictures beforehand"),
        ({"bucket_multiple": 8}, None, "data.bucket_multiple=8 needs"),
        ({"caption_column": "words"}, "caption", "has no column 'words' among"),
        ({"label_column": "text"}, "label", "has no names of classes for data.label_column='text'"),
        ({"split": "test"}, None, "cannot be loaded as a data set"),
    ],
)
def test_what_a_stream_cannot_do_is_one_sentence(parquet, settings, condition, phrase):
    with pytest.raises(ValueError, match=phrase):
        stream(parquet, condition, **settings)


def test_a_new_text_encoder_needs_its_words_beforehand(parquet, tmp_path):
    data = DataConfig(name="huggingface", path=str(parquet), streaming=True, num_workers=0)
    with pytest.raises(ValueError, match=r"name one by text_encoder.pretrained"):
        Trainer(replace(tiny_config(tmp_path / "run"), data=data))
