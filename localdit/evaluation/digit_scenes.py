"""Scores pictures of digit scenes: reads them and compares what was read with what their captions ask for."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from safetensors.torch import save_file

from localdit.command_line import Parser, counting_number, run, seed_number, start_process
from localdit.data.digit_scenes import (
    CANVAS,
    Scene,
    group_by_class,
    load_digits,
    parse_caption,
    render_with_boxes,
    sample_scene,
)
from localdit.evaluation.alignment import read_pairs
from localdit.evaluation.digit_reader import DigitSceneReader, Reading, SceneReading, load_reader
from localdit.evaluation.digit_reader_training import train_reader
from localdit.evaluation.extractors import weights_hash
from localdit.evaluation.generation import read_generation
from localdit.evaluation.intervals import rate_interval
from localdit.evaluation.processes import gathered, in_batches, own_pictures
from localdit.evaluation.records import FILE, about_pictures, append_scores, command_of, make_record, scores_file

__all__ = [
    "DigitSceneReader",
    "Reading",
    "SceneReading",
    "judge",
    "load_reader",
    "score",
    "score_folder",
    "score_readings",
    "score_real_scenes",
    "scene_records",
    "train_reader",
]

BATCH = 256  # pictures that are read into memory at a time


def judge(reading: SceneReading, scene: Scene) -> dict[str, bool]:
    """Say field by field whether a picture shows what was asked.

    "count" is the number of digits; where it is wrong, everything but "background" is wrong too.
    For one digit: "digit" and "colour". For two: "digits" and "colours", each in any order, and "relation", for which
    the digits read are paired with those asked so that most digits and colours agree, and the longer of the horizontal
    and the vertical distance between their centres decides. "all" is every digit in its own colour and place, on the
    right background.
    """
    found, asked = reading.digits, scene.glyphs
    count = len(found) == len(asked)
    digits = count and Counter(x.digit for x in found) == Counter(x.digit for x in asked)
    colours = count and Counter(x.colour for x in found) == Counter(x.colour for x in asked)
    background = reading.background == scene.background
    if scene.second is None:
        every = digits and colours and background
        return {"count": count, "digit": digits, "colour": colours, "background": background, "all": every}

    pairings = [found, found[::-1]] if count else []
    agreements = [
        sum((x.digit == y.digit) + (x.colour == y.colour) for x, y in zip(pairing, asked, strict=True))
        for pairing in pairings
    ]
    best = max(agreements, default=0)
    # Both pairings can be the best ones, as when the two digits asked for are alike: either may have the relation.
    relation = any(
        agreement == best and _relation(*pairing) == scene.relation
        for pairing, agreement in zip(pairings, agreements, strict=True)
    )
    return {
        "count": count,
        "digits": digits,
        "colours": colours,
        "relation": relation,
        "background": background,
        "all": relation and background and best == 4,
    }


def score_readings(readings: list[SceneReading], captions: list[str]) -> dict:
    """Compare what was read in pictures with their captions.

    Returns:
        for each of the groups "one_digit", "two_digits" and "two_digits_held_out" (combinations kept out of training)
        that has captions: the number of "prompts", the "rates" of the fields that `judge` names, and the 95% bootstrap
        "intervals" [low, high] of these rates. Raises ValueError for a caption that is not in the grammar.
    """
    if len(readings) != len(captions):
        raise ValueError(
            f"The pictures ({len(readings)}) are not as many as the captions ({len(captions)}); each picture needs one."
        )
    judgements = {"one_digit": [], "two_digits": [], "two_digits_held_out": []}
    for reading, scene in zip(readings, map(parse_caption, captions), strict=True):
        group = "one_digit" if scene.second is None else "two_digits_held_out" if scene.held_out else "two_digits"
        judgements[group].append(judge(reading, scene))
    return {group: _summary(judged) for group, judged in judgements.items() if judged}


def score(reader: DigitSceneReader, images, captions: list[str]) -> dict:
    """Read pictures (what `DigitSceneReader.read` takes) and compare them with their captions: `score_readings`."""
    return score_readings(reader.read(images), captions)


def score_folder(reader: DigitSceneReader, folder: str | Path) -> dict:
    """Score the pictures of a folder with their captions, as `read_captions` finds them.

    Several processes of accelerate each read a part.
    """
    pairs = read_captions(folder)
    readings: list[SceneReading] = []
    pictures = own_pictures([path for path, _ in pairs], f"scenes of {folder}")
    for batch in in_batches(pictures, BATCH):
        readings += reader.read(batch)
    return score_readings(gathered(readings), [caption for _, caption in pairs])


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """The pictures of a folder with their captions: metadata.jsonl has {"file_name": ..., "text": ...} on every line.

    Without that file, each picture has its caption beside it in a .txt, as `generate` leaves it.

    Raises:
        FileNotFoundError: where there is neither.
        ValueError: where the file is damaged or empty.
    """
    metadata = Path(folder) / "metadata.jsonl"
    if not metadata.is_file() and any(Path(folder).glob("*.txt")):
        return read_pairs(folder)
    if not metadata.is_file():
        raise FileNotFoundError(
            f'{metadata} is missing; write a line {{"file_name": ..., "text": ...}} per picture, or a .txt beside each.'
        )
    entries = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append((Path(folder) / entry["file_name"], entry["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'Line {number} of {metadata} is not {{"file_name": ..., "text": ...}}.') from error
    if not entries:
        raise ValueError(f"{metadata} names no pictures, so there is nothing to score.")
    return entries


def scene_records(
    scores: dict, reader: DigitSceneReader, name: str, generated: dict[str, Any], generation: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Records of what `score_readings` returns: "scenes_correct" of each group, and of two digits "scenes_relation".

    Args:
        name: the reader's file.
        generated: what `about_pictures` tells of all the pictures.
        generation: how they came about.
    """
    extractor = {
        "name": Path(name).name,
        "family": "digit scene reader",
        "sha256": weights_hash(reader),
        "dimension": None,
        "preprocessing": "64 x 64 pixels as they are",
    }
    records = []
    for group, found in scores.items():
        for field, metric in (("all", "scenes_correct"), ("relation", "scenes_relation")):
            if field in found["rates"]:
                records.append(
                    make_record(
                        metric,
                        found["rates"][field],
                        found["intervals"][field],
                        extractor=extractor,
                        generated={**generated, "count": found["prompts"]},
                        generation=generation,
                        settings={"prompts": group},
                        **({"detail": found} if field == "all" else {}),
                    )
                )
    return records


