"""Which source a step sees: stages one after another, and mixtures."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import DataConfig, StageConfig, TrainConfig
from tests.training import tiny_config
from train.data import Source
from train.dry_run import dry_run
from train.mixture import BLOCK, MixedSource
from train.stages import build_source
from train.trainer import Trainer


def test_pictures_grow_by_stages_and_a_resumed_run_is_at_its_own(mixed_folder, tmp_path):
    data = DataConfig(name="imagefolder", path=str(mixed_folder), num_workers=0)
    stages = (StageConfig(until_step=2, resolution=16, batch_size=6), StageConfig(until_step=4, resolution=32))
    config = tiny_config(tmp_path / "whole", data=data, stages=stages, sample_every=100)
    config = replace(config, model=replace(config.model, caption_channels=None))
    seen = []

    def watched(trainer: Trainer) -> Trainer:
        trainer.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        return trainer

    whole = watched(Trainer(config))
    whole.train()
    expected = [(6, 3, 16, 16)] * 2 + [(4, 3, 32, 32)] * 2 + [(4, 3, 64, 64)] * 2
    assert seen == expected
    seen.clear()
    Trainer(replace(config, output_dir=str(tmp_path / "parts"), max_steps=5, checkpoint_every=3)).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000005")
    resumed = watched(Trainer(replace(config, output_dir=str(tmp_path / "parts"), resume="latest")))
    resumed.train()
    assert seen == expected[3:]
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("stages", "phrase"),
    [
        ((StageConfig(3, 16), StageConfig(2, 32)), r"stages end at the steps \[3, 2\]; let them ascend"),
        ((StageConfig(6, 16),), r"stages end at the steps \[6\]; .* before max_steps=6"),
        ((StageConfig(2, 0),), "stages.0.resolution=0 must be at least 1"),
        ((StageConfig(2, 24),), "Pictures of 24 x 24 pixels are no whole number of tokens"),
    ],
)
def test_stages_that_do_not_fit_are_refused(mixed_folder, tmp_path, stages, phrase):
    data = DataConfig(name="imagefolder", path=str(mixed_folder), num_workers=0)
    config = tiny_config(tmp_path / "run", data=data, stages=stages)
    with pytest.raises(ValueError, match=phrase):
        Trainer(replace(config, model=replace(config.model, caption_channels=None)))


class Numbered(Source):
    """Endless positions, told with the source's own number."""

    def __init__(self, number: int, channels: int = 3):
        super().__init__(8 * (number + 1), seed=0)
        self.number, self.channels = number, channels

    def __getitem__(self, position: int) -> dict:
        return {"source": self.number, "position": position}


def test_a_mixture_has_its_shares_and_misses_nothing_of_any_source():
    mixture = MixedSource([Numbered(0), Numbered(1), Numbered(2)], [5, 3, 2], seed=1)
    seen: list[list[int]] = [[], [], []]
    for micro_step in range(2 * BLOCK):
        ranks = [mixture.keys(micro_step, 2, rank, world_size=2) for rank in range(2)]
        items = [mixture[key] for keys in ranks for key in keys]
        assert len({item["source"] for item in items}) == 1  # of one size in all processes
        seen[items[0]["source"]] += [item["position"] for item in items]
    assert [len(positions) / (2 * BLOCK * 4) for positions in seen] == [0.5, 0.3, 0.2]
    for positions in seen:
        assert positions == list(range(len(positions)))
    first = Counter(mixture[mixture.keys(step, 1, 0, 1)[0]]["source"] for step in range(100))
    assert all(abs(first[number] - 100 * share) < 20 for number, share in enumerate((0.5, 0.3, 0.2)))
    assert mixture.sizes == [(8, 8), (16, 16), (24, 24)]


def test_shares_that_are_no_whole_steps_are_rounded_and_tiny_ones_refused():
    assert MixedSource([Numbered(0), Numbered(1), Numbered(2)], [1, 1, 1], seed=0).counts == (334, 333, 333)
    with pytest.raises(ValueError, match="weight=0.001 is less than one in 1000 of 10.001"):
        MixedSource([Numbered(0), Numbered(1)], [10, 0.001], seed=0)
    with pytest.raises(ValueError, match=r"differ in their channels: \[3, 1\]"):
        MixedSource([Numbered(0), Numbered(1, channels=1)], [1, 1], seed=0)


def mixture_config(folder: Path, pictures: Path, **changes) -> TrainConfig:
    """Digit scenes, and as often a folder of captioned pictures with buckets."""
    for path in pictures.glob("*.png"):
        path.with_suffix(".txt").write_text("a purple elephant")
    others = (DataConfig(name="imagefolder", path=str(pictures), bucket_multiple=16, resolution=64, weight=2.0),)
    data = DataConfig(num_workers=0, weight=2.0)
    return tiny_config(folder, **{"data": data, "mixture": others, "sample_every": 100, **changes})


def test_a_run_on_a_mixture_sees_all_of_it_and_resumes_to_the_bit(mixed_folder, tmp_path):
    config = mixture_config(tmp_path / "whole", mixed_folder, max_steps=8, checkpoint_every=4)
    seen = []

    def watched(trainer: Trainer) -> Trainer:
        trainer.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
        return trainer

    whole = watched(Trainer(config))
    assert {"elephant", "seven"} <= set(whole.networks.tokenizer.get_vocab())
    whole.train()
    assert len(set(seen)) > 1 and (64, 64) in seen
    order = list(seen)
    seen.clear()
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    Trainer(replace(parts, max_steps=5)).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000005")
    resumed = watched(Trainer(replace(parts, resume="latest")))
    resumed.train()
    assert seen == order[4:]
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_a_mixture_goes_with_stages_and_is_told_in_a_dry_run(mixed_folder, tmp_path, capsys):
    config = mixture_config(tmp_path / "run", mixed_folder)
    pictures = config.mixture[0]
    config = replace(config, data=pictures, mixture=(replace(pictures, weight=6.0, bucket_multiple=None),))
    source = build_source(replace(config, stages=(StageConfig(until_step=2, resolution=32),)), "caption")
    sizes = [np.prod(source[source.keys(step, 1, 0, 1)[0]]["image"].shape[1:]) for step in range(6)]
    assert max(sizes[:2]) <= 40 * 40 < min(sizes[2:])
    dry_run(config)
    told = capsys.readouterr().out
    count = len(list(mixed_folder.rglob("*.png")))
    assert f"epochs of {mixed_folder}" in told and f" of {count} pictures" in told
    with pytest.raises(ValueError, match="mixture holds precomputed data beside pictures"):
        build_source(replace(config, mixture=(DataConfig(name="precomputed"),)), "caption")
