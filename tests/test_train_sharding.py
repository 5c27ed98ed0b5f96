"""Weights that two processes share, by FSDP2 and by DeepSpeed: exact resume, and what one process comes to."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.training import tiny_config
from train.post_hoc_ema import averaged_pipeline
from train.trainer import Trainer

WEIGHTS = Path("pipeline") / "transformer" / "diffusion_pytorch_model.safetensors"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def shared(kind, tmp_path_factory):
    """The folder that tests/sharded_processes.py filled."""
    folder = tmp_path_factory.mktemp(kind)
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"train/accelerate/{kind}.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run(
        [sys.executable, *launch, "--num_processes", "2", "-m", "tests.sharded_processes", str(folder)],
        env={**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def results(folder: Path) -> list[dict]:
    return [json.loads((folder / f"results-{process}.json").read_text()) for process in range(2)]


def test_sharded_runs_resume_to_the_bit(shared, kind):
    for result in results(shared):
        assert result["kind"] == ("FSDP" if kind == "fsdp2" else "DEEPSPEED")
        assert result["from"] == 3
        assert result["hashes"][0] == result["hashes"][1]


def test_each_process_holds_half_of_the_weights(shared, kind):
    for result in results(shared):
        assert result["share"] == pytest.approx(0.5 if kind == "fsdp2" else 1.0, abs=0.05)


def test_a_loss_that_is_no_number_in_one_process_changes_the_weights_of_none(shared):
    for result in results(shared):
        assert result["skipped"] == 1
        assert result["unchanged"]


def test_bf16_leaves_the_weights_in_fp32(shared):
    assert all(result["dtypes"] == ["torch.float32"] for result in results(shared))
    losses = [
        [json.loads(line)["loss"] for line in (shared / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_sharded_runs_do_what_one_process_does_with_the_same_global_batch(shared, tmp_path):
    config = tiny_config(tmp_path, batch_size=8)
    Trainer(replace(config, optimizer=replace(config.optimizer, post_hoc_ema=(0.05, 0.1)))).train()
    mine, theirs = load_file(tmp_path / WEIGHTS), load_file(shared / "whole" / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=name)
    mine, theirs = (averaged_pipeline(folder, 0.07, None).transformer for folder in (tmp_path, shared / "whole"))
    for tensor, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=2e-5)
    pictures = [Image.open(folder / "samples" / "00000004.png") for folder in (tmp_path, shared / "whole")]
    assert pictures[0].size == pictures[1].size


def test_what_a_sharded_run_saves_is_a_pipeline(shared):
    pipeline = DiffusionPipeline.from_pretrained(shared / "whole" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red seven", num_inference_steps=1).images[0]
    assert picture.size == (64, 64)


@pytest.mark.parametrize(
    ("variables", "recipe", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version=1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"optimizer": {"name": "muon"}}, "needs whole matrices"),
    ],
)
def test_what_cannot_be_sharded_is_told_before_the_first_step(tmp_path, variables, recipe, message):
    script = (
        "import sys, json; from dataclasses import replace; from pathlib import Path\n"
        "from accelerate import DistributedType, PartialState\n"
        "from tests.training import tiny_config; from train.trainer import Trainer\n"
        "PartialState(cpu=True); PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU\n"
        "config = tiny_config(Path(sys.argv[1])); changes = json.loads(sys.argv[2])\n"
        "Trainer(replace(config, **{key: replace(getattr(config, key), **value) for key, value in changes.items()}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(recipe)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert message in result.stderr, result.stderr[-2000:]
