"""What the trainer reads: its order, its pictures, their captions."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse.csgraph import connected_components

from config import DataConfig, ScanConfig
from tests.training import tiny_config
from train import scan
from train.data import Condition, MicroStepSampler, Source
from train.datasets import DigitScenes, build_dataset
from train.pictures import PictureSource
from train.trainer import Trainer


def test_every_position_is_seen_once_over_micro_steps_and_ranks():
    samplers = [
        MicroStepSampler(Source(8, 0), batch_size=4, first=0, last=10, rank=rank, world_size=3) for rank in range(3)
    ]
    seen = [position for sampler in samplers for batch in sampler for position in batch]
    assert sorted(seen) == list(range(10 * 3 * 4))
    assert all(len(sampler) == 10 for sampler in samplers)


def test_resuming_continues_the_order_where_it_was():
    whole = list(MicroStepSampler(Source(8, 0), 4, first=0, last=10, rank=1, world_size=2))
    assert list(MicroStepSampler(Source(8, 0), 4, first=6, last=10, rank=1, world_size=2)) == whole[6:]


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


def folder_source(folder: Path, condition: Condition | None, **settings) -> PictureSource:
    source = build_dataset(DataConfig(name="imagefolder", path=str(folder), resolution=32, **settings), 0, condition)
    assert isinstance(source, PictureSource)
    return source


def items(source: Source, micro_steps: range, batch_size: int = 1) -> list[dict]:
    return [source[key] for step in micro_steps for key in source.keys(step, batch_size, rank=0, world_size=1)]


def test_image_folder_shows_every_picture_once_an_epoch_in_another_order(picture_folder):
    data = folder_source(picture_folder, "caption")
    epochs = [[item["caption"] for item in items(data, range(6 * epoch, 6 * epoch + 6))] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert items(data, range(1))[0]["image"].shape == (3, 32, 32)


def test_image_folder_of_classes_labels_by_folder(picture_folder):
    data = folder_source(picture_folder, "label")
    assert data.classes == ["cat", "dog"]
    assert sorted(item["label"] for item in items(data, range(6))) == [0, 0, 0, 1, 1, 1]


def test_a_picture_beside_the_folders_of_the_classes_makes_no_class(picture_folder):
    Image.new("L", (32, 32)).save(picture_folder / "contact_sheet.png")
    with pytest.raises(ValueError, match=r"contact_sheet\.png and 0 other.*beside the folders of the classes"):
        folder_source(picture_folder, "label")


def test_pictures_are_turned_as_their_camera_was_held(picture_folder):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # the right side was up
    for path in picture_folder.glob("*/*.png"):
        Image.fromarray(pixels).save(path, exif=turned)
    image = items(folder_source(picture_folder, "caption"), range(1))[0]["image"]
    assert (image[:, :15] == -1).all() and (image[:, 17:] == 1).all()


def odd_pictures() -> dict[str, Image.Image]:
    """A grey of 128 in the left half and of 64 in the right, as pictures of many kinds."""
    pixels = np.full((32, 32), 128, dtype=np.uint8)
    pixels[:, 16:] = 64
    grey = Image.fromarray(pixels)
    clear = Image.merge("LA", (grey, Image.fromarray(np.where(pixels == 128, 255, 0).astype(np.uint8))))
    palette = grey.convert("P")
    palette.info["transparency"] = palette.getpixel((31, 0))
    return {
        "grey.png": grey,
        "sixteen_bits.png": Image.fromarray(pixels.astype(np.uint16) * 257),
        "thirty_two_bits.tif": Image.fromarray(pixels.astype(np.int32) * 257),
        "ink.tif": grey.convert("RGB").convert("CMYK"),
        "clear.png": clear,
        "clear_rgb.webp": clear.convert("RGBA"),
        "palette.png": palette,
        "palette.gif": palette,
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_a_picture_of_any_kind_is_what_a_person_sees_on_white(tmp_path, name):
    odd_pictures()[name].save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    image = items(folder_source(tmp_path, None), range(1))[0]["image"]
    right = 255 if "clear" in name or "palette" in name else 64
    for half, wanted in ((image[:, :, :15], 128), (image[:, :, 17:], right)):
        assert ((half + 1) * 127.5 - wanted).abs().max() < 1.5


def test_of_an_animation_the_first_picture_is_seen(tmp_path):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("black", "white"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert (items(folder_source(tmp_path, None), range(1))[0]["image"] == -1).all()


def test_pixels_without_a_known_white_are_told_of(tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "known.png")
    Image.fromarray(np.ones((32, 32), dtype=np.float32)).save(tmp_path / "floats.tif")
    Image.fromarray(np.full((32, 32), 2**20, dtype=np.int32)).save(tmp_path / "long.tif")
    told = "\n".join(item["unreadable"] for item in items(folder_source(tmp_path, None), range(3)))
    assert "floats.tif: its pixels are floats" in told and "long.tif: its pixels have more than 16 bits" in told


def test_hidden_files_are_no_pictures(picture_folder):
    (picture_folder / "cat" / "._0.png").write_bytes(b"what a Mac leaves")
    (picture_folder / ".thumbnails").mkdir()
    Image.new("L", (32, 32)).save(picture_folder / ".thumbnails" / "0.png")
    assert len(items(folder_source(picture_folder, "label"), range(6))) == 6
    assert folder_source(picture_folder, "label").classes == ["cat", "dog"]


def test_metadata_that_names_no_picture_is_told_of(picture_folder, caplog):
    (picture_folder / "metadata.jsonl").write_text('\n{"file_name": "cat/7.png", "text": "a cat"}\n')
    folder_source(picture_folder, "caption")
    assert "metadata.jsonl names 1 file(s) that are no picture here" in caplog.text and "7.png" in caplog.text


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
        folder_source(picture_folder, "caption")


def test_a_caption_in_another_encoding_is_named(picture_folder):
    (picture_folder / "dog" / "1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"dog.1\.txt is not UTF-8 .*; save it as UTF-8"):
        folder_source(picture_folder, "caption")


def test_a_byte_order_mark_is_no_part_of_a_caption_nor_a_line_separator_its_end(picture_folder):
    (picture_folder / "dog" / "1.txt").write_text("a dog", encoding="utf-8-sig")
    listed = '{"file_name": "cat/0.png", "text": "a\u2028 cat"}'
    (picture_folder / "metadata.jsonl").write_text(listed, encoding="utf-8-sig")
    captions = {item["caption"] for item in items(folder_source(picture_folder, "caption"), range(6))}
    assert {"a dog", "a\u2028 cat"} <= captions


def test_a_picture_without_caption_is_named(picture_folder):
    (picture_folder / "dog" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"dog.1\.png .* no caption"):
        folder_source(picture_folder, "caption")


PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with


@pytest.mark.parametrize("content", [b"no picture", b"", None, PNG + b"\0\0\0\4IHDR" + bytes(8)])
def test_a_picture_that_cannot_be_read_is_replaced_and_told_of(picture_folder, content):
    bad = picture_folder / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:-30] if content is None else content)  # None: cut short
    epoch = items(folder_source(picture_folder, "caption"), range(6))
    told = [item["unreadable"] for item in epoch]
    assert sum(map(bool, told)) == 1 and max(told).startswith(f"{bad}: ")
    assert len({item["name"] for item in epoch}) == 5 and str(bad) not in {item["name"] for item in epoch}


def test_a_run_tells_of_unreadable_pictures_once_and_ends_above_the_limit(picture_folder, tmp_path, caplog):
    (picture_folder / "cat" / "0.png").write_bytes(b"no picture")
    (picture_folder / "dog" / "2.png").write_bytes(b"no picture")
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=0, max_unreadable=2)
    config = tiny_config(tmp_path / "run", data=data)
    Trainer(config).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()]
    assert sorted(Path(line["picture"]).name for line in lines) == ["0.png", "2.png"]
    assert caplog.text.count("cannot be read and is passed over") == 2
    strict = replace(config, output_dir=str(tmp_path / "strict"), data=replace(data, max_unreadable=1))
    with pytest.raises(ValueError, match="2 pictures cannot be read, more than data.max_unreadable=1"):
        Trainer(strict).train()


def test_a_folder_of_no_readable_picture_is_refused(picture_folder):
    for path in picture_folder.glob("*/*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="None of 6 pictures in a row can be read; the first is"):
        items(folder_source(picture_folder, "caption"), range(1))


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 2), (3, 2)])
def test_buckets_give_every_step_one_size_and_every_epoch_every_picture(mixed_folder, batch_size, world_size):
    data = folder_source(mixed_folder, None, bucket_multiple=8)
    epoch_length = sum(-(-len(rows) // (batch_size * world_size)) for rows in data.members.values())
    for epoch in range(2):
        seen = []
        for step in range(epoch * epoch_length, (epoch + 1) * epoch_length):
            keys = [key for rank in range(world_size) for key in data.keys(step, batch_size, rank, world_size)]
            assert len({bucket for _, bucket in keys}) == 1
            height, width = data.sizes[keys[0][1]]
            assert height % 8 == width % 8 == 0 and 0.6 < height * width / 32**2 < 1.5
            assert data[keys[0]]["image"].shape == (3, height, width)
            seen += [row for row, _ in keys]
        assert set(seen) == set(range(20))
    later = [data.keys(step, batch_size, 0, world_size) for step in range(2 * epoch_length)]
    assert later[:epoch_length] != later[epoch_length:]


def test_a_model_trains_on_buckets_and_on_sizes(mixed_folder, tmp_path):
    data = DataConfig(name="imagefolder", path=str(mixed_folder), num_workers=0, bucket_multiple=16)
    config = tiny_config(tmp_path / "run", data=data)
    model = replace(config.model, caption_channels=None, use_additional_conditions=True)
    shapes = set()
    trainer = Trainer(replace(config, model=model, sample_every=100))
    forward = trainer.encode.networks.denoiser.transformer.forward

    def noted(hidden_states, **arguments):
        shapes.add((*hidden_states.shape[-2:], *arguments["added_cond_kwargs"]["resolution"][0].tolist()))
        return forward(hidden_states, **arguments)

    trainer.denoiser.transformer.forward = noted
    trainer.train()
    assert len(shapes) > 1 and all(shape[:2] == shape[2:] for shape in shapes)
    wrong = replace(config, model=model, data=replace(data, bucket_multiple=8), output_dir=str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="no whole number of tokens, 16 pixels wide; make .* a multiple of 16"):
        Trainer(wrong)


def add_sample(archive: tarfile.TarFile, stem: str, index: int, **changes: bytes) -> None:
    """A picture whose red is its number, with caption and class."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), (index, 0, 0)).save(picture, "PNG")
    files = {"png": picture.getvalue(), "txt": f"number {index}".encode(), "cls": b"%d" % (index % 2)}
    for suffix, content in {**files, **changes}.items():
        member = tarfile.TarInfo(f"part/{stem}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, count: int, per_shard: int) -> None:
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"shard-{shard:02d}.tar", "w") as archive:
            for index in range(shard * per_shard, (shard + 1) * per_shard):
                add_sample(archive, f"{index:04d}", index)


