"""Facts about infer_t2i.py and infer_i2i.py: what they write, and how they refuse."""

import importlib
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import train.command_line
from localdit import LocalDiTPipeline, command_line

PROMPT = "a red seven"


@pytest.fixture
def call(monkeypatch, tmp_path, capsys, model_folder):
    """The caller of a script in this process, in an empty folder: returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(program, *arguments, prompt=(PROMPT,), model=model_folder):
        prompt = ["--prompt", *prompt] if prompt else []
        monkeypatch.setattr(sys, "argv", [f"{program}.py", "--model", str(model), *prompt, *map(str, arguments)])
        code = 0
        try:
            command_line.run(program, importlib.import_module(program).main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def picture(tmp_path):
    """The path of a PNG of 16 x 16 random pixels."""
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def settings(path):
    """What stands in a PNG's metadata."""
    return json.loads(Image.open(path).text["parameters"])


def test_a_picture_is_written_with_its_settings(call, tmp_path):
    code, out, err = call("infer_t2i", "--seed", 3, "--negative_prompt", "blue", "--num_inference_steps", 2)
    assert (code, out, err) == (0, "output/t2i.png (seed 3)\n", "")
    assert Image.open("output/t2i.png").size == (16, 16)
    written = settings("output/t2i.png")
    expected = {"prompt": PROMPT, "negative_prompt": "blue", "seed": 3, "num_inference_steps": 2, "dtype": "float32"}
    assert expected.items() <= written.items()


def test_the_seed_in_the_metadata_draws_the_picture_again(call):
    _, out, _ = call("infer_t2i", "--output", "first.png")
    seed = settings("first.png")["seed"]
    assert f"(seed {seed})" in out
    call("infer_t2i", "--output", "second.png", "--seed", seed)
    assert np.array_equal(pixels("first.png"), pixels("second.png"))
    call("infer_t2i", "--output", "other.png")
    assert settings("other.png")["seed"] != seed


def test_pictures_count_up_in_name_and_seed(call):
    code, out, _ = call("infer_t2i", "--num_images", 2, "--seed", 5, prompt=["red", "blue"])
    paths = [f"output/t2i-{number}.png" for number in (1, 2, 3, 4)]
    assert code == 0 and out.split("\n")[:-1] == [f"{path} (seed {seed})" for seed, path in enumerate(paths, start=5)]
    assert [(settings(path)["prompt"], settings(path)["seed"]) for path in paths] == [
        ("red", 5),
        ("red", 6),
        ("blue", 7),
        ("blue", 8),
    ]
    call("infer_t2i", "--seed", 7, "--output", "alone.png", prompt=["blue"])
    assert abs(pixels("alone.png") - pixels(paths[2])).max() <= 1


def test_nothing_is_overwritten_unless_asked_for(call, tmp_path):
    for expected in ("a.png", "a-1.png", "a-2.png"):
        assert call("infer_t2i", "--output", "a.png", "--seed", 1)[1] == f"{expected} (seed 1)\n"
    first = (tmp_path / "a.png").read_bytes()
    assert call("infer_t2i", "--output", "a.png", "--seed", 2, "--num_images", 2)[1].startswith("a-3.png (seed 2)\na-4")
    assert (tmp_path / "a.png").read_bytes() == first
    assert call("infer_t2i", "--output", "a.png", "--seed", 2, "--overwrite")[1] == "a.png (seed 2)\n"
    assert (tmp_path / "a.png").read_bytes() != first


def test_a_grid_has_a_row_for_each_prompt(call):
    code, out, _ = call("infer_t2i", "--num_images", 3, "--seed", 5, "--grid", prompt=["red", "blue"])
    assert code == 0 and out == "output/t2i.png (seed 5)\n"
    assert Image.open("output/t2i.png").size == (3 * 18, 2 * 18)
    assert settings("output/t2i.png")["prompt"] == ["red", "blue"]
    call("infer_t2i", "--seed", 9, "--output", "alone.png", prompt=["blue"])
    assert abs(pixels("output/t2i.png")[19:35, 19:35] - pixels("alone.png")).max() <= 1


