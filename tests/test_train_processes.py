"""Two processes, by gloo on the CPU: exact resume, and the same as one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.training import matching_config, tiny_config
from train.trainer import Trainer

WEIGHTS = Path("pipeline") / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that tests/two_processes.py filled."""
    folder = tmp_path_factory.mktemp("two")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(10):
        size = ((96, 96), (144, 64))[index % 2]
        Image.new("RGB", size, (20 * index, 0, 90)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"number {index}")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.two_processes"]
    result = subprocess.run(
        [sys.executable, *launch, str(folder), str(pictures)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_two_processes_resume_to_the_bit_with_workers_buckets_accumulation_and_averages(two):
    for process in range(2):
        results = json.loads((two / f"results-{process}.json").read_text())
        assert len(results) == 4
        for result in results:
            assert result["from"] == 3
            assert result["hashes"][0] == result["hashes"][1], result
        by_accumulation = {result["accumulation"]: set() for result in results}
        for result in results:
            by_accumulation[result["accumulation"]].add(result["hashes"][0])
        assert all(len(hashes) == 1 for hashes in by_accumulation.values())  # workers change nothing
        assert by_accumulation[1] != by_accumulation[2]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2)])
def test_two_processes_do_what_one_does_with_the_same_global_batch(two, tmp_path, batch_size, accumulation):
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    Trainer(tiny_config(tmp_path / "together", sample_every=100, **sizes)).train()
    assert_same_weights(tmp_path / "together", two / "together")
    # a few-step student's critic, too, is one network in all processes
    Trainer(matching_config(tmp_path / "matched", str(two / "together" / "pipeline"), **sizes)).train()
    assert_same_weights(tmp_path / "matched", two / "matched", atol=2e-4)  # of 1e-2 that Adam has moved them


def assert_same_weights(mine: Path, theirs: Path, atol: float = 2e-5) -> None:
    own, others = load_file(mine / WEIGHTS), load_file(theirs / WEIGHTS)
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=atol, msg=name)
