"""The benchmark of diffusers' caches counts what they skip and compares their pictures with the uncached ones."""

import math
import sys

import pytest
import torch

from localdit.benchmarks import caching

STEPS = 4
PROMPTS = ["a red seven", "a blue seven", "a red"]
COMPARED = (
    "first block, threshold 0",
    "taylorseer, every 2",
    "taylorseer, every 2, lite",
    "mag, threshold 0.06",
    "faster, every 2",
    "pyramid, self 2, all timesteps",
)


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def compared(make_pipeline, tiny_transformer, kept):
    """The pipeline and what some settings did in it, measured once for all tests."""
    if not kept:
        torch.manual_seed(0)
        pipe = make_pipeline(transformer=tiny_transformer(num_layers=3))
        kept["pipe"] = pipe
        kept["measured"] = caching.compare(pipe, PROMPTS, STEPS, seed=0, repeats=1, chosen=COMPARED.__contains__)
    return kept["pipe"], kept["measured"]


def share(measured: dict, name: str) -> tuple[float, float]:
    plain = measured[caching.PLAIN]
    return measured[name].mixed / plain.mixed, measured[name].fed / plain.fed


def test_every_cache_is_compared_with_none_on_every_prompt(compared):
    pipe, measured = compared
    names = caching.caches(pipe, STEPS, [1.0] * STEPS)
    assert {name.split(",")[0] for name in names} == {*caching.WHAT_THEY_DO}
    assert {name.split(",")[0] for name in measured} == {caching.PLAIN, *caching.WHAT_THEY_DO}
    for mine in measured.values():
        assert len(mine.seconds) == len(mine.pictures) == 2 and min(mine.seconds) > 0
        assert not torch.equal(*mine.pictures)


def test_fewer_steps_are_less_work(compared):
    _, measured = compared
    assert share(measured, "no cache, 3 steps") == (3 / 4, 3 / 4)
    assert share(measured, "no cache, 2 steps") == (1 / 2, 1 / 2)


def test_a_cache_that_never_skips_draws_the_uncached_picture_with_all_of_the_work(compared):
    _, measured = compared
    pairs = zip(measured["first block, threshold 0"].pictures, measured[caching.PLAIN].pictures, strict=True)
    assert all(torch.equal(mine, base) for mine, base in pairs)
    assert share(measured, "first block, threshold 0") == (1, 1)


@pytest.mark.parametrize(
    ("name", "mixers", "feed_forwards"),
    [
        # computed: the first three of the four steps
        ("taylorseer, every 2", 3 / 4, 1),
        ("taylorseer, every 2, lite", 3 / 4, 3 / 4),
        ("pyramid, self 2, all timesteps", 1 / 2, 1),
    ],
)
def test_the_share_of_the_work_is_what_the_schedule_of_the_cache_says(compared, name, mixers, feed_forwards):
    _, measured = compared
    assert share(measured, name) == pytest.approx((mixers, feed_forwards))


def test_skipping_work_changes_the_picture(compared):
    _, measured = compared
    for name in measured:
        if min(share(measured, name)) < 1:
            pairs = zip(measured[name].pictures, measured[caching.PLAIN].pictures, strict=True)
            assert any(not torch.equal(mine, base) for mine, base in pairs), name


def test_the_comparison_leaves_neither_cache_nor_counter_behind(compared):
    pipe, _ = compared
    assert not pipe.transformer.is_cache_enabled
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_the_ratios_for_mag_cache_are_as_many_as_the_steps_and_start_at_one(compared, capsys):
    pipe, _ = compared
    ratios = caching.calibrated(pipe, PROMPTS[0], seed=0, steps=STEPS)
    assert len(ratios) == STEPS and ratios[0] == 1 and min(ratios) > 0
    assert "MagCache" not in capsys.readouterr().out


def test_noise_ratio_is_that_of_eight_bit_pictures():
    picture = torch.zeros(4, 4, 3)
    assert caching.noise_ratio(picture, picture) == math.inf
    assert caching.noise_ratio(picture + 255, picture) == pytest.approx(0)
    assert caching.noise_ratio(picture + 25.5, picture) == pytest.approx(20)


def test_the_command_prints_a_row_for_each_chosen_setting(model_folder, monkeypatch, capsys, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red seven\na blue seven\n")
    given = ["--pipeline", str(model_folder), "--captions", str(captions), "--num_inference_steps", "3"]
    monkeypatch.setattr(sys, "argv", ["caching", *given, "--prompts", "1", "--settings", "threshold 0.0", "every 2"])
    caching.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if " to " in line and "(" in line and "%" in line]
    assert len(rows) == 3 + 4 + 3
    assert rows[0].startswith("no cache") and "same" in rows[0]
    monkeypatch.setattr(sys, "argv", ["caching", *given, "--prompts", "2"])
    with pytest.raises(ValueError, match="--prompts 2"):
        caching.main()