def test_image_to_image_starts_from_a_picture(call, picture):
    code, out, err = call("infer_i2i", "--image", picture, "--strength", 0, "--seed", 1)
    assert (code, out, err) == (0, "output/i2i.png (seed 1)\n", "")
    assert np.array_equal(pixels("output/i2i.png"), pixels(picture))
    assert {"strength": 0.0, "image": str(picture)}.items() <= settings("output/i2i.png").items()
    call("infer_i2i", "--image", picture, "--strength", 0.5, "--seed", 1, "--output", "half.png")
    assert not np.array_equal(pixels("half.png"), pixels(picture))


def test_a_grid_of_image_to_image_begins_with_the_picture(call, picture):
    call("infer_i2i", "--image", picture, "--num_images", 2, "--grid")
    assert Image.open("output/i2i.png").size == (3 * 18, 18)
    assert np.array_equal(pixels("output/i2i.png")[1:17, 1:17], pixels(picture))


def test_size_and_precision_can_be_chosen(call):
    code, _, err = call("infer_t2i", "--height", 8, "--width", 12, "--dtype", "bfloat16", "--guidance_scale", 1)
    assert code == 0 and err == "" and Image.open("output/t2i.png").size == (12, 8)


@pytest.mark.parametrize("program", ["infer_t2i", "infer_i2i"])
def test_help_lists_the_arguments(call, program):
    code, out, _ = call(program, "--help")
    assert code == 0 and all(f"--{name}" in out for name in ("prompt", "seed", "overwrite", "grid", "device"))


# Refusals