def test_shards_that_each_count_from_zero_lose_nothing(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                add_sample(archive, f"{number}", 3 * shard + number)
    source = build_dataset(DataConfig(name="webdataset", path=str(tmp_path), resolution=32), 0, "caption")
    assert {item["caption"] for item in items(source, range(6))} == {f"number {index}" for index in range(6)}


def test_a_caption_in_a_shard_that_cannot_be_read_costs_one_picture_and_a_wrong_class_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add_sample(archive, "0", 0)
        add_sample(archive, "1", 1, txt=b"\xff\xfe", cls=b"cat")
    config = DataConfig(name="webdataset", path=str(tmp_path / "0.tar"), resolution=32)
    seen = items(build_dataset(config, 0, "caption"), range(2))
    assert {item["caption"] for item in seen} == {"number 0"}
    assert "1.png: 'utf-8' codec" in "".join(item["unreadable"] for item in seen)
    with pytest.raises(ValueError, match=r"The .cls of .*1.png is no number of a class \(b'cat'\)"):
        build_dataset(config, 0, "label")


@pytest.mark.parametrize("path", ["shards", "shards/shard-{00..01}.tar", "memory://shards/shard-{00..01}.tar"])
def test_tar_shards_are_read_in_any_order_wherever_they_are(tmp_path, path):
    write_shards(tmp_path / "shards", count=2, per_shard=4)
    place = str(tmp_path / path)
    if path.startswith("memory"):
        remote = fsspec.filesystem("memory")
        for shard in (tmp_path / "shards").iterdir():
            remote.pipe_file(f"/shards/{shard.name}", shard.read_bytes())
        place = path
    config = DataConfig(name="webdataset", path=place, resolution=32, cache_dir=str(tmp_path / "cache"))
    captioned = items(build_dataset(config, 0, "caption"), range(8))
    for item in captioned:
        number = round((item["image"][0, 0, 0].item() + 1) * 127.5)
        assert item["caption"] == f"number {number}" and f"{number:04d}.png" in item["name"]
    assert len({item["caption"] for item in captioned}) == 8
    labelled = build_dataset(config, 0, "label")
    assert labelled.classes == ["0", "1"]
    assert sorted(item["label"] for item in items(labelled, range(8))) == [0] * 4 + [1] * 4


def test_shards_that_cannot_be_read_are_named(tmp_path):
    def refused(condition, **settings):
        with pytest.raises(ValueError) as caught:
            build_dataset(DataConfig(name="webdataset", **settings), 0, condition)
        return str(caught.value)

    assert "data.path is not set" in refused(None)
    assert "is no file" in refused(None, path=str(tmp_path / "shard-{0..1}.tar"))
    (tmp_path / "empty").mkdir()
    assert "holds no .tar file" in refused(None, path=str(tmp_path / "empty"))
    write_shards(tmp_path / "shards", count=1, per_shard=2)
    shard = tmp_path / "shards" / "shard-00.tar"
    shard.write_bytes(shard.read_bytes()[:2700])
    assert "shard-00.tar is no whole tar" in refused(None, path=str(shard))
    assert "memory://nowhere.tar cannot be fetched" in refused(None, path="memory://nowhere.tar")


@pytest.mark.parametrize("saved", [True, False])
def test_a_data_set_of_hugging_face_is_read_by_its_columns(tmp_path, saved, picture_folder):
    import datasets

    if saved:
        pictures = sorted(str(path) for path in picture_folder.glob("*/*.png"))
        columns = {"picture": pictures, "text": [f"number {n}" for n in range(6)], "label": [0, 0, 0, 1, 1, 1]}
        features = {"picture": datasets.Image(), "text": datasets.Value("string")}
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(tmp_path / "saved"))
        settings = {"path": str(tmp_path / "saved"), "image_column": "picture"}
    else:
        for path in picture_folder.glob("*/*.txt"):
            path.unlink()  # or it would be a data set of texts
        settings = {"path": str(picture_folder)}
    config = DataConfig(name="huggingface", resolution=32, **settings)
    labelled = build_dataset(config, 0, "label")
    assert labelled.classes == ["cat", "dog"]
    assert sorted(item["label"] for item in items(labelled, range(6))) == [0, 0, 0, 1, 1, 1]
    if saved:
        assert len({item["caption"] for item in items(build_dataset(config, 0, "caption"), range(6))}) == 6
    else:
        with pytest.raises(ValueError, match="has no column 'text' among .*data.caption_column"):
            build_dataset(config, 0, "caption")


