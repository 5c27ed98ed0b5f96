"""One page that sets runs side by side: python -m localdit.evaluation report RUN [RUN ...] --output FOLDER."""

import base64
import io
import itertools
import math
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from localdit.command_line import Parser
from localdit.evaluation.files import check_writable
from localdit.evaluation.images import list_images, read_rgb
from localdit.evaluation.prompt_sets import read_text
from localdit.evaluation.records import FILE as SCORES
from localdit.evaluation.runs import (
    IMAGES,
    MADE,
    MEASURED,
    ONE_IS_BEST,
    Run,
    Score,
    all_rows,
    best,
    differs,
    direction,
    is_number,
    read_runs,
    scores_of,
    told,
)

PAGE = "report.html"
UNKNOWN = "–"

SAMPLES = 24
SAMPLE_COLUMNS = 6
SAMPLE_PIXELS = 128
SAMPLE_GAP = 4

ARROWS = {-1: " ↓", 0: "", 1: " ↑"}
TO_ONE = " → 1"

# Columns of the table of runs, by the key of "generation".
SETTINGS = {
    "pipeline": "pipeline",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "scheduler": "scheduler",
    "seed": "seed",
    "dtype": "dtype",
    "device": "device",
    "seconds_per_image": "seconds per picture",
    "peak_memory_bytes": "peak memory, GiB",
}
# What quality is traded for: the key of "generation", and what it is multiplied by.
COSTS = {"seconds_per_image": 1.0, "peak_memory_bytes": 2.0**-30}
MARKERS = "osD^vPX"

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: left; }
th, td { vertical-align: top; overflow-wrap: break-word; min-width: 3rem; max-width: 16rem; }
th[scope=row] { position: sticky; left: 0; max-width: 11rem; background: Canvas; }
small { font-weight: normal; opacity: .75; }
td small { white-space: nowrap; }
.warning { border-left: .3rem solid #c60; padding-left: .7rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .85rem; }
.row { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.plot { background: white; border-radius: .3rem; }
"""
LEGEND = (
    "↓: lower is better; ↑: higher is better; → 1: best near 1; the small numbers are the interval of the score. Bold: "
    "the best run of a row, where the intervals of all others lie clear of its own. Nothing is bold where an interval "
    "is missing, where it is not known which direction is better, or where the runs were not measured alike."
)
NOT_ALIKE = "so these scores are not comparable as they stand"
ON_PURPOSE = "which these scores compare, if that is what was meant"
TRADE_OFF = (
    "Bars are the intervals of the scores. Times and memory compare runs only on the same device and in the same dtype."
)


def shown(value: Any, key: str = "") -> str:
    """A value as the page prints it: numbers short, of a hash the first eight digits."""
    if key in COSTS and is_number(value):
        value = COSTS[key] * value
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:8] if key == "sha256" else str(value)


def titled(metric: str) -> str:
    """The name of a metric with the way to go."""
    return metric + (TO_ONE if metric in ONE_IS_BEST else ARROWS[direction(metric)])


def digits(value: float) -> str:
    """A score with four digits, of which zeros at the end count."""
    return f"{value:#.4g}".rstrip(".")


def warnings(runs: list[Run]) -> list[str]:
    """One line for each thing in which runs differ that share a row, with the rows that it spoils."""
    rows_of: dict[str, list[str]] = {}
    for metric, extractor in all_rows(runs):
        for name, (part, key) in (MEASURED | MADE).items():
            values = told(scores_of(runs, (metric, extractor)), part, key)
            if differs(values):
                names: dict[str, list[str]] = {}
                for run, value in values.items():
                    names.setdefault(shown(value, key), []).append(run)
                listed = "; ".join(f"{value} for {', '.join(which)}" for value, which in names.items())
                title = f"{metric} ({extractor})" if extractor else metric
                means = NOT_ALIKE if name in MEASURED else ON_PURPOSE
                rows_of.setdefault(f"The {name} differs ({listed}), {means}", []).append(title)
    return [f"{what}: {', '.join(rows)}." for what, rows in rows_of.items()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    for first, *others in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def score_cell(score: Score | None, bold: bool) -> str:
    """A score over its interval, as HTML."""
    if score is None:
        return UNKNOWN
    value = f"<b>{digits(score['value'])}</b>" if bold else digits(score["value"])
    return f"{value}<br><small>{' to '.join(map(digits, score['interval']))}</small>" if score["interval"] else value


def score_table(runs: list[Run]) -> str:
    """A row for each metric and extractor, a column for each run."""
    rows = []
    for metric, extractor in all_rows(runs):
        scores = scores_of(runs, (metric, extractor))
        distinct = [
            " / ".join(dict.fromkeys(shown(value, key) for value in told(scores, part, key).values()))
            for part, key in (("extractor", "sha256"), ("real", "count"), ("generated", "count"))
        ]
        extracted = f"{extractor} {distinct[0]}".strip() or "no extractor"
        heading = f"{escape(titled(metric))}<br><small>{escape(extracted)}</small>"
        winner = best(scores, metric)
        cells = [score_cell(scores.get(run.name), run.name == winner) for run in runs]
        rows.append([heading, *cells, *(escape(counts) or UNKNOWN for counts in distinct[1:])])
    names = [escape(run.name) for run in runs]
    return table(["metric<br><small>extractor, settings</small>", *names, "real pictures", "generated pictures"], rows)


def run_table(runs: list[Run]) -> str:
    """A row for each run: how its pictures were made; and below it the versions that measured them last."""
    keys = [key for key in SETTINGS if any(run.generation.get(key) is not None for run in runs)]
    rows, measured = [], {}
    for run in runs:
        settings = [run.generation.get(key) for key in keys]
        cells = [UNKNOWN if value is None else shown(value, key) for key, value in zip(keys, settings, strict=True)]
        rows.append([escape(cell) for cell in (run.name, *cells)])
        versions = list(run.scores.values())[-1]["versions"]
        told = ", ".join(f"{package} {version}" for package, version in versions.items()) or "unknown versions"
        measured.setdefault(told, []).append(run.name)
    lines = [f"{', '.join(names)}: measured with {told}." for told, names in measured.items()]
    if len(lines) == 1:
        lines = [f"Measured with {next(iter(measured))}."]
    return table(["run", *(SETTINGS[key] for key in keys)], rows) + "".join(f"<p>{escape(line)}</p>" for line in lines)


def command_lists(runs: list[Run]) -> list[str]:
    """What to type for the pictures and the scores of each run again, as HTML."""
    lists = []
    for run in runs:
        told = (run.generation.get("command"), *(score.get("command") for score in run.scores.values()))
        if commands := dict.fromkeys(str(command) for command in told if command):
            lines = "\n".join(commands)
            lists.append(f"<h3>{escape(run.name)}</h3><pre>{escape(lines)}</pre>")
    return lists


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def sample_grid(paths: list[Path]) -> Image.Image:
    """Pictures in reading order, none above 128 pixels, on no background."""
    thumbnails = [read_rgb(path) for path in paths]
    for thumbnail in thumbnails:
        thumbnail.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    width, height = (max(sizes) + SAMPLE_GAP for sizes in zip(*(image.size for image in thumbnails), strict=True))
    columns = min(SAMPLE_COLUMNS, len(thumbnails))
    rows = math.ceil(len(thumbnails) / columns)
    grid = Image.new("RGBA", (columns * width - SAMPLE_GAP, rows * height - SAMPLE_GAP))
    for index, thumbnail in enumerate(thumbnails):
        grid.paste(thumbnail, (index % columns * width, index // columns * height))
    return grid


def trade_offs(runs: list[Run], metric: str) -> list[tuple[str, str]]:
    """The panels of a metric's plot, extractor and cost: those for which two runs or more tell both."""
    panels = []
    for (_, extractor), key in itertools.product((row for row in all_rows(runs) if row[0] == metric), COSTS):
        costs = told(scores_of(runs, (metric, extractor)), "generation", key)
        if sum(map(is_number, costs.values())) > 1:
            panels.append((extractor, key))
    return panels


def draw_panel(axes: Any, runs: list[Run], metric: str, extractor: str, key: str) -> dict[str, Any]:
    """A point for each run, with its interval as a bar; returns the points by the name of the run."""
    points = {}
    for run in runs:
        score = run.scores.get((metric, extractor))
        if score is None or not is_number(score["generation"].get(key)):
            continue
        number = runs.index(run)
        color = f"C{number % 10}"
        cost = score["generation"][key] * COSTS[key]
        if score["interval"]:  # not by errorbar, which refuses an interval that does not hold the score
            axes.plot([cost, cost], score["interval"], color=color, marker="_", markersize=10, alpha=0.6)
        points[run.name] = axes.plot(
            cost, score["value"], color=color, marker=MARKERS[number % len(MARKERS)], markersize=8, linestyle=""
        )[0]
    axes.margins(0.1)
    axes.set_xlim(0, 1.1 * max(point.get_xdata()[0] for point in points.values()) or 1)
    axes.set_xlabel(SETTINGS[key])
    axes.set_ylabel(titled(metric), parse_math=False)
    axes.set_title(extractor if len(extractor) < 40 else f"…{extractor[-39:]}", fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    return points


def draw_trade_offs(runs: list[Run], metric: str, panels: list[tuple[str, str]]) -> bytes:
    """The score of each run over what a picture of it costs, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The trade-off plots need the package matplotlib; pip install matplotlib.") from error

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows + 0.25 * len(runs) + 0.2), layout="constrained")
    points: dict[str, Any] = {}
    for index, (extractor, key) in enumerate(panels, start=1):
        points |= draw_panel(figure.add_subplot(rows, columns, index), runs, metric, extractor, key)
    legend = figure.legend(list(points.values()), list(map(str, range(len(points)))), loc="outside lower center")
    for text, name in zip(legend.get_texts(), points, strict=True):
        text.set(text=name, parse_math=False)  # as a label, a name that begins with _ would be left out
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight")  # as wide as the longest name
    return buffer.getvalue()


def pictures_of(run: Run) -> list[Path]:
    """The pictures of a run, if it kept any."""
    folder = run.folder / IMAGES
    return list_images(folder) if folder.is_dir() and any(folder.iterdir()) else []


def prompt_list(paths: list[Path]) -> str:
    """The texts beside pictures, as HTML that unfolds; nothing where there are none."""
    texts = [path.with_suffix(".txt") for path in paths]
    if not all(text.is_file() for text in texts):
        return ""
    items = "".join(f"<li>{escape(read_text(text).strip())}</li>" for text in texts)
    return f"<details><summary>their prompts</summary><ol>{items}</ol></details>"


def figure(picture: bytes, caption: str, kind: str, more: str = "") -> str:
    """A PNG as HTML that needs no file, with more HTML below it."""
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><img class="{kind}" src="{source}" '
        f'alt="{escape(caption)}">{more}</figure>'
    )


def report(runs: list[Run]) -> dict[str, bytes]:
    """The page and its pictures, by the name of the file."""
    files: dict[str, bytes] = {}
    samples, plots = [], []
    for run in runs:
        if paths := pictures_of(run):
            name = f"samples-{quote(run.name, safe='')}.png"
            files[name] = png(sample_grid(paths[:SAMPLES]))
            caption = f"{run.name}: pictures by name, the first {min(SAMPLES, len(paths))} of {len(paths)}"
            samples.append(figure(files[name], caption, "samples", prompt_list(paths[:SAMPLES])))
    for metric in dict.fromkeys(metric for metric, _ in all_rows(runs)):
        if panels := trade_offs(runs, metric):
            name = f"tradeoff-{quote(metric, safe='')}.png"
            files[name] = draw_trade_offs(runs, metric, panels)
            costs = dict.fromkeys(SETTINGS[key] for _, key in panels)
            plots.append(figure(files[name], f"{metric} against {' and against '.join(costs)}", "plot"))
    return {PAGE: page(runs, plots, samples).encode("utf-8"), **files}


def page(runs: list[Run], plots: list[str], samples: list[str]) -> str:
    """The report as HTML that is whole without any other file or address."""
    title = f"Scores of {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"
    sections = [f"<h1>{escape(title)}</h1>"]
    sections += [f'<p class="warning">{escape(warning)}</p>' for warning in warnings(runs)]
    sections += [score_table(runs), f"<p>{LEGEND}</p>"]
    sections += ["<h2>Samples</h2>", '<div class="row">', *samples, "</div>"] if samples else []
    sections += ["<h2>Runs</h2>", run_table(runs)]
    sections += ["<h2>Quality against cost</h2>", f"<p>{TRADE_OFF}</p>", *plots] if plots else []
    commands = command_lists(runs)
    sections += ["<h2>To repeat it</h2>", *commands] if commands else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def write(files: dict[str, bytes], folder: Path, overwrite: bool) -> None:
    """Write files into a folder, which is made; raises a ValueError where one is there that is not to be replaced."""
    check_writable("--output", folder)
    existing = [name for name in files if (folder / name).exists()]
    if existing and not overwrite:
        raise ValueError(f"--output {str(folder)!r} has {existing[0]!r} already; give another, or add --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"a folder with {SCORES}, perhaps {IMAGES}/")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=f"where {PAGE} and PNGs go")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    options = parser.parse_args(arguments)
    write(report(read_runs(options.runs)), options.output, options.overwrite)
    print(options.output / PAGE)
