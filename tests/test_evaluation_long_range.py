"""Facts about the long-range test: what its pictures show, how they are read, and what matching colours come to."""

import json

import numpy as np
import pytest
from PIL import Image

from localdit.data.digit_scenes import BACKGROUNDS, COLOURS
from localdit.evaluation.long_range import NO_COLOUR, cramers_v, draw_pairs, main, read_colours, score_colours

RED, GREEN = list(COLOURS).index("red"), list(COLOURS).index("green")


@pytest.fixture(scope="module")
def pairs():
    """600 matching pictures with their colours."""
    return draw_pairs(600, np.random.default_rng(0))


def independent(count, match=0.0, seed=0):
    """Colours [count, 2] that match by rule in a share of the pictures."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(len(COLOURS), size=(count, 2))
    matched = rng.random(count) < match
    colours[matched, 1] = colours[matched, 0]
    return colours


def table_of(colours):
    table = np.zeros((len(COLOURS), len(COLOURS)), int)
    np.add.at(table, tuple(colours.T), 1)
    return table


def test_pictures_hold_two_digits_of_one_colour(pairs):
    images, colours = pairs
    assert images.shape == (600, 64, 64, 3) and images.dtype == np.uint8
    assert (colours[:, 0] == colours[:, 1]).all()
    assert set(colours.flatten()) == set(range(len(COLOURS)))
    middle = images[:, 32, 32]
    assert {tuple(colour) for colour in middle} == {(value,) * 3 for value in BACKGROUNDS.values()}
    digits = (images != middle[:, None, None]).any(axis=-1)
    assert digits[:, :16, :16].any(axis=(1, 2)).all() and digits[:, 48:, 48:].any(axis=(1, 2)).all()
    digits[:, :16, :16] = digits[:, 48:, 48:] = False
    assert not digits.any()


def test_one_seed_draws_one_set():
    first, second = (draw_pairs(5, np.random.default_rng(3))[0] for _ in range(2))
    assert (first == second).all()
    assert (first != draw_pairs(5, np.random.default_rng(3), split="test")[0]).any()


@pytest.mark.parametrize("distance", [16, 30, 48])
def test_digits_lie_as_far_apart_as_asked(distance):
    images, _ = draw_pairs(40, np.random.default_rng(0), distance)
    rows, columns = np.nonzero((images != images[:, :1, 63:]).any(axis=(0, 3)))
    assert rows.min() == columns.min() == 24 - distance // 2
    assert rows.max() == columns.max() == 39 + distance // 2
    near = (rows < 32) & (columns < 32)
    assert (near == ((rows < 32) | (columns < 32))).all()  # only on the falling diagonal
    assert rows[~near].min() - rows[near].min() == distance


@pytest.mark.parametrize("distance", [16, 32, 48])
def test_real_pictures_are_read_without_error(distance):
    images, colours = draw_pairs(300, np.random.default_rng(1), distance, match=0.0, split="test")
    assert (read_colours(images, distance) == colours).mean() > 0.99


def test_noisy_pictures_are_read_and_never_wrongly(pairs):
    images, colours = pairs
    rng = np.random.default_rng(0)
    for sigma, share in ((20, 0.99), (80, 0.2)):
        noisy = (images + rng.normal(0, sigma, images.shape)).round().clip(0, 255).astype(np.uint8)
        read = read_colours(noisy)
        assert (read == colours).mean() > share
        assert ((read != colours) & (read != NO_COLOUR)).mean() < 0.001


def test_pictures_without_digits_have_no_colours():
    noise = np.random.default_rng(0).integers(256, size=(100, 64, 64, 3), dtype=np.uint8)
    flat = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in [0, 128, 255, *COLOURS.values()]])
    photograph = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert (read_colours(noise) == NO_COLOUR).all()
    assert (read_colours(flat) == NO_COLOUR).all()
    assert (read_colours([photograph]) == NO_COLOUR).all()


def test_a_digit_of_two_colours_has_none(pairs):
    picture = pairs[0][pairs[1][:, 0] == RED][0].copy()
    assert read_colours(picture[None]).tolist() == [[RED, RED]]
    picture[:16, :16] = 0
    picture[4:8, 4:12], picture[8:12, 4:12] = COLOURS["red"], COLOURS["green"]
    assert read_colours(picture[None]).tolist() == [[NO_COLOUR, RED]]


def test_pictures_and_arrays_read_alike(pairs):
    images = pairs[0][:5]
    expected = read_colours(images)
    assert (read_colours([Image.fromarray(image) for image in images]) == expected).all()
    assert (read_colours(images / 255) == expected).all()


def test_matching_pictures_score_one(pairs):
    scores = score_colours(read_colours(pairs[0]))
    assert scores["readable"] > 0.99
    assert scores["matching"] == scores["cramers_v"]["value"] == 1
    assert scores["interval"] == scores["cramers_v"]["interval"] == [1, 1]
    assert scores["chance"] == pytest.approx(1 / 6, abs=0.02)


def test_shuffled_corners_score_chance(pairs):
    images = pairs[0].copy()
    images[:, 32:, 32:] = images[np.random.default_rng(0).permutation(len(images)), 32:, 32:]
    scores = score_colours(read_colours(images))
    assert scores["interval"][0] <= scores["chance"] <= scores["interval"][1]
    assert scores["cramers_v"]["value"] < 0.1
    assert scores["cramers_v"]["interval"][0] == 0 and scores["cramers_v"]["interval"][1] < 0.2


def test_half_matching_pictures_lie_between():
    images, _ = draw_pairs(600, np.random.default_rng(5), match=0.5)
    scores = score_colours(read_colours(images))
    assert scores["matching"] == pytest.approx(0.5 + 0.5 / 6, abs=0.06)
    low, high = scores["cramers_v"]["interval"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert scores["interval"][0] > scores["chance"]


@pytest.mark.parametrize("match", [0.0, 0.3, 0.6])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(match):
    covered = 0
    for seed in range(60):
        low, high = score_colours(independent(300, match, seed))["cramers_v"]["interval"]
        covered += low <= match <= high
    assert covered >= 52


def test_noise_alone_does_not_raise_cramers_v():
    tables = np.stack([table_of(independent(100, seed=seed)) for seed in range(300)])
    assert cramers_v(tables).mean() < 0.07
    assert cramers_v(tables, samplings=0).mean() > 0.2  # the plain coefficient


def test_cramers_v_without_correction_is_that_of_scipy():
    from scipy.stats.contingency import association

    table = table_of(independent(200, 0.4))
    assert float(cramers_v(table, samplings=0)) == pytest.approx(association(table, method="cramer"))


def test_colours_that_always_differ_in_one_way_are_as_telling_as_matching_ones():
    first = independent(300)[:, 0]
    scores = score_colours(np.stack([first, (first + 1) % len(COLOURS)], axis=1))
    assert scores["matching"] == 0 and scores["cramers_v"]["value"] == 1


def test_a_model_of_one_colour_matches_by_chance():
    scores = score_colours(np.full((50, 2), GREEN))
    assert scores["matching"] == scores["chance"] == 1
    assert scores["cramers_v"] == {"value": 0, "interval": [0, 0]}


def test_unreadable_pictures_are_counted_and_left_out(pairs):
    colours = np.concatenate([pairs[1][:30], [[RED, NO_COLOUR]] * 10])
    scores = score_colours(colours)
    assert scores["pictures"] == 40 and scores["readable"] == 0.75 and scores["matching"] == 1


def test_pictures_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match=r"Too few pictures .* \(1 of 9, and 2 must\)"):
        score_colours(np.array([[RED, RED]] + [[RED, NO_COLOUR]] * 8))
    with pytest.raises(ValueError, match="80 x 64 pixels"):
        read_colours([Image.new("RGB", (80, 64))])
    for distance in (14, 17, 50):
        with pytest.raises(ValueError, match=f"distance={distance} is no even number of pixels from 16 to 48"):
            read_colours([], distance)
    with pytest.raises(ValueError, match="match=1.5"):
        draw_pairs(1, np.random.default_rng(0), match=1.5)


def test_the_command_line_keeps_the_scores_of_a_folder(tmp_path, capsys):
    images, colours = draw_pairs(12, np.random.default_rng(0), distance=32, match=0.5)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.png")
    main([str(tmp_path / "images"), "--distance", "32"])
    readable, matching, association = (
        json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()
    )
    expected = score_colours(colours)
    assert matching["detail"] == expected
    assert (matching["metric"], matching["value"]) == ("long_range_matching", expected["matching"])
    assert matching["interval"] == expected["interval"]
    assert (association["metric"], association["value"]) == ("long_range_cramers_v", expected["cramers_v"]["value"])
    assert association["interval"] == expected["cramers_v"]["interval"]
    assert (readable["metric"], readable["value"]) == ("long_range_readable", expected["readable"])
    for record in (readable, matching, association):
        assert record["settings"] == {"distance": 32}
        assert record["generated"]["count"] == 12 and record["generated"]["size"] == [64, 64]
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "scores.jsonl")
