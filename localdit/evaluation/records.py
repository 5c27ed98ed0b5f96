"""What is written of a score: the value, its interval, and all that it takes to repeat it."""

import json
import logging
import math
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from localdit.evaluation.files import check_target
from localdit.evaluation.images import RESIZE
from localdit.version import VERSION

logger = logging.getLogger(__name__)

FILE = "scores.jsonl"
PACKAGES = ("torch", "torchmetrics", "transformers", "diffusers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of this package, and of those that have a say in a score and are installed."""
    found = {"localdit": VERSION}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # torchmetrics is not needed for every score
            continue
    return found


def make_record(
    metric: str,
    value: float,
    interval: Sequence[float] | None,
    *,
    generated: dict[str, Any],
    real: dict[str, Any] | None = None,
    extractor: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line of a scores file.

    Args:
        generated, real: what `about_pictures` tells of them.
        extractor: name, family, sha256, dimension and preprocessing of what looked at the pictures.
        generation: how the pictures came about, as `read_generation` finds it.
        more: such as "settings", numbers that the metric was called with, by which rows of a report differ.

    Raises:
        ValueError: where the value is no number.
    """
    if not math.isfinite(value):
        raise ValueError(f"{metric} is {value}, which is no score; look at the pictures, or take another extractor.")
    return {
        "metric": metric,
        "value": float(value),
        "interval": None if interval is None else [float(end) for end in interval],
        "versions": versions(),
        "extractor": extractor,
        "real": real,
        "generated": generated,
        "generation": generation,
        **more,
    }


def about_pictures(
    source: str | Path, files: Sequence[Path], sizes: Iterable[tuple[int, int]], scaled: bool = False
) -> dict[str, Any]:
    """What a score tells of a set of pictures.

    Args:
        source: where they are.
        files: one for each picture.
        sizes: the widths and heights that they have.
        scaled: whether they were cut and scaled before anything looked at them.

    Returns:
        "source", "count", "formats", the "size" if it is one, and the filter of "resize", None where none was needed.
    """
    distinct = set(sizes)
    return {
        "source": str(source),
        "count": len(files),
        "formats": sorted({path.suffix.lower().lstrip(".") for path in files}),
        "size": list(distinct.pop()) if len(distinct) == 1 else None,
        "resize": RESIZE if scaled else None,
    }


def in_memory(
    count: int, size: tuple[int, int] | None, source: str = "memory", resize: str | None = None
) -> dict[str, Any]:
    """What `about_pictures` tells, of pictures that are in no file; `resize` is the filter that scaled them."""
    return {"source": source, "count": count, "formats": [], "size": size and list(size), "resize": resize}


def told(record: dict[str, Any]) -> str:
    """A score in one line."""
    within, settings = record["interval"], settings_of(record)
    name = f"{record['metric']} ({settings})" if settings else record["metric"]
    return f"{name} {record['value']:.4g}" + (f" ({within[0]:.4g} to {within[1]:.4g})" if within else "")


def settings_of(record: dict[str, Any]) -> str:
    """The numbers that a metric was called with, as text, or nothing."""
    return ", ".join(f"{name} {value}" for name, value in (record.get("settings") or {}).items())


def scores_file(folder: str | Path, given: str | Path | None) -> Path:
    """Where the scores of a folder of pictures go: the file that is given, or `FILE` beside the folder.

    Raises:
        ValueError: where it cannot be written to, or has the name of something else.
    """
    path = Path(given) if given else Path(folder).resolve().parent / FILE
    check_target("--output", path)
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"--output {str(path)!r} is to hold lines of JSON; give it a name that ends in .jsonl.")
    return path


def command_of(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> str:
    """The command line that was given, by default to this program, as a shell takes it."""
    return f"{parser.prog} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"


def keep(records: list[dict[str, Any]], path: Path, command: str) -> None:
    """Add records to a scores file, with the command that repeats them, and print them; the main process alone does."""
    if not PartialState().is_main_process:
        return
    append_scores(path, [{**record, "command": command} for record in records])
    if records and records[0]["generation"] is None:
        source = records[0]["generated"]["source"]
        logger.warning("%s has no generation.json, so that seed, steps, guidance and sampler stay untold.", source)
    for record in records:
        print(told(record))
    print(path)


def append_scores(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Add records to a file of JSON lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cut = Path(path).is_file() and not Path(path).read_bytes().endswith(b"\n")  # by a kill, or an editor
    with Path(path).open("a") as file:
        file.write("\n" if cut and Path(path).stat().st_size else "")
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def card_scores(path: str | Path) -> dict[str, str]:
    """Scores of a file for a model card, as `localdit.hub.export` takes them: each with its interval and command.

    Of what was measured twice it is what was measured last. Raises a ValueError for a damaged line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            by = ", ".join(filter(None, ((record.get("extractor") or {}).get("name"), settings_of(record))))
            value = told({**record, "metric": "", "settings": None}).strip()
            command = f", by `{record['command']}`" if record.get("command") else ""
            found[f"{record['metric']} ({by})" if by else record["metric"]] = value + command
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Line {number} of {path} is no score ({error}); take it away.") from error
    return found
