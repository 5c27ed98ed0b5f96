"""Facts about seams: what steps, noise, patch grids and photographs come to."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

from localdit.evaluation.seams import main, seam_ratio

PERIOD, PATCH, SIZE = 32, 8, 128


def noise(count=24, size=SIZE, sigma=8.0, seed=0):
    """Grey white noise, float [count, size, size, 3] around 128."""
    values = np.random.default_rng(seed).normal(128, sigma, (count, size, size, 1))
    return values.repeat(3, axis=-1)


def with_steps(pictures, height, period, offset=0, rows=True):
    """Raise every second strip between borders offset, offset + period, ..., so that each border is a step."""
    strip = (np.arange(pictures.shape[2]) - offset) // period % 2 * height
    stepped = pictures + strip[:, None]
    return stepped + strip[:, None, None] if rows else stepped


def uint8(pictures):
    return pictures.round().clip(0, 255).astype(np.uint8)


def only(result):
    """The measurements of the only offset."""
    (measured,) = result["offsets"]
    return measured


def covers(measurement, value):
    low, high = measurement["interval"]
    return low <= value <= high


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("height", [6, 12])
def test_a_step_on_noise_gives_the_ratio_of_the_formula(height, offset):
    sigma = 8.0
    found = only(seam_ratio(uint8(with_steps(noise(), height, PERIOD, offset)), PERIOD, PATCH, [offset]))
    expected = 1 + height**2 / (2 * sigma**2)
    assert expected > 1.25
    for direction in ("columns", "rows", "together"):
        assert found[direction]["ratio"] == pytest.approx(expected, rel=0.06)
        assert found[direction]["rank"] == 1 and found[direction]["highest"] == offset
        assert not covers(found[direction], 1)
    assert covers(found["together"], expected)


def test_the_slow_obvious_sum_agrees():
    pictures = uint8(noise(count=2, size=72))
    found = only(seam_ratio(pictures, PERIOD, PATCH))
    grey = pictures[..., 0].astype(float)
    borders, others = [32, 64], [8, 16, 24, 40, 48, 56]
    energy = [np.mean([(grey[:, :, x] - grey[:, :, x - 1]) ** 2 for x in places]) for places in (borders, others)]
    assert found["columns"]["ratio"] == pytest.approx(energy[0] / energy[1], abs=1e-4)
    energy = [np.mean([(grey[:, y] - grey[:, y - 1]) ** 2 for y in places]) for places in (borders, others)]
    assert found["rows"]["ratio"] == pytest.approx(energy[0] / energy[1], abs=1e-4)


def test_white_noise_has_no_seams():
    found = only(seam_ratio(uint8(noise()), PERIOD, PATCH))
    for direction in ("columns", "rows", "together"):
        assert found[direction]["ratio"] == pytest.approx(1, abs=0.05)
        assert covers(found[direction], 1)


def test_a_patch_grid_is_no_seam():
    # steps of 20 at every patch border: against pixels inside patches every border would seem eight times as strong
    found = only(seam_ratio(uint8(with_steps(noise(sigma=5), 20, PATCH)), PERIOD, PATCH))
    assert found["together"]["ratio"] == pytest.approx(1, abs=0.05)
    assert covers(found["together"], 1)


def test_a_finer_grid_of_the_autoencoder_is_no_seam():
    found = only(seam_ratio(uint8(with_steps(noise(sigma=5), 20, PATCH // 2)), PERIOD, PATCH))
    assert found["together"]["ratio"] == pytest.approx(1, abs=0.05)


def test_steps_in_one_direction_show_in_that_direction():
    found = only(seam_ratio(uint8(with_steps(noise(), 12, PERIOD, rows=False)), PERIOD, PATCH))
    assert found["columns"]["ratio"] > 1.9
    assert found["rows"]["ratio"] == pytest.approx(1, abs=0.08)
    assert found["rows"]["ratio"] < found["together"]["ratio"] < found["columns"]["ratio"]


def test_steps_elsewhere_are_reported_as_the_highest_phase():
    found = only(seam_ratio(uint8(with_steps(noise(), 12, PERIOD, offset=24)), PERIOD, PATCH))["together"]
    assert found["highest"] == 24 and found["rank"] > 1
    assert found["ratio"] < 0.9
    assert set(found["phases"]) == {0, 8, 16, 24} and found["phases"][0] == found["ratio"]


def test_seams_of_another_offset_are_kept_out_of_the_comparison():
    both = uint8(with_steps(with_steps(noise(), 12, PERIOD), 12, PERIOD, offset=16))
    expected = 1 + 12**2 / (2 * 8**2)
    for measured in seam_ratio(both, PERIOD, PATCH, [0, 16])["offsets"]:
        assert measured["together"]["ratio"] == pytest.approx(expected, rel=0.06)
    assert only(seam_ratio(both, PERIOD, PATCH))["together"]["ratio"] < 0.9 * expected


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_a_photograph_has_no_seams(name):
    for measured in seam_ratio([Image.fromarray(getattr(data, name)())], 64, 16, [0, 32])["offsets"]:
        assert 0.75 < measured["together"]["ratio"] < 1.35
        assert measured["together"]["interval"] is None  # of one picture


def test_parts_of_photographs_have_no_seams_until_they_are_given_some():
    rng = np.random.default_rng(0)
    photographs = [data.astronaut(), data.chelsea(), data.coffee()]
    parts = []
    for _ in range(60):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(side - 256 + 1) for side in photograph.shape[:2])
        parts.append(photograph[top : top + 256, left : left + 256])
    parts = np.stack(parts)
    found = only(seam_ratio(parts, 64, 16))["together"]
    assert found["ratio"] == pytest.approx(1, abs=0.1) and covers(found, 1)
    found = only(seam_ratio(uint8(with_steps(parts.astype(float), 10, 64)), 64, 16))["together"]
    assert found["interval"][0] > 1 and found["rank"] == 1


def test_the_interval_narrows_with_more_pictures():
    def width(count):
        low, high = only(seam_ratio(uint8(noise(count)), PERIOD, PATCH))["together"]["interval"]
        return high - low

    assert width(64) < 0.7 * width(8)


def test_pictures_of_any_size_are_compared():
    pictures = [Image.fromarray(uint8(noise(1, 150, seed=seed))[0, :height, :width]) for seed, height, width in SIZES]
    result = seam_ratio(pictures, PERIOD, PATCH)
    assert result["pictures"] == len(SIZES)
    assert only(result)["together"]["ratio"] == pytest.approx(1, abs=0.2)


SIZES = [(0, 100, 150), (1, 77, 45), (2, 33, 120), (3, 150, 149)]


def test_arrays_and_pictures_of_one_content_agree():
    pictures = uint8(noise(4))
    expected = seam_ratio(pictures, PERIOD, PATCH)
    assert seam_ratio([Image.fromarray(picture) for picture in pictures], PERIOD, PATCH) == expected
    assert seam_ratio(pictures / 255, PERIOD, PATCH) == expected


def test_a_direction_without_a_window_border_is_none():
    found = only(seam_ratio(uint8(noise())[:, :32], PERIOD, PATCH))
    assert found["rows"] is None
    assert found["together"]["ratio"] == pytest.approx(1, abs=0.05)


def test_pictures_without_a_window_border_are_refused():
    with pytest.raises(ValueError, match=r"period=32, offset=0\).* larger than 32 pixels"):
        seam_ratio(uint8(noise())[:, :32, :32], PERIOD, PATCH)
    assert only(seam_ratio(uint8(noise())[:, :33, :33], PERIOD, PATCH))["together"]["pictures"] == 24


def test_flat_pictures_are_refused_and_left_out_among_others():
    flat = np.full((6, SIZE, SIZE, 3), (200, 31, 77), np.uint8)
    with pytest.raises(ValueError, match="of more than one colour"):
        seam_ratio(flat, PERIOD, PATCH)
    pictures = uint8(noise(6))
    alone, among = (only(seam_ratio(x, PERIOD, PATCH)) for x in (pictures, np.concatenate([flat, pictures])))
    assert among == alone and among["together"]["pictures"] == 6


def test_seams_on_otherwise_flat_pictures_have_no_upper_bound():
    seams_alone = uint8(with_steps(np.full((5, SIZE, SIZE, 3), 100.0), 10, PERIOD))
    found = only(seam_ratio(np.concatenate([seams_alone, uint8(noise(1))]), PERIOD, PATCH))["together"]
    assert found["ratio"] > 1 and found["interval"][1] is None


@pytest.mark.parametrize(
    ("period", "patch", "offsets", "words"),
    [
        (30, 8, [0], "period=30 is no multiple of patch=8"),
        (8, 8, [0], "period=8 is no multiple of patch=8 above it"),
        (32, 0, [0], "patch=0"),
        (32, 8, [4], "offset=4 is no multiple of patch=8"),
        (32, 8, [0, 32], "offset=32 .* below period=32"),
        (32, 8, [0, 8, 16, 24], "no patch border to compare it with; give some, and not all"),
        (32, 8, [], "leave no window border"),
        (4096, 1, [], "and not all, of the multiples of 1 below 4096.$"),
    ],
)
def test_a_grid_that_cannot_be_compared_is_refused(period, patch, offsets, words):
    with pytest.raises(ValueError, match=words):
        seam_ratio(uint8(noise(1)), period, patch, offsets)


def write_folder(folder, pictures):
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return str(folder)


def kept(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_the_command_line_keeps_what_the_function_returns(tmp_path, capsys):
    pictures = uint8(with_steps(noise(3), 12, PERIOD))
    folder = write_folder(tmp_path / "images", pictures)
    (tmp_path / "generation.json").write_text('{"seed": 7}')
    main([folder, "--period", "32", "--patch", "8", "--offset", "0", "--offset", "16"])
    expected = seam_ratio(pictures, PERIOD, PATCH, [0, 16])["offsets"]
    records = kept(tmp_path)
    for record, measured in zip(records, expected, strict=True):
        assert record["metric"] == "seams" and record["detail"] == json.loads(json.dumps(measured))
        assert record["value"] == measured["together"]["ratio"]
        assert record["interval"] == measured["together"]["interval"]
        assert record["settings"] == {"period": 32, "patch": 8, "offset": measured["offset"]}
        assert record["generation"] == {"seed": 7} and record["generated"]["count"] == 3
        assert record["versions"]["localdit"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("seams (period 32, patch 8, offset 0) ") and printed[2].endswith("scores.jsonl")
    with pytest.raises(ValueError, match="argument --period: 100000000 is more than 65536; choose that or less"):
        main([folder, "--period", "100000000", "--patch", "8"])
    main([folder, "--period", "32", "--patch", "8"])
    assert [record["settings"]["offset"] for record in kept(tmp_path)] == [0, 16, 0]


def test_beside_real_pictures_favourite_places_are_no_seam(tmp_path):
    def drawn(count, seed, height=0.0):
        # strokes that like the places of the window borders, as a digit likes the middle of a picture
        return uint8(with_steps(with_steps(noise(count, seed=seed), 10, PERIOD), height, PERIOD))

    real, good = write_folder(tmp_path / "real", drawn(40, 0)), write_folder(tmp_path / "good", drawn(30, 1))
    bad = write_folder(tmp_path / "bad", drawn(30, 2, height=8))
    for folder in (good, bad):
        main([folder, "--period", "32", "--patch", "8", "--real", real])
    alone, beside, seamed, seamed_beside = kept(tmp_path)
    assert alone["interval"][0] > 1.5 and covers(beside, 1)
    assert (beside["metric"], beside["real"]["count"]) == ("seams_to_real", 40)
    assert beside["value"] == pytest.approx(
        alone["value"] / seam_ratio(drawn(40, 0), PERIOD, PATCH)["offsets"][0]["together"]["ratio"], rel=1e-3
    )
    # steps of 10 and 18 on noise of 8: 1 + h² / (2 s²) of each
    assert seamed_beside["value"] == pytest.approx((1 + 18**2 / 128) / (1 + 10**2 / 128), rel=0.06)
    assert seamed_beside["interval"][0] > 1 and seamed["value"] > alone["value"]


def test_real_pictures_that_say_nothing_are_told_of_as_such(tmp_path):
    folder = write_folder(tmp_path / "images", uint8(noise(3)))
    given = [folder, "--period", "32", "--patch", "8", "--real"]
    with pytest.raises(ValueError, match="Of the real pictures in .*flat': No picture of 2 has a gradient"):
        main([*given, write_folder(tmp_path / "flat", np.zeros((2, SIZE, SIZE, 3), np.uint8))])
    with pytest.raises(ValueError, match="fewer than 2 real pictures with gradients"):
        main([*given, write_folder(tmp_path / "one", uint8(noise(1)))])


def test_nothing_but_seams_is_told_of(tmp_path):
    folder = write_folder(tmp_path / "images", uint8(with_steps(np.full((2, SIZE, SIZE, 3), 100.0), 10, PERIOD)))
    with pytest.raises(ValueError, match="All steps of 2 pictures are at window borders"):
        main([folder, "--period", "32", "--patch", "8"])


def test_an_offset_given_twice_is_one(tmp_path):
    folder = write_folder(tmp_path / "images", uint8(noise(2)))
    main([folder, "--period", "32", "--patch", "8", "--offset", "8", "--offset", "8"])
    assert len(kept(tmp_path)) == 1


def test_an_interval_without_a_bound_is_none_in_the_record(tmp_path):
    seams_alone = uint8(with_steps(np.full((5, SIZE, SIZE, 3), 100.0), 10, PERIOD))
    folder = write_folder(tmp_path / "images", np.concatenate([seams_alone, uint8(noise(1))]))
    main([folder, "--period", "32", "--patch", "8"])
    [record] = kept(tmp_path)
    assert record["interval"] is None and record["detail"]["together"]["interval"][0] > 1