def test_rows_without_picture_or_caption_are_replaced_and_told_of(tmp_path):
    import datasets

    pictures = [Image.new("RGB", (32, 32), (index, 0, 0)) for index in range(3)]
    columns = {"image": [*pictures, None], "text": ["number 0", None, "number 2", "number 3"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "rows"))
    config = DataConfig(name="huggingface", path=str(tmp_path / "rows"), resolution=32)
    for streaming in (False, True):
        seen = items(build_dataset(replace(config, streaming=streaming), 0, "caption"), range(4))
        assert {item["caption"] for item in seen} == {"number 0", "number 2"}
        told = "\n".join(item["unreadable"] for item in seen)
        assert "it has no picture" in told and "its text is no text but None" in told


def test_a_scan_tells_which_pictures_lack_a_caption(picture_folder, tmp_path):
    (picture_folder / "cat" / "0.txt").unlink()
    (picture_folder / "cat" / "1.txt").write_text(" ")
    (picture_folder / "cat" / "2.txt").write_text("A dog, number 2.")
    data = DataConfig(name="imagefolder", path=str(picture_folder), num_workers=0)
    captions = scan.scan(ScanConfig(data, output=str(tmp_path / "scan.json")))["captions"]
    lacking = {Path(entry["name"]).name: entry["reason"] for entry in captions.pop("lacking")}
    assert lacking == {"0.png": "it has no caption", "1.png": "it is empty"}
    assert captions == {"pictures": 4, "distinct": 3, "most_words": 4}


