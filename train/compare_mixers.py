"""Compare token mixers: the same data, parameters and CPU time for each; writes the scores as JSON lines."""

import json
import multiprocessing
import resource
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from config import ModelConfig, TrainConfig
from localdit.data.labelled_images import load_labelled_images
from localdit.evaluation.digit_classes import DigitJudge
from train.command_line import parse, run
from train.datasets import resized
from train.trainer import Trainer

WINDOW = {"window_size": 4, "shift_schedule": "swin"}
GLOBAL = {**WINDOW, "global_context": 2}
SLIDING = {"kernel_size": 5}

# What is compared, by name. An ssm layer of ratio 1 has 2 C² parameters more than attention, which its feed-forward
# gives back, and the state space's own, under 200 C.
CONTESTANTS: dict[str, dict] = {
    "full": {"token_mixers": ("full",)},
    "window": {"token_mixers": ("window",), "mixer_options": {"window": WINDOW}},
    "window + global context": {"token_mixers": ("window",), "mixer_options": {"window": GLOBAL}},
    "sliding_window": {"token_mixers": ("sliding_window",), "mixer_options": {"sliding_window": SLIDING}},
    "linear": {"token_mixers": ("linear",)},
    "ssm": {"token_mixers": ("ssm",), "mixer_options": {"ssm": {"hourglass_ratio": 1}}, "mlp_ratio": 1.0},
    "window, window, full": {"token_mixers": ("window", "window", "full"), "mixer_options": {"window": WINDOW}},
    "linear, linear, window": {"token_mixers": ("linear", "linear", "window"), "mixer_options": {"window": WINDOW}},
}
WARM_UP, TIMED = 5, 30  # steps, to learn how many fit into the budget
SAMPLES_PER_CLASS = 100


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison of token mixers on labelled digits.

    Args:
        output: file of the scores, one JSON object a line; runs that it holds already are not done again.
        contestants: names of `CONTESTANTS`.
        seeds: how many seeds, from 0 on.
        cpu_seconds: the training time of each run, on one thread.
        run: what the runs share; each brings its own mixers, seed and number of steps.
    """

    output: str
    run: TrainConfig
    contestants: list[str] = field(default_factory=lambda: list(CONTESTANTS))
    seeds: int = 3
    cpu_seconds: float = 80.0


def contestant(config: ComparisonConfig, name: str, seed: int) -> TrainConfig:
    """The run of one contestant."""
    model: ModelConfig = replace(config.run.model, **CONTESTANTS[name])
    folder = Path(config.run.output_dir) / f"{name.replace(' ', '_')}-{seed}"
    return replace(config.run, model=model, seed=seed, output_dir=str(folder), resume=None)


def steps_within(config: TrainConfig, cpu_seconds: float) -> int:
    """How many steps of a run fit into so many seconds of this process."""
    trainer = Trainer(replace(config, max_steps=WARM_UP + TIMED))
    batches = iter(trainer.loader)
    for step in range(WARM_UP):
        trainer._step(step, batches)
    start = time.process_time()
    for step in range(WARM_UP, WARM_UP + TIMED):
        trainer._step(step, batches)
    return max(1, int(cpu_seconds * TIMED / (time.process_time() - start)))


def measure(config: TrainConfig, cpu_seconds: float) -> dict:
    """Train one contestant, draw pictures of every class, and score them."""
    torch.set_num_threads(1)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    config = replace(config, max_steps=steps_within(config, cpu_seconds))
    start = time.process_time()
    trainer = Trainer(config)
    trainer.train()
    trained = time.process_time()
    parameters = sum(parameter.numel() for parameter in trainer.denoiser.parameters())

    pipeline = DiffusionPipeline.from_pretrained(Path(config.output_dir) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    labels = np.arange(pipeline.transformer.config.num_classes).repeat(SAMPLES_PER_CLASS)
    generator = torch.Generator().manual_seed(config.seed)
    begun = time.process_time()
    pictures = pipeline(labels.tolist(), generator=generator, output_type="np").images[..., 0]
    sampled = time.process_time()
    return {
        "parameters": parameters,
        "steps": config.max_steps,
        "training_seconds": trained - start,
        "sampling_seconds": sampled - begun,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **judge(config).score(pictures, labels),
    }


def judge(config: TrainConfig) -> DigitJudge:
    """A judge that learned from the other half, at the run's resolution."""
    images, labels, _ = load_labelled_images(config.data.name, "test", config.data.path)
    return DigitJudge(resized(images, config.data.resolution), labels)


def references(config: TrainConfig) -> dict[str, dict]:
    """What the scores of no generator at all are: the training half itself, and a Gaussian of each class's pixels."""
    images, labels, _ = load_labelled_images(config.data.name, "train", config.data.path)
    images = resized(images, config.data.resolution)
    rng = np.random.default_rng(0)
    drawn = []
    for label in np.unique(labels):
        own = images[labels == label].reshape(-1, images[0].size) / 255
        drawn.append(rng.multivariate_normal(own.mean(0), np.cov(own, rowvar=False), SAMPLES_PER_CLASS).clip(0, 1))
    gaussian = np.concatenate(drawn).reshape(-1, *images.shape[1:])
    scores = judge(config)
    return {
        "the training half": scores.score(images, labels),
        "a Gaussian per class": scores.score(gaussian, np.unique(labels).repeat(SAMPLES_PER_CLASS)),
    }


def compare(config: ComparisonConfig) -> None:
    """Run what is missing in `config.output`, each in a process of its own, so that its memory can be told."""
    unknown = sorted(set(config.contestants) - set(CONTESTANTS))
    if unknown:
        raise ValueError(f"contestants {unknown} are not known; choose among {list(CONTESTANTS)}.")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    done = {(line["name"], line["seed"]) for line in lines}

    def write(name: str, seed: int | None, scores: dict) -> None:
        with output.open("a") as file:
            file.write(json.dumps({"name": name, "seed": seed, "cpu_seconds": config.cpu_seconds, **scores}) + "\n")
        print(f"{name}, seed {seed}: accuracy {scores['accuracy']:.3f}, distance {scores['distance']:.2f}", flush=True)

    if not done:
        for name, scores in references(config.run).items():
            write(name, None, scores)
    spawn = multiprocessing.get_context("spawn")
    for seed in range(config.seeds):
        for name in config.contestants:
            if (name, seed) not in done:
                with spawn.Pool(1) as pool:
                    write(name, seed, pool.apply(measure, (contestant(config, name, seed), config.cpu_seconds)))


if __name__ == "__main__":
    run("train.compare_mixers", lambda: compare(parse(ComparisonConfig, "train.compare_mixers")))
