"""Runs as folders of scores and pictures: read, and compared with each other."""

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localdit.evaluation.generation import read_generation
from localdit.evaluation.records import FILE as SCORES
from localdit.evaluation.records import settings_of

IMAGES = "images"
PARTS = ("extractor", "real", "generated", "generation", "versions", "settings")
LOWER_IS_BETTER = ("fid", "kid", "cmmd", "lpips")
HIGHER_IS_BETTER = (
    *("precision", "recall", "density", "coverage", "inception_score", "class_accuracy", "psnr"),
    *("scenes_correct", "scenes_relation", "recoloured_in_place"),
    *("long_range_readable", "long_range_matching", "long_range_cramers_v"),
)
ONE_IS_BEST = ("seams", "seams_to_real", "class_diversity")

# What runs must share for their scores to be comparable: how the page calls it, and where a score tells it.
MEASURED = {
    "hash of the extractor": ("extractor", "sha256"),
    "preprocessing of the extractor": ("extractor", "preprocessing"),
    "source of the real pictures": ("real", "source"),
    "number of real pictures": ("real", "count"),
    "number of generated pictures": ("generated", "count"),
    "file format of the generated pictures": ("generated", "formats"),
    "filter that scaled the generated pictures": ("generated", "resize"),
    "size of the generated pictures": ("generated", "size"),
}
# By what runs may be meant to differ.
MADE = {
    "guidance scale": ("generation", "guidance_scale"),
    "number of steps": ("generation", "num_inference_steps"),
}

Score = dict[str, Any]
Row = tuple[str, str]  # a metric, and by what it was measured: the name of its extractor, and its settings


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds; of what was measured twice, what was measured last."""

    name: str
    folder: Path
    scores: dict[Row, Score]
    generation: dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether JSON told a finite number; to Python, true and false are numbers as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_score(line: bytes, place: str) -> Score:
    """A line of a scores file, with {} for each part that is null or missing; raises a ValueError for a damaged one."""
    mend = "measure again, or take the line away."
    try:
        score = json.loads(line)
    except ValueError:
        raise ValueError(f"{place} is no JSON; {mend}") from None
    if not isinstance(score, dict) or not isinstance(score.get("metric"), str) or not is_number(score.get("value")):
        raise ValueError(f'{place} has no "metric" that is a text and "value" that is a finite number; {mend}')
    interval = score.setdefault("interval", None)
    is_interval = isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
    if interval is not None and not (is_interval and interval[0] <= interval[1]):
        raise ValueError(f'{place} has "interval" {interval}, which is neither null nor [low, high]; {mend}')
    for part in PARTS:
        score[part] = {} if score.get(part) is None else score[part]
        if not isinstance(score[part], dict):
            raise ValueError(f'{place} has "{part}" {score[part]!r}, which is neither null nor an object; {mend}')
    return score


def measured_by(score: Score) -> str:
    """What tells a score from others of its metric."""
    name = str(score["extractor"].get("name") or "")
    return ", ".join(filter(None, (name, settings_of(score))))


def read_run(name: str, folder: Path) -> Run:
    """Read the scores of a run; raises a ValueError where they are missing or damaged."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give one that holds {SCORES}.")
    file = folder / SCORES
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no {SCORES}; score its pictures with python -m localdit.evaluation.")
    generation = read_generation(folder / IMAGES) or {}
    scores: dict[Row, Score] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            score = read_score(line, f"Line {number} of {file}")
            score["generation"] = score["generation"] or generation
            scores[score["metric"], measured_by(score)] = score
    if not scores:
        raise ValueError(f"{file} holds no score; score the pictures with python -m localdit.evaluation.")
    generations = (score["generation"] for score in reversed(scores.values()) if score["generation"])
    return Run(name, folder, scores, generation or next(generations, {}))


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs, each under the last part of its path, or as many parts as tell it from the others.

    Raises:
        ValueError: where a folder is given twice, or is not that of a run.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice; give each run once.")

    def name(path: Path) -> str:
        ends = (path.parts[-depth:] for depth in itertools.count(1))
        return "/".join(next(end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1))

    return [read_run(name(path), path) for path in paths]


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where it is not known."""
    if metric in HIGHER_IS_BETTER or metric.endswith("_score"):
        return 1
    return -1 if metric in LOWER_IS_BETTER or metric.startswith("fd") else 0


def all_rows(runs: list[Run]) -> list[Row]:
    """What was measured of any run, the extractors of a metric one after another."""
    rows = list(dict.fromkeys(row for run in runs for row in run.scores))
    metrics = list(dict.fromkeys(metric for metric, _ in rows))
    return sorted(rows, key=lambda row: metrics.index(row[0]))


def scores_of(runs: list[Run], row: Row) -> dict[str, Score]:
    """The scores of a row, by the name of the run."""
    return {run.name: run.scores[row] for run in runs if row in run.scores}


def told(scores: dict[str, Score], part: str, key: str) -> dict[str, Any]:
    """What each run tells of itself, without those that tell nothing."""
    values = {name: score[part].get(key) for name, score in scores.items()}
    return {name: value for name, value in values.items() if value is not None}


def differs(values: dict[str, Any]) -> bool:
    """Whether two runs tell different things."""
    return any(value != other for value, other in itertools.pairwise(values.values()))


def best(scores: dict[str, Score], metric: str) -> str | None:
    """The run that is better than all others by more than the intervals, or None where that cannot be said."""
    sign = direction(metric)
    measured_alike = not any(differs(told(scores, *where)) for where in MEASURED.values())
    if not sign or not measured_alike or len(scores) < 2 or any(not score["interval"] for score in scores.values()):
        return None
    # from worst to best
    ends = {name: sorted(sign * end for end in score["interval"]) for name, score in scores.items()}
    winner = max(scores, key=lambda name: sign * scores[name]["value"])
    clear = all(ends[name][1] < ends[winner][0] for name in scores if name != winner)
    return winner if clear else None
