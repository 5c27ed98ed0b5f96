"""Compare token mixers: the same data, parameters and CPU time for each; writes the scores as JSON lines."""

import json
import multiprocessing
import resource
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from config import Count, ModelConfig, Positive, TrainConfig
from localdit.data.digit_scenes import load_digits
from localdit.data.labelled_images import SETS, load_labelled_images
from localdit.evaluation.digit_scenes import load_reader, score_real_scenes
from localdit.evaluation.intervals import rate_interval
from localdit.evaluation.records import versions
from train.command_line import parse, run
from train.comparison_report import marks, table_name, write_page
from train.datasets import resized
from train.score_classes import draw_classes, judge_of
from train.score_digit_scenes import score_text_to_image
from train.settings import check_ranges
from train.trainer import Trainer

PAIRS = ("two_digits", "two_digits_held_out")
WARM_UP, ROUNDS, TIMED = 5, 7, 4  # steps, to learn how many fit into the budget


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison of token mixers, on labelled pictures or on digit scenes.

    Args:
        output: file of the scores, one JSON object a line; runs that it holds already are not done again.
        run: what the runs share; each brings its own mixers, seed and number of steps.
        contestants: by name, what of the model's config each has for its own.
        only: names of the contestants to run; None for all.
        seeds: how many seeds, from 0 on.
        cpu_seconds: the training time of each run, on one thread.
        samples: pictures of each class, or of each kind of digit scene, that are scored.
        reader: of digit scenes, trained by python -m localdit.evaluation.digit_scenes train.
        page: of Markdown, which gets the table and the plot in the end; see `train.comparison_report`.
    """

    output: str
    run: TrainConfig
    contestants: dict[str, dict[str, Any]]
    only: list[str] | None = None
    seeds: Count = 3
    cpu_seconds: Positive = 80.0
    samples: Count = 100
    reader: str | None = None
    page: str | None = None


def contestant(config: ComparisonConfig, name: str, seed: int) -> TrainConfig:
    """The run of one contestant."""
    model: ModelConfig = replace(config.run.model, **config.contestants[name])
    folder = Path(config.run.output_dir) / f"{name.replace(' ', '_')}-{seed}"
    return replace(config.run, model=model, seed=seed, output_dir=str(folder), resume=None)


def step_seconds(config: ComparisonConfig) -> dict[str, float]:
    """CPU seconds of a training step of each contestant: medians of turns that they take, as the machine is shared."""
    torch.set_num_threads(1)
    trainers, batches = {}, {}
    for name in config.contestants:
        timed = replace(contestant(config, name, seed=0), output_dir=f"{config.run.output_dir}/timing", max_steps=1000)
        trainers[name] = Trainer(timed)  # writes nothing before it is told to train
        batches[name] = iter(trainers[name].loader)
    seconds = {name: [] for name in trainers}
    for turn in range(ROUNDS + 1):
        for name, trainer in trainers.items():
            first, steps = (0, WARM_UP) if turn == 0 else (WARM_UP + (turn - 1) * TIMED, TIMED)
            start = time.process_time()
            for step in range(first, first + steps):
                trainer.train_step(step, batches[name])
            seconds[name].append((time.process_time() - start) / steps)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def load_step_seconds(config: ComparisonConfig) -> dict[str, float]:
    """What `step_seconds` found before, in a file beside the scores, or finds now."""
    path = Path(config.output).with_name("step_seconds.json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    if not found.keys() >= config.contestants.keys():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(step_seconds, (config,))
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def measure(config: ComparisonConfig, name: str, seed: int, max_steps: int) -> dict:
    """Train one contestant and score what it draws."""
    torch.set_num_threads(1)
    training = replace(contestant(config, name, seed), max_steps=max_steps)
    shutil.rmtree(training.output_dir, ignore_errors=True)
    start = time.process_time()
    trainer = Trainer(training)
    trainer.train()
    seconds = time.process_time() - start
    pipeline = DiffusionPipeline.from_pretrained(Path(training.output_dir) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.denoiser.transformer.parameters()),
        "steps": training.max_steps,
        "training_seconds": seconds,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **score(config, pipeline, seed),
    }


def score(config: ComparisonConfig, pipeline: DiffusionPipeline, seed: int) -> dict[str, Any]:
    """Scores of what a pipeline draws, and how long it and, of scenes, their reading took."""
    data = config.run.data
    start = time.process_time()
    if data.name not in SETS:
        scores = score_text_to_image(pipeline, load_reader(checked_reader(config)), config.samples, seed)
        return {"sampling_seconds": time.process_time() - start, **scene_rates(scores), "versions": versions()}
    pictures, labels = draw_classes(pipeline, config.samples, seed)
    seconds = time.process_time() - start
    scores = judge_of(data.name, data.path, data.resolution).score(pictures, labels)
    return {"sampling_seconds": seconds, **scores, "versions": versions()}


def scene_rates(scores: dict) -> dict[str, Any]:
    """The rates that tell mixers apart: everything right by kind of scene, and the relation over all of two digits.

    Beside them the 95% bootstrap interval of the relation.
    """
    pairs = [scores[kind]["rates"] for kind in PAIRS]
    relation = float(np.mean([rates["relation"] for rates in pairs]))
    return {
        "one_digit": scores["one_digit"]["rates"]["all"],
        "two_digits": pairs[0]["all"],
        "held_out": pairs[1]["all"],
        "relation": relation,
        "interval": rate_interval(relation, sum(scores[kind]["prompts"] for kind in PAIRS)),
        "digits": float(np.mean([rates["digits"] for rates in pairs])),
    }


def checked_reader(config: ComparisonConfig) -> str:
    if config.reader is None or not Path(config.reader).is_file():
        raise ValueError(
            f"reader={config.reader!r} is no file; train one with python -m localdit.evaluation.digit_scenes train."
        )
    return config.reader


def references(config: ComparisonConfig) -> dict[str, dict]:
    """What the scores of no generator at all are: of real pictures, and of a Gaussian of each class's pixels."""
    data = config.run.data
    if data.name not in SETS:
        scores = score_real_scenes(load_reader(checked_reader(config)), *load_digits("train"), config.samples)
        return {"real scenes": scene_rates(scores)}
    images, labels, _ = load_labelled_images(data.name, "train", data.path)
    images = resized(images, data.resolution)
    rng = np.random.default_rng(0)
    drawn = []
    for label in np.unique(labels):
        own = images[labels == label].reshape(-1, images[0].size) / 255
        drawn.append(rng.multivariate_normal(own.mean(0), np.cov(own, rowvar=False), config.samples).clip(0, 1))
    gaussian = np.concatenate(drawn).reshape(-1, *images.shape[1:])
    judge = judge_of(data.name, data.path, data.resolution)
    return {
        "the training pictures": judge.score(images, labels),
        "a Gaussian per class": judge.score(gaussian, np.unique(labels).repeat(config.samples)),
    }


