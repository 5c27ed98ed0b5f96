"""Facts about digit scenes: their captions, their pictures, and how both are compared."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from localdit import command_line
from localdit.data.digit_scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    HELD_OUT_FILE,
    RELATIONS,
    Glyph,
    Scene,
    choose_held_out,
    group_by_class,
    held_out_combinations,
    load_digits,
    parse_caption,
    render,
    render_with_boxes,
    sample_scene,
)
from localdit.evaluation.digit_reader import crop_ink, locate
from localdit.evaluation.digit_scenes import (
    Reading,
    SceneReading,
    judge,
    load_reader,
    main,
    score,
    score_folder,
    score_readings,
    train_reader,
)
from train import score_digit_scenes

GLYPHS = [Glyph(colour, digit) for colour in COLOURS for digit in range(10)]
RED_SEVEN, BLUE_THREE = Glyph("red", 7), Glyph("blue", 3)


def all_combinations():
    return (Scene(a, "black", relation, b) for a, relation, b in itertools.product(GLYPHS, RELATIONS, GLYPHS))


def coverage_of(picture, glyph, background):
    """How much ink [64, 64] of the glyph's colour lies on each pixel, computed from the picture alone."""
    ground = np.full(3, float(BACKGROUNDS[background]))
    direction = np.array(COLOURS[glyph.colour]) - ground
    return (picture - ground) @ direction / (direction @ direction)


