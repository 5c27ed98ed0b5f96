"""Scores of samples while a run goes on."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from config import ScoresConfig
from localdit import LocalDiTPipeline
from localdit.data.digit_scenes import load_digits
from localdit.evaluation.digit_extractor import DigitNetwork, save_digit_network
from localdit.evaluation.extractors import load_extractor
from localdit.evaluation.features import features_of_images
from localdit.evaluation.scores import score_features
from tests.training import tiny_config
from train.trainer import Trainer

PROMPTS = ["a red seven on a black background", "a blue three on a white background"]


@pytest.fixture
def scores(tmp_path):
    torch.manual_seed(0)
    save_digit_network(DigitNetwork(8).eval(), tmp_path / "extractor", 0.1)
    digits = [Image.fromarray(digit).convert("RGB") for digit in load_digits("test")[0][::50]]
    reference = features_of_images(digits, load_extractor(str(tmp_path / "extractor")))
    reference.save(tmp_path / "reference.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return ScoresConfig(
        every=3,
        extractor=str(tmp_path / "extractor"),
        reference=str(tmp_path / "reference.safetensors"),
        prompts=str(tmp_path / "prompts.txt"),
        pictures=10,
        batch_size=4,
    )


def logged(folder) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["scores"] for line in lines if "scores" in line}


def test_samples_are_scored_as_the_saved_pipeline_is(scores, tmp_path):
    config = tiny_config(tmp_path / "run", scores=scores, sample_every=100)
    Trainer(config).train()
    found = logged(tmp_path / "run")
    assert found.keys() == {3, 6}
    assert found[3] != found[6]

    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[index % 2] for index in range(10)]
    images = pipeline(prompts, generator=[torch.Generator().manual_seed(index) for index in range(10)]).images
    trainer = Trainer(replace(config, output_dir=str(tmp_path / "other")))
    features = features_of_images(images, trainer.sample_scores.extractor)
    records = score_features(trainer.sample_scores.reference, features, ["kid", "cmmd"], resamples=0)
    assert found[6] == pytest.approx({record["metric"]: record["value"] for record in records}, rel=1e-2)


def test_scoring_changes_nothing_in_the_training(scores, tmp_path):
    weights = []
    for name, given in (("with", scores), ("without", ScoresConfig())):
        trainer = Trainer(tiny_config(tmp_path / name, scores=given, sample_every=100))
        trainer.train()
        weights.append(trainer.parameters)
    for mine, theirs in zip(*weights, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractor": None}, "needs scores.extractor and scores.reference"),
        ({"reference": "nothing.safetensors"}, "holds no features"),
        ({"prompts": None}, "scores.prompts=None is no file"),
        ({"pictures": 4}, "4 pictures are too few"),
        ({"pictures": 8, "metrics": ("fid",)}, "FID of 8 pictures in 8 features"),
    ],
)
def test_what_cannot_be_scored_is_told_before_the_first_step(scores, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_config(tmp_path / "run", scores=replace(scores, **changes)))


def test_another_extractor_than_the_references_is_refused(scores, tmp_path):
    save_digit_network(DigitNetwork(8).eval(), tmp_path / "another", 0.1)
    with pytest.raises(ValueError, match="make both by one extractor"):
        Trainer(tiny_config(tmp_path / "run", scores=replace(scores, extractor=str(tmp_path / "another"))))
