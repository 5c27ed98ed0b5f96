"""What the trainer costs beside the model: python -m train.benchmark --run train/recipes/digit_scenes.yaml.

Takes turns within one run: a bare loop of forward, backward and optimizer step on one batch that is ready; the trainer
on the same batch again and again; the trainer on precomputed data; and the trainer on pictures. Times are told as
ratios to the bare loop's, medians over the rounds.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import DataConfig, PrecomputeConfig, TrainBenchmarkConfig
from train.command_line import parse, run
from train.precompute import precompute
from train.settings import check_ranges
from train.trainer import Trainer


def bare_loop(trainer: Trainer, batch: dict) -> Callable[[int], None]:
    """Steps of a loop that has the model and the optimizers of a run, and nothing else of it."""
    example = trainer.encode(batch, micro_step=0)
    optimizers = [optimizer.optimizer for optimizer in trainer.optimizers]

    def step(_: int) -> None:
        with trainer.accelerator.autocast():
            prediction = trainer.model(example.noised.inputs, example.noised.timestep, **example.condition)
        example.noised.losses(prediction).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def work_of_step(trainer: Trainer, batch: dict) -> int:
    """Floating-point operations of the matrix products in one forward and backward pass."""
    example = trainer.encode(batch, micro_step=0)
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        prediction = trainer.model(example.noised.inputs, example.noised.timestep, **example.condition)
        example.noised.losses(prediction).mean().backward()
    trainer.model.zero_grad()
    return counter.get_total_flops()


def contestants(config: TrainBenchmarkConfig, folder: str) -> tuple[dict[str, Callable[[int], object]], int]:
    """By name, what does one step of a number; and the operations of a step."""
    common = replace(config.run, output_dir=f"{folder}/run", gradient_accumulation_steps=1, max_steps=10**9)
    pictures = config.run.batch_size * (config.rounds + 1) * config.steps
    precompute(PrecomputeConfig(run=common, output_dir=f"{folder}/ready", pictures=pictures, dtype="float32"))
    data = DataConfig(name="precomputed", path=f"{folder}/ready", num_workers=config.run.data.num_workers)
    ready = replace(common, data=data)
    bare, repeated, cached, whole = (Trainer(each) for each in (ready, ready, ready, common))
    batch = next(iter(bare.loader))
    again, from_cache, from_pictures = repeat(batch), iter(cached.loader), iter(whole.loader)
    steps = {
        "bare loop": bare_loop(bare, batch),
        "trainer, one batch": lambda step: repeated.train_step(step, again),
        "trainer, precomputed": lambda step: cached.train_step(step, from_cache),
        "trainer, pictures": lambda step: whole.train_step(step, from_pictures),
    }
    return steps, work_of_step(bare, batch)


def benchmark(config: TrainBenchmarkConfig) -> dict[str, float]:
    """Seconds of a step of each contestant in each round, as medians; the first round warms up."""
    check_ranges(config)
    with tempfile.TemporaryDirectory() as folder:
        steps, operations = contestants(config, folder)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(config.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                for number in range(turn * config.steps, (turn + 1) * config.steps):
                    step(number)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - start) / config.steps)
    bare = seconds["bare loop"][1:]
    ratios = {
        name: [own / other for own, other in zip(times[1:], bare, strict=True)] for name, times in seconds.items()
    }
    for name, times in seconds.items():
        low, middle, high = min(ratios[name]), median(ratios[name]), max(ratios[name])
        print(f"{name:<22}{median(times[1:]):8.3f} s a step{middle:8.3f} of the bare loop ({low:.3f} to {high:.3f})")
    print(speed(config, operations, median(seconds["trainer, precomputed"][1:])))
    return {name: median(values) for name, values in ratios.items()}


def speed(config: TrainBenchmarkConfig, operations: int, seconds: float) -> str:
    """What a step of so many operations in so many seconds comes to."""
    rate = operations / seconds / 1e12
    told = f"{config.run.batch_size / seconds:.2f} images/s, {operations / 1e12:.3g} TFLOP a step, {rate:.3g} TFLOP/s"
    return f"{told}, {rate / config.peak_tflops:.1%} of {config.peak_tflops:g}" if config.peak_tflops else told


def main() -> None:
    config = parse(TrainBenchmarkConfig, "train.benchmark")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {config.run.batch_size}")
    print(json.dumps(benchmark(config)))


if __name__ == "__main__":
    run("train.benchmark", main)