def compare(config: ComparisonConfig) -> None:
    """Run what is missing in `config.output`, each in a process of its own, so that its memory can be told."""
    check_ranges(config)
    names = list(config.contestants) if config.only is None else config.only
    if unknown := sorted(set(names) - set(config.contestants)):
        raise ValueError(f"only={unknown} are not known; choose among {list(config.contestants)}.")
    if config.run.data.name not in SETS:
        checked_reader(config)
    elif config.samples < 2:
        raise ValueError(f"samples={config.samples} of a class are too few for a diversity; give at least 2.")
    output = Path(config.output)
    if config.page is not None:
        marks(Path(config.page), table_name(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    if others := {line["cpu_seconds"] for line in lines} - {config.cpu_seconds}:
        raise ValueError(
            f"{output} holds runs of cpu_seconds={others.pop():g}, which do not compare with cpu_seconds="
            f"{config.cpu_seconds:g}; give another --output."
        )
    done = {(line["name"], line["seed"]) for line in lines}

    def write(name: str, seed: int | None, scores: dict) -> None:
        with output.open("a") as file:
            file.write(json.dumps({"name": name, "seed": seed, "cpu_seconds": config.cpu_seconds, **scores}) + "\n")
        rates = (f"{key} {value:.3g}" for key, value in scores.items() if isinstance(value, float))
        print(f"{name}, seed {seed}: {', '.join(rates)}", flush=True)

    if not done:
        for name, scores in references(config).items():
            write(name, None, scores)
    missing = [(name, seed) for seed in range(config.seeds) for name in names if (name, seed) not in done]
    seconds = load_step_seconds(config) if missing else {}
    for name, seed in missing:
        max_steps = max(1, int(config.cpu_seconds / seconds[name]))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            write(name, seed, pool.apply(measure, (config, name, seed, max_steps)))
    if config.page is not None:
        write_page(output, Path(config.page))


if __name__ == "__main__":
    run("train.compare_mixers", lambda: compare(parse(ComparisonConfig, "train.compare_mixers")))
