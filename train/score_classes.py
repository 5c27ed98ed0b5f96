"""Scores a class-conditional model of small grey pictures: python -m train.score_classes --model FOLDER --data NAME."""

import json

import numpy as np
import torch
from diffusers import DiffusionPipeline

from localdit import LocalDiTClassPipeline
from localdit.command_line import Parser, best_device, counting_number, load_pipeline, run, seed_number
from localdit.data.labelled_images import SETS, load_labelled_images
from localdit.evaluation.class_judge import ClassJudge
from localdit.evaluation.files import check_target
from localdit.evaluation.generation import call_settings
from localdit.evaluation.records import append_scores, command_of, in_memory
from train.datasets import resized

BATCH = 250


def draw_classes(pipeline: DiffusionPipeline, per_class: int, seed: int, **arguments) -> tuple[np.ndarray, np.ndarray]:
    """So many pictures of every class, [N, height, width] in [0, 1], their labels [N]; with call arguments."""
    labels = np.arange(pipeline.transformer.config.num_classes).repeat(per_class)
    generator = torch.Generator().manual_seed(seed)
    pictures = [
        pipeline(labels[start : start + BATCH].tolist(), generator=generator, output_type="np", **arguments).images
        for start in range(0, len(labels), BATCH)
    ]
    return np.concatenate(pictures)[..., 0], labels


def judge_of(name: str, path: str | None, resolution: int) -> ClassJudge:
    """A judge that learned from the test part of a picture set, which no generator of ours is trained on."""
    images, labels, _ = load_labelled_images(name, "test", path)
    return ClassJudge(resized(images, resolution), labels)


def main() -> None:
    parser = Parser(prog="python -m train.score_classes", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a LocalDiTClassPipeline")
    parser.add_argument("--data", required=True, choices=SETS, help="the set that it was trained on")
    parser.add_argument("--path", help="folder of the set's IDX files; by default from the Hugging Face Hub")
    parser.add_argument("--per_class", type=counting_number, default=100, help="pictures of each class")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--num_inference_steps", type=int, help="by default the model's")
    parser.add_argument("--guidance_scale", type=float, help="1 turns guidance off; by default the model's")
    parser.add_argument("--output", help="file of scores for python -m localdit.evaluation report; lines are added")
    arguments = parser.parse_args()
    if arguments.output:
        check_target("--output", arguments.output)
    if arguments.per_class < 2:
        raise ValueError(f"--per_class {arguments.per_class} is too few for a diversity; give at least 2.")

    train, train_labels, classes = load_labelled_images(arguments.data, "train", arguments.path)
    pipeline = load_pipeline(LocalDiTClassPipeline, arguments.model, best_device(), "float32")
    if pipeline.transformer.config.num_classes != len(classes):
        raise ValueError(
            f"--model {arguments.model!r} has {pipeline.transformer.config.num_classes} classes, but {arguments.data} "
            f"has {len(classes)}; name the set that it was trained on."
        )
    names = ("num_inference_steps", "guidance_scale")
    sampling = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    pictures, labels = draw_classes(pipeline, arguments.per_class, arguments.seed, **sampling)
    resolution = pictures.shape[1]
    judge = judge_of(arguments.data, arguments.path, resolution)
    real = np.concatenate([np.flatnonzero(train_labels == label)[: arguments.per_class] for label in np.unique(labels)])
    scores = {
        "generated": judge.score(pictures, labels),
        "training pictures": judge.score(resized(train[real], resolution), train_labels[real]),
    }
    print(json.dumps(scores, indent=2))
    if arguments.output:
        size = (resolution, resolution)
        generation = {"pipeline": arguments.model, "per_class": arguments.per_class, "seed": arguments.seed}
        records = judge.records(
            pictures,
            labels,
            name=f"judge of {arguments.data}",
            real=in_memory(len(judge.labels), size, f"{arguments.data}, test", "PIL bilinear"),
            generated=in_memory(len(labels), size),
            generation={**generation, "dtype": "float32", **call_settings(pipeline, sampling)},
            command=command_of(parser),
        )
        append_scores(arguments.output, records)


if __name__ == "__main__":
    run("train.score_classes", main)
