"""Run by `accelerate launch` in two processes: runs of sharded weights, for tests/test_train_sharding.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState

from tests.training import tiny_config
from tests.two_processes import digest
from train.sharding import held
from train.sharding import whole as whole_of
from train.trainer import Trainer


class Poisoned(Trainer):
    """One process has a loss that is no number, in the second step."""

    def _losses(self, example):
        losses = super()._losses(example)
        self.calls = getattr(self, "calls", 0) + 1
        return losses * float("nan") if self.calls == 2 and self.accelerator.process_index == 1 else losses


def take_cpus_for_gpus() -> None:
    """Let accelerate use FSDP, which torch has between CPUs, too."""
    if PartialState(cpu=True).distributed_type != DistributedType.DEEPSPEED:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def finished(trainer: Trainer) -> Trainer:
    trainer.train()
    return trainer


def main() -> None:
    folder = Path(sys.argv[1])
    take_cpus_for_gpus()
    Accelerator.end_training = lambda _: None  # it would end the process group, and there are more runs to come
    config = tiny_config(folder / "whole", batch_size=2, gradient_accumulation_steps=2)
    config = replace(config, optimizer=replace(config.optimizer, post_hoc_ema=(0.05, 0.1)))
    whole = Trainer(config)
    share = sum(map(held, whole.parameters)) / sum(parameter.numel() for parameter in whole.parameters)
    whole.train()

    parts = replace(config, output_dir=str(folder / "parts"))
    finished(Trainer(replace(parts, max_steps=3)))
    resumed = Trainer(replace(parts, resume="latest"))
    started = resumed.state["step"]
    resumed.train()

    once = finished(Trainer(tiny_config(folder / "once", max_steps=1)))
    poisoned = finished(Poisoned(tiny_config(folder / "poisoned", max_steps=2)))
    pairs = zip(once.parameters, poisoned.parameters, strict=True)
    AcceleratorState._reset_state()
    take_cpus_for_gpus()
    half = finished(Trainer(replace(config, output_dir=str(folder / "bf16"), mixed_precision="bf16")))
    results = {
        "kind": whole.accelerator.distributed_type.value,
        "share": share,
        "from": started,
        "hashes": [digest(whole), digest(resumed)],
        "skipped": poisoned.log.skipped,
        "unchanged": all(bool((whole_of(mine) == whole_of(theirs)).all()) for mine, theirs in pairs),
        "dtypes": sorted({str(parameter.dtype) for parameter in half.parameters}),
    }
    (folder / f"results-{PartialState().process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
