"""Whole pipelines around a released checkpoint, in Python and on the command lines."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel, command_line
from tests.released_reference import released_model


@pytest.fixture
def checkpoint_file(tmp_path) -> Path:
    path = tmp_path / "LocalDiT.safetensors"
    save_file(released_model().state_dict(), path)
    return path


def test_a_whole_pipeline_is_assembled_around_a_checkpoint(checkpoint_file, pipeline, latent_components, tmp_path):
    text = {"tokenizer": pipeline.tokenizer, "text_encoder": pipeline.text_encoder}
    loaded = LocalDiTPipeline.from_single_file(
        checkpoint_file, config={"sample_size": 8}, vae=latent_components["vae"], **text
    )
    scheduler = loaded.scheduler.config
    assert (scheduler.algorithm_type, scheduler.solver_order, scheduler.solver_type) == ("dpmsolver++", 2, "midpoint")
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (1e-4, 0.02, "linear")
    assert (scheduler.prediction_type, scheduler.timestep_spacing) == ("epsilon", "linspace")
    assert loaded.call_default("guidance_scale", None) == 7 and loaded.default_size(None, None) == (768, 1024)
    assert loaded.call_default("num_inference_steps", None) == 20
    assert loaded.call_default("max_sequence_length", None) == 120
    sizes = loaded.size_conditions(768, 1024)
    assert sizes["aspect_ratio"].tolist() == [[pytest.approx(1024 / 768)]]
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a red seven", height=16, width=32, num_inference_steps=2).images[0].size == (32, 16)
    latents = LocalDiTPipeline.from_single_file(checkpoint_file, config={"sample_size": 8}, vae=None, **text)
    assert latents.default_size(None, None) == (8, 8)
    with pytest.raises(TypeError, match="vae='folder' is no component; load it with from_pretrained"):
        LocalDiTPipeline.from_single_file(checkpoint_file, vae="folder", **text)
    loaded.save_pretrained(tmp_path / "saved")
    assert LocalDiTPipeline.from_pretrained(tmp_path / "saved").config.call_defaults["aspect_ratio"] == "width/height"


def test_a_component_that_the_hub_does_not_give_is_named(checkpoint_file):
    with pytest.raises(ValueError, match=r"tokenizer was not given and google/flan-t5-xxl cannot be loaded"):
        LocalDiTPipeline.from_single_file(checkpoint_file, local_files_only=True)
    with pytest.raises(ValueError, match=r"vae was not given and PixArt-alpha/"):
        LocalDiTPipeline.from_single_file(checkpoint_file, tokenizer=None, text_encoder=None, local_files_only=True)


FULL_SIZE = """
import resource, sys, torch
from localdit import LocalDiTTransformer2DModel
from localdit.conversion import to_released, write_state_dict

torch.set_default_dtype(torch.bfloat16)
if sys.argv[1] == "write":
    window = {"window_size": 4, "shift_schedule": "cyclic"}
    model = LocalDiTTransformer2DModel(attention_residual=True, qk_norm_eps=1e-10, mixer_options={"window": window})
    write_state_dict(to_released(model.state_dict()), sys.argv[2])
else:
    model = LocalDiTTransformer2DModel.from_single_file(sys.argv[2], dtype=torch.bfloat16)
    sizes = {"resolution": torch.tensor([[768.0, 1024.0]]), "aspect_ratio": torch.tensor([[0.75]])}
    text = torch.randn(1, 120, 4096)
    with torch.no_grad():
        sample = model(torch.randn(1, 4, 96, 128), text, torch.tensor([500.0]), added_cond_kwargs=sizes).sample
    unit = 1 if sys.platform == "darwin" else 1024
    print(sample.isfinite().all().item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def test_the_published_size_draws_768_by_1024_in_bf16_within_six_gigabytes(tmp_path):
    path = str(tmp_path / "LocalDiT-1024.safetensors")
    for action in ("write", "run"):
        result = subprocess.run(
            [sys.executable, "-c", FULL_SIZE, action, path],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    finite, memory = result.stdout.split()
    assert finite == "True" and int(memory) < 6e9


def test_the_transformer_goes_to_the_asked_device_and_its_config_is_what_a_folder_gives(checkpoint_file, tmp_path):
    model = LocalDiTTransformer2DModel.from_single_file(checkpoint_file, device="meta")
    assert model.device.type == "meta"
    model = LocalDiTTransformer2DModel.from_single_file(checkpoint_file)
    model.save_pretrained(tmp_path / "folder")
    folder = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "folder").config
    mine, theirs = ({k: v for k, v in config.items() if k[0] != "_"} for config in (model.config, folder))
    assert mine == theirs


@pytest.mark.parametrize("program", ["infer_t2i", "infer_i2i"])
def test_the_command_lines_take_a_released_checkpoint(
    program, checkpoint_file, pipeline, latent_components, monkeypatch, capsys
):
    module = sys.modules[LocalDiTPipeline.from_single_file.__func__.__module__]
    given = {"AutoTokenizer": pipeline.tokenizer, "T5EncoderModel": pipeline.text_encoder}
    for name, component in {**given, "AutoencoderKL": latent_components["vae"]}.items():
        hub = type(name, (), {"from_pretrained": staticmethod(lambda *_, component=component, **__: component)})
        monkeypatch.setattr(module, name, hub)
    monkeypatch.chdir(checkpoint_file.parent)
    Image.new("RGB", (32, 16), "red").save("in.png")
    image = ["--image", "in.png", "--strength", "0.5"] if program == "infer_i2i" else []
    size = ["--height", "16", "--width", "32", "--num_inference_steps", "2"]
    arguments = [
        f"{program}.py",
        "--model",
        checkpoint_file.name,
        "--prompt",
        "a red seven",
        "--seed",
        "1",
        *size,
        *image,
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    command_line.run(program, importlib.import_module(program).main)
    path = capsys.readouterr().out.partition(" (seed 1)")[0]
    assert Image.open(path).size == (32, 16)


@pytest.mark.parametrize("program", ["infer_t2i", "infer_i2i"])
def test_the_command_lines_name_what_a_released_checkpoint_lacks_offline(program, checkpoint_file, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(checkpoint_file.parent)
    Image.new("RGB", (32, 16), "red").save("in.png")
    image = ["--image", "in.png"] if program == "infer_i2i" else []
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--model", checkpoint_file.name, "--prompt", "a", *image])
    with pytest.raises(SystemExit, match="2"):
        command_line.run(program, importlib.import_module(program).main)
    error = capsys.readouterr().err
    assert "google/flan-t5-xxl cannot be loaded from the Hub" in error and error.count("\n") == 1
