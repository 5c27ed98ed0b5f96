"""Losses that leave their course, and runs that go back to before."""

import json
from dataclasses import replace

import pytest
import torch

from tests.training import tiny_config
from train.spikes import NEEDED, SpikeWatch
from train.trainer import Trainer

BAD = 8  # the step of the data whose loss is a hundred times what it was


def test_a_spike_is_far_above_the_median_of_the_last_losses():
    watch = SpikeWatch(3.0, [])
    assert not any(watch.is_spike(loss) for loss in [1.0, 50.0, 1.2, 0.9, 1.1])  # too few to tell, at first
    assert watch.is_spike(3.5) and not watch.is_spike(3.2) and not watch.is_spike(None)
    assert list(watch.recent) == [1.0, 50.0, 1.2, 0.9, 1.1, 3.2]
    assert SpikeWatch(3.0, list(watch.recent)).is_spike(3.6)
    for loss in range(20):
        watch.is_spike(1 + loss / 100)
    assert len(watch.recent) == 10 and min(watch.recent) == pytest.approx(1.1)
    assert not any(SpikeWatch(None, [1.0] * NEEDED).is_spike(loss) for loss in (1e9, 2.0))


def with_bad_data(trainer: Trainer, bad: range | tuple = (BAD,)) -> list[int]:
    """Let some steps of the data be bad; returns the list of those that the run sees, which fills."""
    encode, seen = trainer.encode, []

    def encode_badly(batch, micro_step):
        seen.append(micro_step)
        example = encode(batch, micro_step)
        factor = 100 if micro_step in bad else 1
        return replace(example, noised=replace(example.noised, weight=example.noised.weight * factor))

    encode_badly.seed_dropout = encode.seed_dropout
    trainer.encode = encode_badly
    return seen


def config_of(folder, **changes):
    settings = {"max_steps": 12, "log_every": 1, "checkpoint_every": 2, "sample_every": 100, "spike_factor": 20.0}
    return tiny_config(folder, **{**settings, **changes})


def test_a_run_goes_back_and_passes_over_what_led_it_astray(tmp_path):
    trainer = Trainer(config_of(tmp_path / "run"))
    seen = with_bad_data(trainer)
    trainer.train()
    assert seen == list(range(13))  # step 9 was done twice, with other data
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["rolled_back_to"] for line in lines if "rolled_back_to" in line] == [8]
    assert (tmp_path / "run" / "pipeline").is_dir() and trainer.state["step"] == 12

    untroubled = Trainer(config_of(tmp_path / "untroubled", spike_factor=None))
    steps = untroubled.train_step
    untroubled.train_step = lambda step, batches: steps(step if step < BAD else step + 1, batches)
    untroubled.loader.batch_sampler.micro_steps = [step for step in range(13) if step != BAD]
    untroubled.train()
    for mine, theirs in zip(trainer.parameters, untroubled.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_that_went_back_resumes_to_the_bit(tmp_path):
    whole = Trainer(config_of(tmp_path / "whole"))
    with_bad_data(whole)
    whole.train()
    first = Trainer(config_of(tmp_path / "parts", max_steps=10))
    with_bad_data(first)
    first.train()
    resumed = Trainer(config_of(tmp_path / "parts", resume="latest"))
    seen = with_bad_data(resumed)
    resumed.train()
    assert seen == [11, 12]
    for mine, theirs in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_that_goes_back_too_often_ends_and_one_without_a_checkpoint_goes_on(tmp_path, caplog):
    trainer = Trainer(config_of(tmp_path / "often", max_rollbacks=2))
    with_bad_data(trainer, bad=range(BAD, 100))
    with pytest.raises(FloatingPointError, match="left its course again, after 2 returns to a checkpoint"):
        trainer.train()
    assert not (tmp_path / "often" / "pipeline").exists()
    trainer = Trainer(config_of(tmp_path / "early", checkpoint_every=100))
    with_bad_data(trainer)
    trainer.train()
    assert "there is no checkpoint to go back to" in caplog.text