def test_a_scan_tells_of_unreadable_and_alike_pictures_and_training_leaves_them_out(tmp_path, capsys, monkeypatch):
    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train.scan", *arguments])
        scan.main()

    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = [Image.effect_noise((96, 64), 90).convert("RGB") for _ in range(4)]
    for index, picture in enumerate(noise):
        picture.save(folder / f"{index}.png")
    noise[1].resize((48, 32)).save(folder / "1_small.jpg", quality=80)
    noise[1].save(folder / "1_again.png")
    (folder / "broken.png").write_bytes(b"no picture")
    report_file = tmp_path / "scan.json"
    where = ["--data.name", "imagefolder", "--data.path", str(folder), "--data.num_workers", "0"]
    call(*where, "--data.bucket_multiple", "16", "--output", str(report_file))
    told = capsys.readouterr().out
    assert "7 pictures, 1 unreadable, 2 like another one." in told
    report = json.loads(report_file.read_text())
    assert [Path(entry["name"]).name for entry in report["unreadable"]] == ["broken.png"]
    assert [[Path(name).name for name in group] for group in report["alike"]] == [
        ["1.png", "1_again.png", "1_small.jpg"]
    ]
    assert report["buckets"] == {"48 x 80": 6}
    data = folder_source(folder, None, scan=str(report_file))
    epoch = items(data, range(4))
    assert sorted(Path(item["name"]).name for item in epoch) == ["0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(ValueError, match="nowhere.json' is no report of train.scan"):
        folder_source(folder, None, scan="nowhere.json")
    with pytest.raises(ValueError, match="exists; choose another name"):
        call(*where, "--output", str(report_file))


@pytest.mark.parametrize("max_distance", [0, 3, 10])
def test_alike_hashes_are_found_as_by_comparing_all_pairs(max_distance):
    rng = np.random.default_rng(0)
    hashes = [int(value) for value in rng.integers(0, 2**63, 60)]
    for index in range(40):  # neighbours at one to eight bits
        bits = rng.choice(63, 1 + index % 8, replace=False)
        hashes.append(hashes[index] ^ sum(1 << int(bit) for bit in bits))
    close = np.array([[(a ^ b).bit_count() <= max_distance for a in hashes] for b in hashes])
    _, component = connected_components(close)
    groups = [np.flatnonzero(component == label).tolist() for label in np.unique(component)]
    expected = sorted(group for group in groups if len(group) > 1)
    assert sorted(scan.alike(hashes, max_distance)) == expected
    assert max_distance == 0 or expected


def test_held_out_pictures_are_never_trained_on(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(40):
        Image.new("RGB", (32, 32), (6 * index, 0, 0)).save(folder / f"{index}.png")
    config = DataConfig(name="imagefolder", path=str(folder), resolution=32, held_out=0.3)
    parts = [build_dataset(config, 0, None, split) for split in ("train", "test")]
    seen = [{item["name"] for item in items(part, range(40))} for part in parts]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 40 and 4 <= len(seen[1]) <= 20
    with pytest.raises(ValueError, match=r"data.held_out=0.0 leaves none of 40 pictures to validate with"):
        build_dataset(replace(config, held_out=0.0), 0, None, "test")


@pytest.mark.parametrize(("name", "condition"), [("digit_scenes", "caption"), ("sklearn_digits", "label")])
def test_sets_of_their_own_have_other_pictures_to_validate_with(name, condition):
    config = DataConfig(name=name, resolution=64)
    first, second = (build_dataset(config, 0, condition, split)[3]["image"] for split in ("train", "test"))
    assert not torch.equal(first, second)
