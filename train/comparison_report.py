"""Tables and plots of a comparison of token mixers: python -m train.comparison_report SCORES.jsonl --page PAGE.md."""

import argparse
import json
from pathlib import Path

import numpy as np

from train.command_line import run

# Columns of the table, by the key of the scores: title, format, and what the number is multiplied by.
COLUMNS = {
    "accuracy": ("class accuracy, %", "{:.1f}", 100),
    "distance": ("distance", "{:.2f}", 1),
    "precision": ("precision", "{:.2f}", 1),
    "recall": ("recall", "{:.2f}", 1),
    "diversity": ("diversity", "{:.2f}", 1),
    "relation": ("relation, %", "{:.1f}", 100),
    "digits": ("both digits, %", "{:.1f}", 100),
    "one_digit": ("one digit, all, %", "{:.1f}", 100),
    "two_digits": ("two digits, all, %", "{:.1f}", 100),
    "held_out": ("held out, all, %", "{:.1f}", 100),
    "parameters": ("parameters, M", "{:.2f}", 1e-6),
    "steps": ("steps", "{:.0f}", 1),
    "training_seconds": ("training, s", "{:.0f}", 1),
    "sampling_seconds": ("sampling, s", "{:.1f}", 1),
    "peak_megabytes": ("peak memory, MB", "{:.0f}", 1),
}
PLOTTED = ("distance", "relation")  # the first of them that the scores have is drawn


def read(scores: Path) -> dict[str, list[dict]]:
    """The lines of each contestant, in the order of the file.

    Raises:
        ValueError: where the file is missing, holds no scores, or something else.
    """
    if not scores.is_file():
        raise ValueError(f"{scores} is no file; write it with python -m train.compare_mixers.")
    runs: dict[str, list[dict]] = {}
    trained = 0
    for number, text in enumerate(scores.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            trained += line["seed"] is not None
            runs.setdefault(line["name"], []).append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {scores} is no score of train.compare_mixers; remove it.") from error
    if not trained:
        raise ValueError(f"{scores} holds no scores of a mixer; write them with python -m train.compare_mixers.")
    return runs


def cell(lines: list[dict], key: str) -> str:
    """The mean over the seeds, and in brackets the least and the greatest where they differ in print."""
    values = [line[key] for line in lines if key in line]
    if not values:
        return ""
    _, pattern, scale = COLUMNS[key]
    mean, low, high = (pattern.format(scale * value) for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def seeds(lines: list[dict]) -> str:
    """How many runs a row stands for; what was not trained has none."""
    return str(len(lines)) if lines[0]["seed"] is not None else ""


def table(runs: dict[str, list[dict]]) -> str:
    """A Markdown table with a row for each contestant."""
    keys = [key for key in COLUMNS if any(key in line for lines in runs.values() for line in lines)]
    rows = [["", "seeds", *(COLUMNS[key][0] for key in keys)], ["---"] * (2 + len(keys))]
    rows += [[name, seeds(lines), *(cell(lines, key) for key in keys)] for name, lines in runs.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """One dot for each seed, a row for each contestant, and a line where real pictures are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contestants = {name: lines for name, lines in runs.items() if lines[0]["seed"] is not None}
    references = {name: lines[0] for name, lines in runs.items() if lines[0]["seed"] is None}
    key = next(key for key in PLOTTED if any(key in line for lines in contestants.values() for line in lines))
    title, _, scale = COLUMNS[key]
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(contestants) + 1.4), layout="constrained")
    for row, lines in enumerate(contestants.values()):
        axes.scatter([scale * line[key] for line in lines], [row] * len(lines), s=36, color="tab:blue", alpha=0.7)
    for (name, line), style in zip(references.items(), ("-", ":"), strict=False):
        axes.axvline(scale * line[key], color="grey", linestyle=style, label=name)
    axes.set_yticks(range(len(contestants)), list(contestants))
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def marks(page: Path, name: str) -> tuple[str, str]:
    """The comments of a page that a table goes between; raises a ValueError where the page has none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no lines {begin} and {end} for the table to go between; add them.")
    return begin, end


def insert(page: Path, name: str, content: str) -> None:
    """Replace what stands between the `marks` of a page."""
    begin, end = marks(page, name)
    text = page.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{head}{begin}\n{content}\n{end}{tail}", encoding="utf-8")


def table_name(scores: Path) -> str:
    """What the marks of a comparison's table are called: the name of its folder."""
    return scores.parent.name


def write_page(scores: Path, page: Path) -> None:
    """Put the table and the plot of a comparison into a page, and the plot's file into `images` beside it."""
    runs, name = read(scores), table_name(scores)
    picture = page.parent / "images" / f"{name}.png"
    plot(runs, picture)
    insert(page, name, f"{table(runs)}\n\n![{name}](images/{picture.name})")
    print(f"{page}, {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.comparison_report", description=__doc__)
    parser.add_argument("scores", type=Path, help="what train.compare_mixers wrote; its folder's name names the table")
    parser.add_argument("--page", type=Path, required=True, help="where the table goes, between two comments")
    arguments = parser.parse_args()
    write_page(arguments.scores, arguments.page)


if __name__ == "__main__":
    run("train.comparison_report", main)
