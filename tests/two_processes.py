"""Run by torchrun in two processes: what whole and interrupted runs come to, for tests/test_train_processes.py."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.distributed.tensor import DTensor

from config import DataConfig, TrainConfig
from tests.training import matching_config, tiny_config
from train.trainer import Trainer

STEPS, STOP = 6, 3


def settings(folder: Path, pictures: Path, workers: int, accumulation: int) -> TrainConfig:
    """A run with buckets, gradient accumulation and averages, over the end of its first epoch."""
    where = {"name": "imagefolder", "path": str(pictures), "resolution": 64, "bucket_multiple": 16}
    return tiny_config(
        folder,
        data=DataConfig(num_workers=workers, **where),
        batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        checkpoint_every=STOP,
        sample_every=100,
    )


def digest(trainer: Trainer) -> str:
    """A hash of parameters, optimizer states and averages."""
    whole = hashlib.sha256()
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    moments = [value for state in states for value in state.values()]
    for tensor in [*trainer.parameters, *trainer.ema.shadow_params, *moments]:
        tensor = torch.as_tensor(tensor).detach()
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        whole.update(tensor.numpy().tobytes())
    return whole.hexdigest()


def compared(folder: Path, pictures: Path, workers: int, accumulation: int) -> dict:
    """The hashes of a whole run, and of one that stopped half-way and went on."""
    config = settings(folder / "whole", pictures, workers, accumulation)
    whole = Trainer(config)
    whole.train()
    parts = replace(config, output_dir=str(folder / "parts"))
    Trainer(replace(parts, max_steps=STOP)).train()
    resumed = Trainer(replace(parts, resume="latest"))
    started = resumed.state["step"]
    resumed.train()
    hashes = [digest(whole), digest(resumed)]
    return {"workers": workers, "accumulation": accumulation, "from": started, "hashes": hashes}


def main() -> None:
    folder, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    Accelerator.end_training = lambda _: None  # it would end the process group, and there are more runs to come
    results = [
        compared(folder / f"{workers}-{accumulation}", pictures, workers, accumulation)
        for workers in (0, 2)
        for accumulation in (1, 2)
    ]
    Trainer(tiny_config(folder / "together", batch_size=2, sample_every=100)).train()
    Trainer(matching_config(folder / "matched", str(folder / "together" / "pipeline"), batch_size=2)).train()
    (folder / f"results-{PartialState().process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