def refused(result, program, phrases):
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith(f"{program}: ") and err.endswith(".\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and all(phrase in err for phrase in phrases), err
    assert len(err) < 500


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--num_images", "0"], ["--num_images", "'0'", "at least 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "[0, 2**32)"]),
        (["--seed", "x"], ["--seed", "'x'", "--help"]),
        (["--sede", "1"], ["--sede", "--help"]),
        (["--num_im", "2"], ["--num_im", "--help"]),
        (["--height", "17"], ["height=17", "16 and 18"]),
        (["--width", "0"], ["width=0", "2 and 4"]),
        (["--num_inference_steps", "0"], ["num_inference_steps=0", "at least 1"]),
        (["--guidance_scale", "nan"], ["guidance_scale=nan", "finite"]),
        (["--device", "nonsense"], ["'nonsense'", "choose cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "choose cpu"]),
        (["--device", "cpu", "--dtype", "float16"], ["'float16'", "float32 or bfloat16"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--output", "a.jpg"], ["'a.jpg'", ".png"]),
        (["--output", "file/a.png"], ["'file/a.png'", "choose another"]),
        (["--seed", "4294967295", "--num_images", "2"], ["--seed=4294967295", "for 2 pictures", "2**32"]),
        (["--num_images", "1001"], ["--num_images=1001", "1000 at most"]),
        (["--output", "folder.png", "--overwrite"], ["'folder.png'", "cannot be written", "is a folder"]),
        (["--model", "./nowhere"], ["--model './nowhere'", "does not exist"]),
        (["--model", "file"], ["--model 'file'", "is no checkpoint"]),
        (["--model", "empty"], ["--model 'empty'", "empty/model_index.json is missing"]),
        (["--model", "cut"], ["--model 'cut'", "cut/transformer/diffusion_pytorch_model.safetensors is damaged"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_argument_is_refused_in_one_line(call, tmp_path, model_folder, arguments, phrases):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    weights = shutil.copytree(model_folder, tmp_path / "cut") / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(call("infer_t2i", *arguments), "infer_t2i", phrases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test asks for in vain")
def test_a_device_that_is_not_there_is_refused(call):
    refused(call("infer_t2i", "--device", "cuda"), "infer_t2i", ["'cuda'", "choose cpu"])


@pytest.mark.parametrize("prompt", [(), [""], ["red", " "]])
def test_a_prompt_is_needed(call, prompt):
    refused(call("infer_t2i", prompt=prompt), "infer_t2i", ["--prompt"])


def test_a_model_that_the_hub_does_not_give_is_refused(call, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = call("infer_t2i", "--model", "nobody/nothing")
    refused(result, "infer_t2i", ["--model 'nobody/nothing'", "no folder", "Hub"])


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--image", "nowhere.png"], ["'nowhere.png'", "does not exist"]),
        (["--image", "text.png"], ["'text.png'", "PNG, JPEG or WebP"]),
        (["--image", "empty.png"], ["'empty.png'", "PNG, JPEG or WebP"]),
        (["--image", "cut.png"], ["'cut.png'", "truncated"]),
        (["--image", "."], ["'.'", "PNG, JPEG or WebP"]),
        ([], ["--image", "--help"]),
        (["--image", "in.png", "--strength", "1.5"], ["strength=1.5", "[0, 1]"]),
        (["--image", "in.png", "--strength", "nan"], ["strength=nan", "[0, 1]"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_wrong_picture_or_strength_is_refused_in_one_line(call, tmp_path, picture, arguments, phrases):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:300])
    refused(call("infer_i2i", *arguments), "infer_i2i", phrases)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_is_loaded(call, monkeypatch):
    monkeypatch.setattr(command_line.os, "access", lambda path, mode: False)  # root may write anywhere
    result = call("infer_t2i", "--output", "locked/a.png", model="./nowhere")
    refused(result, "infer_t2i", ["'locked/a.png'", "cannot be written to"])


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted."),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "out of memory; choose a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory; choose a smaller"),
        (MemoryError(), 2, "out of memory; choose a smaller"),
        (ValueError("one\n  two."), 2, "one two."),
    ],
)
def test_what_ends_a_run_is_told_in_one_line(capsys, error, code, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command_line.run("infer_t2i", main)
    assert caught.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(f"infer_t2i: {sentence}") and err.count("\n") == 1


def test_our_own_mistakes_are_not_hidden():
    def main():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError):
        command_line.run("infer_t2i", main)


# As a user starts them


def start(root, folder, program, *arguments):
    return subprocess.run(
        [sys.executable, str(root / f"{program}.py"), *map(str, arguments)],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_a_script_runs_from_any_folder_and_prints_nothing_but_the_path(request, model_folder, tmp_path):
    root = request.config.rootpath
    result = start(root, tmp_path, "infer_t2i", "--model", model_folder, "--prompt", PROMPT, "--seed", 0)
    assert (result.returncode, result.stdout, result.stderr) == (0, "output/t2i.png (seed 0)\n", "")
    assert settings(tmp_path / "output/t2i.png")["seed"] == 0


def test_a_script_refuses_in_one_line_with_exit_code_2(request, model_folder, tmp_path):
    arguments = ("--model", model_folder, "--prompt", PROMPT, "--image", "nowhere.png")
    result = start(request.config.rootpath, tmp_path, "infer_i2i", *arguments)
    refused((result.returncode, result.stdout, result.stderr), "infer_i2i", ["'nowhere.png'", "does not exist"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("environment", "faults"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_freed_memory_is_kept_unless_glibc_is_told_otherwise(environment, faults):
    """A tensor that takes the place of a freed one then costs the kernel no page."""
    program = """
import resource
import torch
from localdit.command_line import keep_freed_memory

keep_freed_memory()
counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(9) if torch.zeros(2**24).sum() == 0]
print(counts[-1] - counts[2])
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    pages = 2**26 // mmap.PAGESIZE
    assert (int(result.stdout) > pages) == faults


def test_pipelines_and_trainers_run_with_it(monkeypatch, model_folder):
    asked = []
    for module in (command_line, train.command_line):
        monkeypatch.setattr(module, "keep_freed_memory", lambda module=module: asked.append(module.__name__))
    command_line.load_pipeline(LocalDiTPipeline, str(model_folder), "cpu", "float32")
    train.command_line.run("train", lambda: None)
    assert asked == ["localdit.command_line", "train.command_line"]
