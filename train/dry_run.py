"""What a run would be: its sizes, its memory, its buckets, and its time by a few steps that are thrown away."""

import math
import resource
import time

import torch
import yaml
from torch import nn

from config import TrainConfig
from train.buckets import BucketSource
from train.data import Source
from train.distribution_matching import DistributionTeacher
from train.mixture import MixedSource
from train.settings import as_plain
from train.sharding import held
from train.stages import StagedSource
from train.trainer import Trainer

GIB = 2**30
TRIED = 4  # steps


def dry_run(config: TrainConfig) -> None:
    """Print the settings and the plan of a run, and what its largest step takes; nothing is written."""
    trainer = Trainer(config)
    print(yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True))
    for title, value in {**sizes(trainer), **plan(trainer), **trial(trainer)}.items():
        print(f"{title + ':':<22}{value}")


def sizes(trainer: Trainer) -> dict[str, str]:
    """Parameters, and what the weights, gradients, optimizer and average of them take for as long as the run lasts."""
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    parameters = in_memory(trainer.denoiser, trainer.networks.vae)
    total = sum(parameter.numel() for parameter in parameters)
    own = sum(map(held, trainer.parameters))  # all of them, unless they are sharded
    numbers = sum(map(held, parameters)) + learning(trainer.optimizers) + (own if trainer.ema is not None else 0)
    lines = {
        "parameters": f"{total / 1e6:.2f}M, of which {trained / 1e6:.2f}M are trained",
        "memory for them": f"{4 * numbers / GIB:.2f} GiB (weights, gradients, optimizer, average)",
    }
    if trainer.teacher is not None:
        beside = sum(map(held, in_memory(trainer.teacher.denoiser)))
        if isinstance(trainer.teacher, DistributionTeacher):
            beside += sum(map(held, in_memory(trainer.teacher.critic))) + learning(trainer.teacher.optimizers)
        lines["memory of a teacher"] = f"{4 * beside / GIB:.2f} GiB (with what learns beside it)"
    return lines


def in_memory(*modules: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of networks, but for those whose sizes alone are known."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    return [parameter for parameter in parameters if not parameter.is_meta]


def learning(optimizers: list) -> int:
    """How many numbers gradients and moments are: Muon keeps one moment, others two."""
    return sum(
        (2 if isinstance(optimizer.optimizer, torch.optim.Muon) else 3) * held(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def plan(trainer: Trainer) -> dict[str, str]:
    """Steps, epochs and sizes of the pictures."""
    config, sources = trainer.config, last_sources(trainer.source)
    taken = config.batch_size * config.gradient_accumulation_steps * trainer.accelerator.num_processes
    lines = {"steps": f"{config.max_steps} of {taken} pictures, {config.max_steps * taken} in all"}
    weights = [data.weight for data in (config.data, *config.mixture)]
    for data, source, weight in zip((config.data, *config.mixture), sources, weights, strict=True):
        if not isinstance(source, BucketSource):
            continue
        share, of = weight / sum(weights), f" of {data.path}" if config.mixture else ""
        count = sum(len(rows) for rows in source.members.values())  # without those that are left or held out
        lines[f"epochs{of}"] = f"{config.max_steps * taken * share / count:.1f} of {count} pictures"
        buckets = [
            f"{source.sizes[bucket][0]} x {source.sizes[bucket][1]}: {len(rows)}"
            for bucket, rows in source.members.items()
        ]
        lines[f"pictures by size{of}"] = ", ".join(buckets)
    return lines


def trial(trainer: Trainer) -> dict[str, str]:
    """Time and memory of a step on the largest size: the last of `TRIED`, as the first ones warm up and compile."""
    source, keys = largest(last_sources(trainer.source), trainer.config.batch_size)
    batch = torch.utils.data.default_collate([source[key] for key in keys])
    batches = iter([batch] * TRIED * trainer.config.gradient_accumulation_steps)
    seconds = 0.0
    for step in range(TRIED):
        start = time.perf_counter()
        record = trainer.train_step(step, batches)
        float(record.grad_norm)  # waits for the device
        seconds = time.perf_counter() - start
    on_gpu = trainer.accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hours = seconds * trainer.config.max_steps / 3600
    return {
        "largest pictures": "{} x {}".format(*max(source.sizes, key=math.prod)),
        "peak memory": f"{peak / GIB:.2f} GiB {'on the GPU' if on_gpu else 'of the process'}",
        "a step": f"{seconds:.2f} s, if the data keep up",
        "all steps": f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min",
    }


def last_sources(source: Source) -> list[Source]:
    """The sources of the last stage, which has the largest pictures, or of the whole run; several if they are mixed."""
    last = source.sources[-1] if isinstance(source, StagedSource) else source
    return last.sources if isinstance(last, MixedSource) else [last]


def largest(sources: list[Source], batch_size: int) -> tuple[Source, list]:
    """The source of the largest pictures, and the keys of a batch of them."""
    source = max(sources, key=lambda source: max(math.prod(size) for size in source.sizes))
    if not isinstance(source, BucketSource):
        return source, source.keys(0, batch_size, rank=0, world_size=1)
    bucket = max(source.members, key=lambda bucket: math.prod(source.sizes[bucket]))
    rows = source.members[bucket]
    return source, [(int(rows[index % len(rows)]), bucket) for index in range(batch_size)]
