"""Scores a digit-scenes pipeline on fresh prompts: python -m train.score_digit_scenes --reader FILE."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch
from diffusers import DiffusionPipeline

from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline
from localdit.command_line import PRETRAINED, Parser, best_device, counting_number, load_pipeline, run, seed_number
from localdit.data.digit_scenes import CANVAS, COLOURS, Scene, render, sample_scene
from localdit.evaluation.digit_reader import DigitSceneReader
from localdit.evaluation.digit_scenes import load_reader, scene_records, score
from localdit.evaluation.files import check_target
from localdit.evaluation.generation import call_settings
from localdit.evaluation.intervals import rate_interval
from localdit.evaluation.records import append_scores, command_of, in_memory, make_record

BATCH = 50
MAX_SHIFT = 8  # pixels that a digit may move when only its colour is to change


def generate(pipeline: DiffusionPipeline, scenes: list[Scene], seed: int, **arguments) -> np.ndarray:
    """One picture for each scene, uint8 [B, 64, 64, 3], the i-th from seed + i; lists among `arguments` are batched."""
    batches = []
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        batch = {
            name: value[start : start + BATCH] if isinstance(value, list) else value
            for name, value in arguments.items()
        }
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        captions = [scene.caption for scene in part]
        batches.append(pipeline(captions, generator=generators, output_type="np", **batch).images)
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


def score_text_to_image(
    pipeline: DiffusionPipeline, reader: DigitSceneReader, prompts: int, seed: int, **arguments
) -> dict:
    """Scores of one-digit, two-digit and held-out two-digit prompts, so many of each."""
    rng = np.random.default_rng(seed)
    kinds = [(1, False), (2, False), (2, True)]
    scenes = [sample_scene(rng, *kind) for kind in kinds for _ in range(prompts)]
    return score(reader, generate(pipeline, scenes, seed, **arguments), [scene.caption for scene in scenes])


def score_image_to_image(
    pipeline: DiffusionPipeline, reader: DigitSceneReader, prompts: int, seed: int, strength: float, **arguments
) -> dict[str, float]:
    """Asks for another colour of a real digit's picture; how often the colour changes and the digit stays in place."""
    rng = np.random.default_rng(seed)
    before = [sample_scene(rng, num_digits=1) for _ in range(prompts)]
    colours = [rng.choice([colour for colour in COLOURS if colour != scene.first.colour]) for scene in before]
    after = [
        replace(scene, first=replace(scene.first, colour=str(colour)))
        for scene, colour in zip(before, colours, strict=True)
    ]
    pictures = np.stack([render(scene, rng, "test") for scene in before])
    images = list(pictures.astype(np.float32) / 255)
    edited = generate(pipeline, after, seed, image=images, strength=strength, **arguments)
    counts = {"colour": 0, "place": 0, "digit": 0, "colour and place": 0}
    for scene, source, result in zip(after, reader.read(pictures), reader.read(edited), strict=True):
        if not result.digits or not source.digits:
            continue
        found = result.digits[0]
        colour = len(result.digits) == 1 and found.colour == scene.first.colour
        place = math.dist(found.centre, source.digits[0].centre) <= MAX_SHIFT
        counts["colour"] += colour
        counts["place"] += place
        counts["digit"] += found.digit == scene.first.digit
        counts["colour and place"] += colour and place
    return {"prompts": prompts, "strength": strength, **{name: count / prompts for name, count in counts.items()}}


def records_of(
    scores: dict[str, dict],
    reader: DigitSceneReader,
    pipeline: DiffusionPipeline,
    img2img: DiffusionPipeline,
    sampling: dict,
    arguments: Namespace,
) -> list[dict]:
    """The scores as lines of a scores file."""
    told = {"pipeline": arguments.pipeline, "seed": arguments.seed, "dtype": "float32"}
    pictures = in_memory(arguments.prompts, (CANVAS, CANVAS))
    generation = {**told, **call_settings(pipeline, sampling)}
    records = scene_records(scores["text to image"], reader, arguments.reader, pictures, generation)
    edits = scores["image to image"]
    both = edits["colour and place"]
    recoloured = make_record(
        "recoloured_in_place",
        both,
        rate_interval(both, arguments.prompts),
        extractor=records[0]["extractor"],
        generated=pictures,
        generation={**told, **call_settings(img2img, sampling), "strength": arguments.strength},
        settings={"strength": arguments.strength},
        detail=edits,
    )
    return [*records, recoloured]


def main() -> None:
    parser = Parser(prog="python -m train.score_digit_scenes", description=__doc__)
    parser.add_argument("--pipeline", default=str(PRETRAINED), help="folder; by default the shipped one")
    parser.add_argument("--reader", required=True, help="trained by python -m localdit.evaluation.digit_scenes train")
    parser.add_argument("--prompts", type=counting_number, default=1000, help="prompts of each kind")
    parser.add_argument("--seed", type=seed_number, default=1)
    parser.add_argument("--num_inference_steps", type=int, help="by default the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="by default the pipeline's")
    parser.add_argument("--strength", type=float, default=0.6)
    parser.add_argument("--output", help="file of scores for python -m localdit.evaluation report; lines are added")
    arguments = parser.parse_args()
    if arguments.output:
        check_target("--output", arguments.output)

    reader = load_reader(arguments.reader)
    pipeline = load_pipeline(LocalDiTPipeline, arguments.pipeline, best_device(), "float32", option="--pipeline")
    pipeline.set_progress_bar_config(disable=True)
    img2img = LocalDiTImg2ImgPipeline.from_pipe(pipeline)
    img2img.set_progress_bar_config(disable=True)
    sampling = {
        name: getattr(arguments, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(arguments, name) is not None
    }
    common = (reader, arguments.prompts, arguments.seed)
    scores = {
        "text to image": score_text_to_image(pipeline, *common, **sampling),
        "image to image": score_image_to_image(img2img, *common, arguments.strength, **sampling),
    }
    print(json.dumps(scores, indent=2))
    if arguments.output:
        records = records_of(scores, reader, pipeline, img2img, sampling, arguments)
        append_scores(arguments.output, [{**record, "command": command_of(parser)} for record in records])


if __name__ == "__main__":
    run("train.score_digit_scenes", main)
