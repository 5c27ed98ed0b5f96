"""Averages of any length after training, against averages of that length taken while training."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import OptimizerConfig
from localdit import LocalDiTPipeline
from tests.training import tiny_config
from train import post_hoc_ema
from train.post_hoc_ema import PowerAverages, coefficients, exponent, list_saved, overlap, reconstruct
from train.trainer import Trainer

WIDTHS = (0.05, 0.1)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_profile_has_its_width(width):
    time = np.linspace(0, 1, 200_001)[1:]
    weight = time ** exponent(width)
    weight /= weight.sum()
    mean = (weight * time).sum()
    assert ((weight * (time - mean) ** 2).sum()) ** 0.5 == pytest.approx(width, rel=1e-3)


def test_the_overlap_of_profiles_is_the_integral_of_their_product():
    first, second = (300, exponent(0.05)), (400, exponent(0.1))
    time = np.linspace(0, 300, 300_001)[1:]
    product = np.ones_like(time)
    for step, g in (first, second):
        product *= (g + 1) * time**g / step ** (g + 1)
    assert overlap(first, second) == pytest.approx(product.mean() * 300, rel=1e-3)
    assert overlap(first, second) == overlap(second, first)


def test_a_saved_profile_is_itself_and_weights_sum_to_one():
    saved = [(step, exponent(width)) for step in (100, 200, 300) for width in WIDTHS]
    own = coefficients(saved, (200, exponent(0.1)))
    np.testing.assert_allclose(own, np.eye(6)[3], atol=1e-6)
    often = [(step, exponent(width)) for step in range(20, 601, 20) for width in WIDTHS]
    assert coefficients(often, (600, exponent(0.07))).sum() == pytest.approx(1, abs=0.005)


def test_an_average_weighs_each_step_by_its_time_to_the_exponent():
    values = torch.randn(200, 3, dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    averages = PowerAverages({"weight": parameter}, WIDTHS)
    for value in values:
        parameter.data.copy_(value)
        averages.step()
    time = torch.arange(1, 201, dtype=torch.float64)
    for width, average in zip(WIDTHS, averages.averages, strict=True):
        g = exponent(width)
        weight = time ** (g + 1) - (time - 1) ** (g + 1)  # the integral of the profile over a step
        expected = (weight[:, None] * values).sum(0) / weight.sum()
        torch.testing.assert_close(average["weight"], expected)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15])
def test_any_width_is_found_after_training(tmp_path, width):
    parameter = nn.Parameter(torch.zeros(50))
    kept = PowerAverages({"weight": parameter}, WIDTHS)
    wanted = PowerAverages({"weight": parameter}, (width,))
    for step in range(600):
        parameter.data += torch.randn(50)  # a walk, whose averages differ from one another
        kept.step()
        wanted.step()
        if step % 20 == 19:
            kept.save(tmp_path, torch.float32)
    truth = wanted.averages[0]["weight"]
    found = reconstruct(list_saved(tmp_path), width, step=600)["weight"]
    error = (found - truth).norm()
    nearest = min((average["weight"] - truth).norm() for average in kept.averages)
    assert error < 0.02 * (parameter - truth).norm()
    assert error < 0.2 * nearest or nearest == 0


def test_a_run_keeps_averages_exactly_and_makes_a_pipeline_of_any_width(tmp_path, monkeypatch):
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=2, ema_decay=0.9, post_hoc_ema=WIDTHS)
    config = tiny_config(tmp_path / "whole", optimizer=optimizer, max_steps=8, checkpoint_every=2, sample_every=100)
    Trainer(config).train()
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    Trainer(replace(parts, max_steps=4)).train()
    Trainer(replace(parts, resume="latest")).train()
    names = sorted(path.name for path in (tmp_path / "whole" / "post_hoc_ema").iterdir())
    assert names == [f"step-{step:08d}-width-{width:g}.safetensors" for step in (2, 4, 6, 8) for width in WIDTHS]
    for name in names:
        mine, theirs = (load_file(tmp_path / run / "post_hoc_ema" / name) for run in ("whole", "parts"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["post_hoc_ema", str(tmp_path / "whole"), *arguments])
        post_hoc_ema.main()

    call("--width", "0.1", "--output", str(tmp_path / "wide"))
    wide = LocalDiTPipeline.from_pretrained(tmp_path / "wide")
    saved = load_file(tmp_path / "whole" / "post_hoc_ema" / names[-1])
    for name, value in wide.transformer.named_parameters():
        torch.testing.assert_close(value, saved[f"transformer.{name}"], rtol=1e-4, atol=1e-6)
    call("--width", "0.07", "--step", "6", "--output", str(tmp_path / "narrow"))
    narrow = LocalDiTPipeline.from_pretrained(tmp_path / "narrow")
    assert not torch.equal(narrow.transformer.proj_out.weight, wide.transformer.proj_out.weight)
    for arguments, phrase in (
        (("--width", "0.1", "--output", str(tmp_path / "wide")), "holds a pipeline"),
        (
            ("--width", "0.1", "--step", "5", "--output", str(tmp_path / "new")),
            r"step=5 was not saved; .*\[2, 4, 6, 8\]",
        ),
        (("--width", "0.001", "--output", str(tmp_path / "new")), "width=0.001 is far from the saved ones"),
    ):
        with pytest.raises(ValueError, match=phrase):
            call(*arguments)
    shutil.rmtree(tmp_path / "whole" / "post_hoc_ema")
    with pytest.raises(ValueError, match="holds no averages; train with --optimizer.post_hoc_ema"):
        call("--width", "0.1", "--output", str(tmp_path / "new"))


def test_a_draft_is_not_an_average(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "step-00000002-width-0.1.draft", {"step": "2", "width": "0.1"})
    with pytest.raises(ValueError, match="holds no averages"):
        list_saved(tmp_path)


@pytest.mark.parametrize("widths", [(0.1,), (0.1, 0.5)])
def test_widths_that_do_not_do_are_refused(tmp_path, widths):
    optimizer = OptimizerConfig(post_hoc_ema=widths)
    with pytest.raises(ValueError, match="post_hoc_ema"):
        Trainer(tiny_config(tmp_path, optimizer=optimizer))