def score_real_scenes(
    reader: DigitSceneReader, images: np.ndarray, labels: np.ndarray, scenes: int = 1000, seed: int = 1
) -> dict:
    """Score a reader on real scenes in the given handwriting, which is how often the reader itself is right.

    Args:
        images, labels: handwritten digits uint8 [N, 28, 28] and their classes [N].
        scenes: how many scenes to draw for each group.
    """
    rng = np.random.default_rng(seed)
    handwriting = group_by_class(images, labels)
    kinds = [(1, False), (2, False), (2, True)]  # the number of digits, and whether the combination is held out
    drawn = [sample_scene(rng, *kind) for kind in kinds for _ in range(scenes)]
    pictures = np.stack([render_with_boxes(scene, rng, handwriting)[0] for scene in drawn])
    return score(reader, pictures, [scene.caption for scene in drawn])


def _relation(first: Reading, second: Reading) -> str:
    dx, dy = (b - a for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) > abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


def _summary(judged: list[dict[str, bool]]) -> dict:
    prompts = len(judged)
    rates = {field: sum(judgement[field] for judgement in judged) / prompts for field in judged[0]}
    intervals = {field: rate_interval(rate, prompts) for field, rate in rates.items()}
    return {"prompts": prompts, "rates": rates, "intervals": intervals}


def _train(arguments: argparse.Namespace) -> dict:
    """Train and save a reader; returns its scores on real scenes in handwriting it never saw."""
    if arguments.output.exists():
        raise ValueError(f"--output {arguments.output} exists; remove it, or choose another.")
    images, labels = load_digits("test")
    held_back = np.zeros(len(images), bool)
    if not 0 <= arguments.hold_back <= len(images) // 2:
        raise ValueError(f"--hold-back {arguments.hold_back} is not between 0 and {len(images) // 2}, half the digits.")
    held_back[np.arange(arguments.hold_back) * len(images) // max(arguments.hold_back, 1)] = True
    reader = train_reader(images[~held_back], labels[~held_back], arguments.steps, arguments.seed, bf16=arguments.bf16)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(reader.state_dict(), arguments.output)
    scores = {"generator's handwriting": score_real_scenes(reader, *load_digits("train"))}
    if arguments.hold_back:
        scores["held-back handwriting"] = score_real_scenes(reader, images[held_back], labels[held_back])
    return scores


def _score_and_keep(images: Path, path: Path, output: str | None, command: str) -> dict:
    """The scores of a folder, which go to a scores file as well."""
    start_process("cpu")
    reader, file = load_reader(path), scores_file(images, output)
    scores = score_folder(reader, images)
    if PartialState().is_main_process:
        files = [file for file, _ in read_captions(images)]
        pictures = about_pictures(images, files, [(CANVAS, CANVAS)])
        records = scene_records(scores, reader, str(path), pictures, read_generation(images))
        append_scores(file, [{**record, "command": command} for record in records])
        print(file, file=sys.stderr)  # the scores themselves go to stdout, as JSON
    return scores


def main(argv: list[str] | None = None):
    """Run the command line, which prints the rates as JSON."""
    parser = Parser(prog="python -m localdit.evaluation.digit_scenes", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    train = commands.add_parser("train", help="train a reader on the test split of the handwritten digits")
    train.add_argument("--output", type=Path, required=True, help="where to save the reader, a .safetensors file")
    train.add_argument("--steps", type=counting_number, default=2500, help="batches of 32 scenes")
    train.add_argument("--seed", type=seed_number, default=0)
    train.add_argument("--bf16", action="store_true", help="faster on a CPU with bfloat16 instructions")
    train.add_argument("--hold-back", type=int, default=0, help="digits to keep for measuring and not train on")
    check = commands.add_parser("check", help="score a reader on real scenes in the generator's handwriting")
    check.add_argument("--reader", type=Path, required=True, help="the reader's .safetensors file")
    check.add_argument("--scenes", type=counting_number, default=1000, help="how many scenes to draw for each group")
    check.add_argument("--seed", type=seed_number, default=1)
    scoring = commands.add_parser("score", help="score a folder of pictures")
    scoring.add_argument("--images", type=Path, required=True, help="folder with pictures and their metadata.jsonl")
    scoring.add_argument("--reader", type=Path, required=True, help="the reader's .safetensors file")
    scoring.add_argument("--output", help=f"by default {FILE} beside the folder; lines are added")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        result = _train(arguments)
    elif arguments.command == "check":
        reader = load_reader(arguments.reader)
        result = score_real_scenes(reader, *load_digits("train"), arguments.scenes, arguments.seed)
    else:
        command = command_of(parser, argv)
        result = _score_and_keep(arguments.images, arguments.reader, arguments.output, command)
    if PartialState().is_main_process:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run("localdit.evaluation.digit_scenes", main)
