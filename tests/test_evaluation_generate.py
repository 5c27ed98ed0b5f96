"""The generate command: what it draws, what it says of it, and that it goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from localdit import LocalDiTClassPipeline
from localdit.command_line import PRETRAINED
from localdit.evaluation.generate import main
from localdit.evaluation.generation import read_generation

PROMPTS = ["a red seven on a black background", "a blue three on a white background", "a green one"]
QUICK = ["--model", str(PRETRAINED), "--num_inference_steps", "1", "--device", "cpu", "--seed", "5"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


def test_pictures_do_not_depend_on_batches_and_missing_ones_are_drawn_again(prompts, tmp_path):
    folders = [tmp_path / "together", tmp_path / "single"]
    for folder, batch_size in zip(folders, ("4", "1"), strict=True):
        main([*QUICK, "--prompts", prompts, "--per_prompt", "2", "--output", str(folder), "--batch_size", batch_size])
    names = [sorted(path.name for path in folder.glob("*.png")) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) == 6
    for name in names[0]:
        mine, theirs = (np.asarray(Image.open(folder / name)).astype(int) for folder in folders)
        assert abs(mine - theirs).max() <= 2
    lost = folders[0] / names[0][3]
    before, kept = lost.read_bytes(), (folders[0] / names[0][0]).stat().st_mtime_ns
    lost.unlink()
    main([*QUICK, "--prompts", prompts, "--per_prompt", "2", "--output", str(folders[0]), "--batch_size", "4"])
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - pixels(before)).max() <= 2
    assert (folders[0] / names[0][0]).stat().st_mtime_ns == kept


def pixels(data: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_how_the_pictures_came_about_is_kept_and_not_mixed(prompts, tmp_path):
    folder = tmp_path / "pictures"
    main([*QUICK, "--prompts", prompts, "--output", str(folder)])
    told = read_generation(folder)
    assert told is not None
    assert told["seed"] == 5
    assert told["num_inference_steps"] == 1
    assert (
        told["guidance_scale"]
        == json.loads((PRETRAINED / "model_index.json").read_text())["call_defaults"]["guidance_scale"]
    )
    assert told["scheduler"] == "DPMSolverMultistepScheduler"
    assert told["seconds_per_image"] > 0
    assert told["peak_memory_bytes"] > 0
    with pytest.raises(ValueError, match="another run .num_inference_steps=1, and now 2"):
        main([*QUICK, "--prompts", prompts, "--output", str(folder), "--num_inference_steps", "2"])


def test_a_model_of_captions_knows_no_classes(tmp_path):
    with pytest.raises(ValueError, match="knows no classes; give --prompts"):
        main([*QUICK, "--per_class", "2", "--output", str(tmp_path)])


def test_nothing_is_drawn_into_the_pictures_of_others(prompts, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="holds pictures of others"):
        main([*QUICK, "--prompts", prompts, "--output", str(tmp_path)])


def test_prompts_that_cannot_be_read_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError):
        main([*QUICK, "--prompts", str(tmp_path / "none.txt"), "--output", str(tmp_path / "pictures")])
    assert not (tmp_path / "pictures").exists()


def test_damaged_settings_are_told_by_name(prompts, tmp_path):
    for text in ('{"seed": ', "[1, 2]"):
        (tmp_path / "generation.json").write_text(text)
        with pytest.raises(ValueError, match="generation.json is damaged"):
            main([*QUICK, "--prompts", prompts, "--output", str(tmp_path)])


def test_every_class_gets_its_pictures(tiny_transformer, tmp_path):
    pipeline = LocalDiTClassPipeline(
        vae=None,
        transformer=tiny_transformer(caption_channels=None, num_classes=3, in_channels=1),
        scheduler=DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
        call_defaults={"num_inference_steps": 2, "guidance_scale": 1.0},
    )
    pipeline.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    main([*model, "--per_class", "2", "--output", str(tmp_path / "pictures"), "--batch_size", "4"])
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == [f"{label:04}-{number:05}.png" for label in range(3) for number in range(2)]
    drawn = pipeline(class_labels=[1], generator=[torch.Generator().manual_seed(3)]).images[0]
    found = Image.open(tmp_path / "pictures" / "0001-00001.png")
    assert np.abs(np.asarray(found).astype(int) - np.asarray(drawn)).max() <= 2
    told = read_generation(tmp_path / "pictures")
    assert told is not None and told["per_class"] == 2 and told["num_inference_steps"] == 2
