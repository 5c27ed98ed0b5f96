"""The generate command: what it draws, what it says of it, and that it goes on where it stopped."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from localdit import LocalDiTClassPipeline
from localdit.command_line import PRETRAINED
from localdit.evaluation.digit_scenes import DigitSceneReader, score_folder
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
    with Image.open(next(folder.glob("*.png"))) as picture:
        assert (told["width"], told["height"]) == picture.size
    assert told["seconds_per_image"] > 0
    assert told["peak_memory_bytes"] > 0
    with pytest.raises(ValueError, match="another run .num_inference_steps=1, and now 2"):
        main([*QUICK, "--prompts", prompts, "--output", str(folder), "--num_inference_steps", "2"])


def test_another_spelling_of_the_same_folder_goes_on(prompts, tmp_path):
    folder, written = tmp_path / "pictures", tmp_path / "elsewhere.txt"
    main([*QUICK, "--prompts", prompts, "--output", str(folder)])
    written.write_text("\n".join(PROMPTS))
    for model in (f"{PRETRAINED}/", os.path.relpath(PRETRAINED)):
        lost = folder / "00001-0.png"
        lost.unlink()
        main(["--model", model, *QUICK[2:], "--prompts", str(written), "--output", str(folder)])
        assert lost.is_file()


def test_other_prompts_of_the_same_name_are_another_run(prompts, tmp_path):
    folder = tmp_path / "pictures"
    main([*QUICK, "--prompts", prompts, "--output", str(folder)])
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    with pytest.raises(ValueError, match="another run .prompts_sha256="):
        main([*QUICK, "--prompts", prompts, "--output", str(folder)])


def test_pictures_of_other_weights_are_another_run(prompts, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "pictures"
    shutil.copytree(PRETRAINED, model)
    given = ["--model", str(model), *QUICK[2:], "--prompts", prompts, "--output", str(folder)]
    main(given)
    next(folder.glob("*.png")).unlink()
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.05 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="another run .weights_sha256="):
        main(given)


def test_a_run_that_drew_nothing_keeps_nobody_out(prompts, tmp_path, capsys):
    folder = tmp_path / "pictures"
    with pytest.raises(ValueError, match="height=33"):
        main([*QUICK, "--prompts", prompts, "--output", str(folder), "--height", "33"])
    for _ in range(2):  # the second finds nothing to draw
        main([*QUICK, "--prompts", prompts, "--output", str(folder), "--height", "32"])
        assert capsys.readouterr().out == f"{folder}\n"
    told = read_generation(folder)
    assert told is not None and told["height"] == 32 and told["seconds_per_image"] > 0


def test_what_is_told_is_json_to_everybody(prompts, tmp_path):
    main([*QUICK, "--prompts", prompts, "--output", str(tmp_path / "pictures")])
    text = (tmp_path / "pictures" / "generation.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "-Infinity" in text  # as a text: DPM-Solver's lambda_min_clipped


@pytest.mark.parametrize("option", ["--num_inference_steps", "--per_prompt"])
def test_numbers_beyond_all_measure_are_refused(prompts, tmp_path, option):
    with pytest.raises(ValueError, match=f"argument {option}: 100000000 is more than 10*; choose that or less"):
        main([*QUICK, "--prompts", prompts, "--output", str(tmp_path / "pictures"), option, "100000000"])


def test_a_folder_that_cannot_be_made_is_refused_before_a_model_is_loaded(prompts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is, or lies in, what is no folder to write to; choose another"):
        main(["--model", "none", "--prompts", prompts, "--output", str(tmp_path / "file" / "deep" / "pictures")])


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


def test_the_reader_of_digit_scenes_finds_the_prompts(prompts, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    main([*QUICK, "--prompts", prompts, "--output", str(tmp_path / "pictures")])
    assert score_folder(DigitSceneReader(), tmp_path / "pictures")["one_digit"]["prompts"] == 2


def test_damaged_settings_are_told_by_name(prompts, tmp_path):
    for text in ('{"seed": ', "[1, 2]"):
        (tmp_path / "generation.json").write_text(text)
        with pytest.raises(ValueError, match="generation.json is damaged"):
            main([*QUICK, "--prompts", prompts, "--output", str(tmp_path)])


def test_a_model_without_conditions_draws_so_many_pictures(tiny_transformer, tmp_path):
    pipeline = LocalDiTClassPipeline(
        vae=None,
        transformer=tiny_transformer(caption_channels=None, num_classes=None),
        scheduler=DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
        call_defaults={"num_inference_steps": 2},
    )
    pipeline.save_pretrained(tmp_path / "model")
    model, folder = ["--model", str(tmp_path / "model"), "--device", "cpu"], tmp_path / "images"
    main([*model, "--pictures", "5", "--output", str(folder), "--batch_size", "2", "--seed", "3"])
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{number:05}.png" for number in range(5)]
    drawn = pipeline(batch_size=1, generator=[torch.Generator().manual_seed(3 + 4)]).images[0]
    assert np.abs(np.asarray(Image.open(folder / "00004.png")).astype(int) - np.asarray(drawn)).max() <= 2
    told = read_generation(folder)
    assert told is not None and told["pictures"] == 5 and told["seed"] == 3
    for given in (["--per_class", "2"], ["--prompts", "none.txt"]):
        with pytest.raises(ValueError, match="knows no classes; give --pictures|cannot be read|takes no prompts"):
            main([*model, *given, "--output", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="wants to be told what to draw; give --prompts"):
        main([*QUICK, "--pictures", "2", "--output", str(tmp_path / "other")])


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
    with pytest.raises(ValueError, match="takes no prompts; give --per_class"):
        (tmp_path / "prompts.txt").write_text("three")
        main([*model, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "prompted")])
    told = read_generation(tmp_path / "pictures")
    assert told is not None and told["per_class"] == 2 and told["num_inference_steps"] == 2