def ink_box(ink):
    """The (left, top, right, bottom) of the True pixels of a mask [64, 64], right and bottom exclusive."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_captions_read_as_agreed():
    assert Scene(RED_SEVEN, "gray").caption == "a red seven on a gray background"
    scene = Scene(RED_SEVEN, "black", "to the left of", BLUE_THREE)
    assert scene.caption == "a red seven to the left of a blue three on a black background"


def test_every_caption_parses_back_to_its_scene():
    scenes = list(all_combinations())
    assert len({scene.caption for scene in scenes}) == 14_400
    assert all(parse_caption(scene.caption) == scene for scene in scenes)
    singles = [Scene(glyph, background) for glyph in GLYPHS for background in BACKGROUNDS]
    assert all(parse_caption(scene.caption) == scene for scene in singles)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red seven",
        "a red seven on a pink background",
        "A red seven on a black background",
        "a red seven on a black background.",
        "a red seven left of a blue three on a black background",
        "a red eleven on a black background",
    ],
)
def test_caption_outside_the_grammar_is_refused_with_the_two_forms(caption):
    with pytest.raises(ValueError, match=r"a \{colour\} \{digit\} on a .* nor 'a \{colour\} \{digit\} \{relation\}"):
        parse_caption(caption)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="known ones: red, green"):
        Glyph("pink", 1)
    with pytest.raises(ValueError, match="from 0 to 9"):
        Glyph("red", 10)
    with pytest.raises(ValueError, match="known ones: black, white, gray"):
        Scene(RED_SEVEN, "pink")
    with pytest.raises(ValueError, match="known ones: to the left of"):
        Scene(RED_SEVEN, "black", "near", BLUE_THREE)
    with pytest.raises(ValueError, match="both a relation and a second digit"):
        Scene(RED_SEVEN, "black", "above")
    with pytest.raises(ValueError, match="1 or 2 digits"):
        sample_scene(np.random.default_rng(0), num_digits=1, held_out=True)


def test_a_tenth_of_the_combinations_is_held_out():
    held_out = [scene for scene in all_combinations() if scene.held_out]
    assert 0.10 <= len(held_out) / 14_400 <= 0.11
    assert {scene.combination for scene in held_out} == held_out_combinations()


def test_held_out_file_is_what_the_choice_gives():
    assert HELD_OUT_FILE.read_text(encoding="utf-8").splitlines() == choose_held_out()


def test_both_descriptions_of_a_picture_are_held_out_together():
    assert all(scene.held_out == scene.mirrored.held_out for scene in all_combinations())
    assert all(scene.mirrored.mirrored == scene != scene.mirrored for scene in all_combinations())


def test_training_shows_every_glyph_in_every_role():
    seen = [scene for scene in all_combinations() if not scene.held_out]
    assert {(scene.first, scene.relation) for scene in seen} == set(itertools.product(GLYPHS, RELATIONS))
    assert {(scene.second, scene.relation) for scene in seen} == set(itertools.product(GLYPHS, RELATIONS))


def test_training_sampler_never_yields_a_held_out_scene():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(10_000)]
    assert not any(scene.held_out for scene in scenes)
    assert 0.28 < np.mean([scene.second is None for scene in scenes]) < 0.32
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_held_out_sampler_yields_nothing_else():
    rng = np.random.default_rng(0)
    assert all(sample_scene(rng, held_out=True).held_out for _ in range(1000))


def test_splits_share_no_handwriting():
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert train.shape == test.shape == (2500, 28, 28) and train.dtype == np.uint8
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert (np.bincount(train_labels) == 250).all() and (np.bincount(test_labels) == 250).all()
    with pytest.raises(ValueError, match="train, test"):
        load_digits("validation")  # pyright: ignore[reportArgumentType]


def test_pictures_show_what_the_caption_says():
    rng = np.random.default_rng(0)
    for _ in range(400):
        colours, background = rng.permutation(list(COLOURS))[:2], rng.choice(list(BACKGROUNDS))
        first, second = (Glyph(str(colour), int(rng.integers(10))) for colour in colours)
        scene = Scene(first, str(background), str(rng.choice(RELATIONS)), second)
        picture = render(scene, rng)
        assert picture.shape == (CANVAS, CANVAS, 3) and picture.dtype == np.uint8

        on_white = np.abs(picture - BACKGROUNDS[scene.background]).sum(axis=2)
        boxes = []
        for glyph in scene.glyphs:
            coverage = coverage_of(picture.astype(float), glyph, scene.background)
            ground = BACKGROUNDS[scene.background]
            mixed = ground + (np.array(COLOURS[glyph.colour]) - ground) * coverage[..., None]
            own = (np.abs(mixed - picture).max(axis=2) < 2) & (on_white > 0) & (coverage > 0.3)
            boxes.append(ink_box(own))
        (left, top, right, bottom), (left2, top2, right2, bottom2) = boxes
        assert bottom - top >= 22 and bottom2 - top2 >= 22
        assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
        dx, dy = (left2 + right2 - left - right) / 2, (top2 + bottom2 - top - bottom) / 2
        if abs(dx) > abs(dy):
            assert scene.relation == ("to the left of" if dx > 0 else "to the right of")
        else:
            assert scene.relation == ("above" if dy > 0 else "below")


def test_boxes_lie_apart_on_the_canvas_with_a_clear_relation():
    rng = np.random.default_rng(1)
    digits = group_by_class(*load_digits("train"))
    for _ in range(1000):
        scene = sample_scene(rng)
        picture, boxes = render_with_boxes(scene, rng, digits)
        corners, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        assert (corners >= 0).all() and (ends <= CANVAS).all()
        assert (boxes[:, 3] >= 22).all() and (boxes[:, 3] <= (40 if len(boxes) == 1 else 30)).all()
        outside = np.ones((CANVAS, CANVAS), bool)
        for left, top, width, height in boxes:
            outside[top : top + height, left : left + width] = False
        assert (picture[outside] == BACKGROUNDS[scene.background]).all()
        if len(boxes) == 2:
            assert ((corners[1] > ends[0]) | (corners[0] > ends[1])).any()  # at least one empty pixel between them
            across, down = np.abs((corners + ends)[1] - (corners + ends)[0])
            along, aside = (down, across) if scene.relation in ("above", "below") else (across, down)
            assert along > 1.5 * aside


def test_the_same_rng_gives_the_same_scenes_and_pictures():
    def draw():
        rng = np.random.default_rng(7)
        scenes = [sample_scene(rng) for _ in range(20)]
        return [scene.caption for scene in scenes], np.stack([render(scene, rng, "test") for scene in scenes])

    (captions, pictures), (captions_again, pictures_again) = draw(), draw()
    assert captions == captions_again
    assert np.array_equal(pictures, pictures_again)


def reading_of(*digits, background="black"):
    """Make a reading from (colour, digit, (x, y)) of every digit found."""
    return SceneReading(tuple(Reading(*digit, score=0.9) for digit in digits), background)


SEVEN_LEFT, THREE_RIGHT = ("red", 7, (16.0, 30.0)), ("blue", 3, (46.0, 34.0))


@pytest.mark.parametrize(
    "reading, wrong",
    [
        (reading_of(SEVEN_LEFT, THREE_RIGHT), set()),
        (reading_of(THREE_RIGHT, SEVEN_LEFT), set()),
        (reading_of(SEVEN_LEFT, THREE_RIGHT, background="gray"), {"background", "all"}),
        (reading_of(("red", 7, (46.0, 30.0)), ("blue", 3, (16.0, 34.0))), {"relation", "all"}),
        (reading_of(("red", 7, (30.0, 16.0)), ("blue", 3, (34.0, 46.0))), {"relation", "all"}),
        (reading_of(("red", 1, (16.0, 30.0)), THREE_RIGHT), {"digits", "all"}),
        (reading_of(SEVEN_LEFT, ("cyan", 3, (46.0, 34.0))), {"colours", "all"}),
        (reading_of(("blue", 7, (16.0, 30.0)), ("red", 3, (46.0, 34.0))), {"all"}),
        (reading_of(SEVEN_LEFT), {"count", "digits", "colours", "relation", "all"}),
        (
            reading_of(SEVEN_LEFT, THREE_RIGHT, ("red", 7, (30.0, 60.0))),
            {"count", "digits", "colours", "relation", "all"},
        ),
        (reading_of(), {"count", "digits", "colours", "relation", "all"}),
    ],
)
def test_each_mistake_in_a_scene_of_two_digits_costs_its_own_field(reading, wrong):
    judged = judge(reading, Scene(RED_SEVEN, "black", "to the left of", BLUE_THREE))
    assert set(judged) == {"count", "digits", "colours", "relation", "background", "all"}
    assert {field for field, right in judged.items() if not right} == wrong


@pytest.mark.parametrize(
    "reading, wrong",
    [
        (reading_of(SEVEN_LEFT), set()),
        (reading_of(SEVEN_LEFT, background="white"), {"background", "all"}),
        (reading_of(("red", 1, (16.0, 30.0))), {"digit", "all"}),
        (reading_of(("green", 7, (16.0, 30.0))), {"colour", "all"}),
        (reading_of(SEVEN_LEFT, SEVEN_LEFT), {"count", "digit", "colour", "all"}),
        (reading_of(), {"count", "digit", "colour", "all"}),
    ],
)
def test_each_mistake_in_a_scene_of_one_digit_costs_its_own_field(reading, wrong):
    judged = judge(reading, Scene(RED_SEVEN, "black"))
    assert set(judged) == {"count", "digit", "colour", "background", "all"}
    assert {field for field, right in judged.items() if not right} == wrong


@pytest.mark.parametrize("relation, right", [("above", True), ("below", True), ("to the left of", False)])
def test_like_digits_may_stand_in_either_order(relation, right):
    upper, lower = ("red", 7, (30.0, 16.0)), ("red", 7, (32.0, 48.0))
    assert judge(reading_of(upper, lower), Scene(RED_SEVEN, "black", relation, RED_SEVEN))["all"] == right


def test_held_out_prompts_are_scored_apart():
    unseen = min(held_out_combinations()) + " on a black background"
    seen = next(scene.caption for scene in all_combinations() if not scene.held_out)
    single = "a red seven on a black background"
    scores = score_readings(
        [reading_of(SEVEN_LEFT)] * 5, [single, single, single.replace("seven", "one"), seen, unseen]
    )
    assert {group: scores[group]["prompts"] for group in scores} == {
        "one_digit": 3,
        "two_digits": 1,
        "two_digits_held_out": 1,
    }
    assert scores["one_digit"]["rates"]["digit"] == pytest.approx(2 / 3)
    low, high = scores["one_digit"]["intervals"]["digit"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert scores["one_digit"]["intervals"]["colour"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="each picture needs one"):
        score_readings([], [single])


def quickly_trained():
    images, labels = load_digits("test")
    return train_reader(images[::25], labels[::25], steps=2)


@pytest.fixture(scope="module")
def reader():
    return quickly_trained()


def test_training_a_reader_is_decided_by_its_seed(reader):
    again = quickly_trained().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in reader.state_dict().items())


def test_digits_are_located_at_the_peaks_of_the_map():
    centre = torch.full((2, 16, 16), -9.0)
    centre[1, 4, 10], centre[1, 4, 11], centre[1, 12, 3] = 3.0, 1.0, 2.0
    size, colour = torch.full((2, 2, 16, 16), np.log(24 / 32)), torch.zeros(2, 6, 16, 16)
    colour[:, 2] = 5.0
    picture, place, found_colour, score = locate(centre, size, colour)
    assert picture.tolist() == [1, 1] and found_colour.tolist() == [2, 2]
    (x, y, width, height), other = place.tolist()
    assert 42 < x < 44 and y == pytest.approx(18, abs=0.1)
    assert width == height == pytest.approx(24, abs=0.1)
    assert other[:2] == pytest.approx([14, 50], abs=0.1)
    assert score.tolist() == pytest.approx([0.953, 0.881], abs=0.001)


@pytest.mark.parametrize("width, count", [(24, 1), (6, 2)])
def test_a_weaker_peak_within_a_digit_is_not_another_digit(width, count):
    centre = torch.full((1, 16, 16), -9.0)
    centre[0, 4, 10], centre[0, 4, 12] = 3.0, 1.0
    size = torch.tensor([width / 32, 24 / 32]).log()[None, :, None, None].expand(1, 2, 16, 16)
    assert len(locate(centre, size, torch.zeros(1, 6, 16, 16))[0]) == count


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_cropped_ink_is_the_same_in_every_colour(background):
    crops = []
    for index, colour in enumerate(COLOURS):
        rng = np.random.default_rng(5)
        scene = Scene(Glyph(colour, 4), background)
        picture, boxes = render_with_boxes(scene, rng, group_by_class(*load_digits("train")))
        (left, top, width, height) = boxes[0].tolist()
        place = torch.tensor([[left + width / 2, top + height / 2, width, height]])
        pictures = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        ground = torch.tensor([list(BACKGROUNDS).index(background)])
        crops.append(crop_ink(pictures, torch.tensor([0]), place, torch.tensor([index]), ground))
    assert crops[0].shape == (1, 1, 28, 28) and crops[0].max() > 0.9
    assert all(torch.allclose(crop, crops[0], atol=0.01) for crop in crops)


def test_reader_takes_pil_images_and_arrays_alike(reader):
    rng = np.random.default_rng(0)
    pictures = np.stack([render(sample_scene(rng), rng) for _ in range(3)])
    readings = reader.read(pictures)
    assert len(readings) == 3 and reader.read([]) == []
    assert reader.read([Image.fromarray(picture) for picture in pictures]) == readings
    captions = ["a red seven on a black background"] * 3
    assert score(reader, pictures, captions) == score_readings(readings, captions)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3)), [Image.new("RGB", (128, 64))]]
)
def test_reader_refuses_other_pictures(reader, images):
    with pytest.raises(ValueError, match="64x64 pixels in uint8, but one"):
        reader.read(images)


def write_folder(folder, captions):
    rng = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(captions):
        Image.fromarray(render(sample_scene(rng), rng)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_score_command_prints_and_keeps_the_rates_of_a_folder(reader, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    two = "a red one above a cyan two on a gray background"
    write_folder(folder, ["a red seven on a black background", "a cyan zero on a gray background", two])
    weights = tmp_path / "reader.safetensors"
    save_file(reader.state_dict(), weights)
    main(["score", "--images", str(folder), "--reader", str(weights)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == score_folder(load_reader(weights), folder)
    assert printed["one_digit"]["prompts"] == 2
    kept = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    told = [(record["metric"], record["settings"]["prompts"], record["generated"]["count"]) for record in kept]
    group = "two_digits_held_out" if "two_digits_held_out" in printed else "two_digits"
    assert told == [("scenes_correct", "one_digit", 2), ("scenes_correct", group, 1), ("scenes_relation", group, 1)]
    assert kept[0]["value"] == printed["one_digit"]["rates"]["all"]
    assert kept[0]["interval"] == printed["one_digit"]["intervals"]["all"]
    assert kept[0]["detail"] == printed["one_digit"]
    assert all(len(record["extractor"]["sha256"]) == 64 for record in kept)


def test_check_command_scores_real_scenes_of_every_group(reader, tmp_path, capsys):
    weights = tmp_path / "reader.safetensors"
    save_file(reader.state_dict(), weights)
    main(["check", "--reader", str(weights), "--scenes", "2"])
    printed = json.loads(capsys.readouterr().out)
    assert [printed[group]["prompts"] for group in ("one_digit", "two_digits", "two_digits_held_out")] == [2, 2, 2]


def test_bad_folders_are_refused_in_a_sentence(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.jsonl is missing"):
        score_folder(reader, tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing to score"):
        score_folder(reader, tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    with pytest.raises(ValueError, match="Line 1 of"):
        score_folder(reader, tmp_path)
    write_folder(tmp_path, ["a photo of a cat"])
    with pytest.raises(ValueError, match="'a photo of a cat' is neither"):
        score_folder(reader, tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no reader at"):
        main(["score", "--images", str(tmp_path), "--reader", str(tmp_path / "missing.safetensors")])
    with pytest.raises(ValueError, match="does not hold the weights"):
        (tmp_path / "other.safetensors").write_bytes(b"nonsense")
        load_reader(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["check", "--reader", "nowhere"], "no reader at nowhere"),
        (["check", "--reader", "nowhere", "--scenes", "0"], "--scenes: '0' is not a whole number of at least 1"),
        (["train", "--output", "reader.safetensors", "--seed", "-1"], "--seed: '-1' is not a whole number in"),
        (["train", "--output", "pyproject.toml"], "pyproject.toml exists; remove it, or choose another"),
        (["score", "--images", "tests"], "required: --reader"),
        ([], "required: command"),
    ],
)
def test_a_wrong_call_of_the_readers_program_is_refused_in_one_line(arguments, phrase, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.run("digit_scenes", lambda: main(arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and phrase in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--reader", "nowhere"], "no reader at nowhere"),
        (["--reader", "nowhere", "--prompts", "0"], "--prompts: '0' is not a whole number of at least 1"),
        (["--prompts", "5"], "required: --reader"),
    ],
)
def test_a_wrong_call_of_the_scoring_program_is_refused_in_one_line(arguments, phrase, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["score", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.run("score", score_digit_scenes.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and phrase in error and len(error.splitlines()) == 1
