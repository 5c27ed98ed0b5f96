"""The programs around class-conditional pictures: their scores, their trajectories, the comparison of mixers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from config import DataConfig, ModelConfig, SampleConfig, TrainConfig
from localdit import LocalDiTClassPipeline, command_line, trajectories
from train import comparison_report, score_classes
from train.compare_mixers import ComparisonConfig, compare


@pytest.fixture
def digits_model(tmp_path, tiny_transformer) -> Path:
    """The folder of an untrained model of ten classes, 16 x 16 pixels."""
    transformer = tiny_transformer(caption_channels=None, num_classes=10, in_channels=1)
    pipeline = LocalDiTClassPipeline(
        vae=None,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
        call_defaults={"num_inference_steps": 2, "guidance_scale": 1.0},
    )
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def call(monkeypatch):
    """Run a program's main with a command line; returns its exit code."""

    def call(module, *arguments) -> int:
        monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
        try:
            command_line.run("program", module.main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def test_noise_scores_like_noise_beside_real_digits(digits_model, call, capsys):
    assert call(score_classes, "--model", digits_model, "--data", "sklearn_digits", "--per_class", 5) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["generated"]["accuracy"] < 0.5 and scores["training pictures"]["accuracy"] > 0.9
    assert scores["generated"]["distance"] > 5 * scores["training pictures"]["distance"]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"--data": "cifar"}, "invalid choice: 'cifar'"),
        ({"--per_class": 1}, "--per_class 1 is too few"),
        ({"--model": "nowhere"}, "--model 'nowhere' cannot be loaded"),
        ({"--data": "mnist", "--path": "."}, "holds no file train-images-idx3-ubyte"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_sentence(digits_model, call, capsys, monkeypatch, changes, phrase):
    monkeypatch.chdir(digits_model)
    given = {"--model": digits_model, "--data": "sklearn_digits", **changes}
    assert call(score_classes, *(word for pair in given.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert phrase in error and len(error.splitlines()) == 1


def test_a_strip_for_every_class_is_drawn_and_nothing_overwritten(digits_model, call, tmp_path, capsys):
    arguments = ("--model", digits_model, "--output", tmp_path / "strips.png")
    assert call(trajectories, *arguments) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 16, 10 * 16)  # the noise and two steps, ten classes
        assert json.loads(sheet.info["parameters"])["seed"] == 0
    before = path.read_bytes()
    assert call(trajectories, *arguments, "--seed", 1) == 0
    assert path.read_bytes() == before
    assert Path(capsys.readouterr().out.splitlines()[-1]).read_bytes() != before


def test_a_comparison_scores_every_contestant_once_and_the_references(tmp_path):
    model = ModelConfig(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        caption_channels=None,
        num_classes=10,
        use_additional_conditions=False,
    )
    shared = TrainConfig(
        output_dir=str(tmp_path / "runs"),
        model=model,
        data=DataConfig(name="sklearn_digits", resolution=8, num_workers=0),
        sample=SampleConfig(num_inference_steps=1, guidance_scale=1.0),
        batch_size=4,
        report_to=(),
    )
    contestants = {name: {"token_mixers": (name,)} for name in ("full", "linear", "ssm")}
    output = tmp_path / "scores.jsonl"
    config = ComparisonConfig(str(output), shared, contestants, ["full", "ssm"], seeds=1, cpu_seconds=0.5, samples=20)
    compare(config)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["the training pictures", "a Gaussian per class", "full", "ssm"]
    seconds = json.loads((tmp_path / "step_seconds.json").read_text())
    assert seconds.keys() == {"full", "linear", "ssm"}  # timed in one run, whichever are trained
    assert lines[0]["accuracy"] > 0.9 and lines[2]["training_seconds"] > 0
    assert lines[3]["steps"] == int(0.5 / seconds["ssm"])
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {tmp_path.name} --><!-- end of {tmp_path.name} -->")
    compare(replace(config, page=str(page)))  # nothing is left to train
    assert len(output.read_text().splitlines()) == 4
    assert "| full | 1 |" in page.read_text() and (tmp_path / "images" / f"{tmp_path.name}.png").is_file()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines <!-- .* for the table to go between"):
        compare(replace(config, page=str(page)))
    with pytest.raises(ValueError, match="holds runs of cpu_seconds=0.5, which do not compare.*another --output"):
        compare(replace(config, cpu_seconds=2.0))
    with pytest.raises(ValueError, match="samples=1 of a class are too few"):
        compare(replace(config, samples=1))
    with pytest.raises(ValueError, match=r"only=\['fast'\] are not known"):
        compare(replace(config, only=["fast"]))
    scenes = replace(config, run=replace(shared, data=DataConfig()))
    with pytest.raises(ValueError, match="reader=None is no file; train one"):
        compare(scenes)


def test_a_report_puts_means_and_spread_between_its_marks_and_draws_them(tmp_path, call, capsys):
    def report(scores, page):
        return call(comparison_report, scores, "--page", page)

    scores = tmp_path / "mixers_digits" / "scores.jsonl"
    scores.parent.mkdir()
    lines = [
        {"name": "the training pictures", "seed": None, "accuracy": 0.99, "distance": 0.5},
        {"name": "full", "seed": 0, "accuracy": 0.9, "distance": 2.0, "steps": 7},
        {"name": "full", "seed": 1, "accuracy": 0.8, "distance": 4.0, "steps": 7},
    ]
    scores.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- mixers_digits -->\nold\n<!-- end of mixers_digits -->\nafter\n")
    assert report(scores, page) == 0
    text = page.read_text()
    assert "| the training pictures |  | 99.0 | 0.50 |  |" in text
    assert "| full | 2 | 85.0 (80.0 to 90.0) | 3.00 (2.00 to 4.00) | 7 |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    with Image.open(tmp_path / "images" / "mixers_digits.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 2
    again = text
    assert report(scores, page) == 0 and page.read_text() == again

    page.write_text("no marks")
    assert report(scores, page) == 2 and "<!-- mixers_digits -->" in capsys.readouterr().err
    assert page.read_text() == "no marks"
    assert report(tmp_path / "none.jsonl", page) == 2
    for content, phrase in ((json.dumps(lines[0]), "no scores of a mixer"), ("{}\n{", "Line 1 of")):
        scores.write_text(content)
        assert report(scores, page) == 2 and phrase in capsys.readouterr().err
