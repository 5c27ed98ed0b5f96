"""The report of several runs: one page that is whole by itself, and says no more than the scores do."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from localdit.evaluation import report

GENERATION = {
    "pipeline": "LocalDiTPipeline",
    "seed": 0,
    "guidance_scale": 4.5,
    "num_inference_steps": 20,
    "scheduler": "DPMSolverMultistepScheduler",
    "dtype": "bfloat16",
    "device": "cpu",
}
COSTLY = GENERATION | {"seconds_per_image": 0.5, "peak_memory_bytes": 3 * 2**30}


class Page(HTMLParser):
    """What a browser would find: tags, attributes, the text of the cells and what of it is bold."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.warnings: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if ("class", "warning") in attrs:
            self.warnings.append("")
        if tag not in self.VOID:
            self.open.append(tag)
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "b" in self.open:
            self.bold.append(data)
        if self.warnings and "p" in self.open and not self.rows:
            self.warnings[-1] += data

    def row(self, heading: str) -> list[str]:
        [row] = [row for row in self.rows if row[0] == heading]
        return row


def score(metric="fid", value=10.0, interval=None, **changes) -> dict:
    """A line of scores.jsonl."""
    return {
        "metric": metric,
        "value": value,
        "interval": interval,
        "versions": {"localdit": "0.3.0", "torch": "2.9.0"},
        "extractor": {"name": "inception", "sha256": "0123456789abcdef", "dimension": 2048, "preprocessing": "299"},
        "real": {"source": "coco", "count": 5000},
        "generated": {"source": "images", "count": 1000, "formats": ["png"], "size": [24, 16]},
        "generation": GENERATION,
    } | changes


@pytest.fixture
def make_run(tmp_path):
    """Make the folder of a run from the lines of its scores and a number of pictures."""

    def make(name: str, *scores: dict, pictures: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
        for number in range(pictures):
            (folder / "images").mkdir(exist_ok=True)
            Image.new("RGB", (24, 16), (number, 0, 0)).save(folder / "images" / f"{number:03d}.png")
        return folder

    return make


@pytest.fixture
def make_page(tmp_path):
    """Report on runs; returns what the page says."""

    def make(*folders: Path) -> Page:
        report.main([*map(str, folders), "--output", str(tmp_path / "out"), "--overwrite"])
        return Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    return make


def test_the_page_is_whole_by_itself(make_run, make_page, tmp_path):
    page = make_page(
        make_run("a", score(interval=[9.0, 11.0], generation=COSTLY), pictures=2),
        make_run("b", score(value=8.0, generation=COSTLY), pictures=2),
    )
    assert not page.open
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "://" not in html and "url(" not in html and "@import" not in html
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert not [attribute for attribute in page.attributes if attribute[1] in ("href", "srcset", "style", "onload")]
    sources = [value for _, name, value in page.attributes if name == "src"]
    files = ["samples-a.png", "samples-b.png", "tradeoff-fid.png"]
    assert sources == [
        "data:image/png;base64," + base64.b64encode((tmp_path / "out" / file).read_bytes()).decode() for file in files
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "report.html"])
    for file in files:
        Image.open(tmp_path / "out" / file).verify()


def test_values_intervals_extractor_and_counts_stand_in_the_table(make_run, make_page):
    page = make_page(
        make_run(
            "a", score(value=12.345, interval=[11, 13.5]), score("odd", 5, extractor=None, real=None, generation=COSTLY)
        ),
        make_run("b", score(value=11.9), score("precision", 0.7, [0.65, 0.75])),
    )
    assert page.rows[0] == ["metric extractor, settings", "a", "b", "real pictures", "generated pictures"]
    assert page.row("fid ↓ inception 01234567") == [
        "fid ↓ inception 01234567", "12.35 11.00 to 13.50", "11.90", "5000", "1000",
    ]  # fmt: skip
    assert page.row("odd no extractor") == ["odd no extractor", "5.000", "–", "–", "1000"]
    assert page.row("precision ↑ inception 01234567")[1:3] == ["–", "0.7000 0.6500 to 0.7500"]
    assert page.row("a")[1:] == [
        "LocalDiTPipeline", "20", "4.5", "DPMSolverMultistepScheduler", "0", "bfloat16", "cpu", "0.5", "3",
    ]  # fmt: skip
    assert "Measured with localdit 0.3.0, torch 2.9.0." in page.text
    assert not page.warnings


def test_the_last_line_of_a_metric_and_extractor_wins(make_run, make_page):
    other = {"name": "clip", "sha256": "fedcba9876543210"}
    page = make_page(make_run("a", score(value=9.0), score(value=7.0, extractor=other), score(value=8.0)))
    assert page.row("fid ↓ inception 01234567")[1] == "8.000"
    assert page.row("fid ↓ clip fedcba98")[1] == "7.000"


@pytest.mark.parametrize(
    ("metric", "first", "second", "third", "bold"),
    [
        ("fid", (10, [9, 11]), (13, [12, 14]), (16, [15, 17]), ["10.00"]),
        ("fdd", (10, [9, 11]), (13, [12, 14]), (16, [15, 17]), ["10.00"]),
        ("recall", (10, [9, 11]), (13, [12, 14]), (16, [15, 17]), ["16.00"]),
        ("clip_score", (10, [9, 11]), (13, [12, 14]), (16, [15, 17]), ["16.00"]),
        ("fid", (10, [9, 11]), (10.5, [10, 12]), (16, [15, 17]), []),  # two overlap
        ("fid", (10, [9, 11]), (13, [11, 14]), (16, [15, 17]), []),  # two touch
        ("recall", (10, [9, 11]), (10.5, [10, 12]), (16, [15, 17]), ["16.00"]),  # two overlap, both below the best
        ("fid", (10, [9, 11]), (13, None), (16, [15, 17]), []),  # how sure one is, nobody knows
        ("fid", (10, [20, 21]), (13, [12, 14]), (16, [15, 17]), []),  # the best score has the worst interval
        ("odd", (10, [9, 11]), (13, [12, 14]), (16, [15, 17]), []),  # which way is better, nobody knows
    ],
)
def test_bold_is_what_is_best_beyond_the_intervals(make_run, make_page, metric, first, second, third, bold):
    runs = [make_run(f"run{index}", score(metric, *one)) for index, one in enumerate((first, second, third))]
    page = make_page(*runs)
    assert page.bold == bold
    assert "Bold: the best run of a row" in page.text


def test_a_run_alone_is_not_the_best(make_run, make_page):
    assert not make_page(make_run("a", score(value=10, interval=[9, 11]))).bold


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            {"extractor": {"name": "inception", "sha256": "ffffffff0"}},
            "hash of the extractor differs (01234567 for a; ffffffff for b)",
        ),
        ({"real": {"source": "coco", "count": 50}}, "number of real pictures differs (5000 for a; 50 for b)"),
        ({"real": {"source": "faces", "count": 5000}}, "source of the real pictures differs (coco for a; faces for b)"),
        ({"generated": {"source": "x", "count": 77}}, "number of generated pictures differs (1000 for a; 77 for b)"),
        ({"generation": GENERATION | {"guidance_scale": 2.0}}, "guidance scale differs (4.5 for a; 2 for b)"),
        ({"generation": GENERATION | {"num_inference_steps": 4}}, "number of steps differs (20 for a; 4 for b)"),
    ],
)
def test_scores_that_are_not_comparable_are_told_in_one_line(make_run, make_page, change, warning):
    page = make_page(
        make_run("a", score(interval=[9, 11]), score("kid"), score("recall")),
        make_run("b", score(value=20, interval=[19, 21], **change), score("kid", **change), score("recall")),
    )
    [line] = page.warnings
    rows = "fid (inception), kid (inception)"
    means = "which these scores compare, if that is what was meant"
    if "generation" not in change:
        means = "so these scores are not comparable as they stand"
    assert line == f"The {warning}, {means}: {rows}."
    # the way the pictures were made is what runs are compared for; the way they were measured is not
    assert page.bold == (["10.00"] if "generation" in change else [])


def test_both_values_stand_in_a_row_that_was_measured_in_two_ways(make_run, make_page):
    other = {"name": "inception", "sha256": "ffffffff0"}
    generated = {"source": "x", "count": 77}
    page = make_page(make_run("a", score()), make_run("b", score(extractor=other, generated=generated)))
    assert page.row("fid ↓ inception 01234567 / ffffffff")[3:] == ["5000", "1000 / 77"]


def test_names_are_shown_and_not_obeyed(make_run, make_page, tmp_path):
    extractor = {"name": "<script>alert(1)</script>", "sha256": "<i>&"}
    told = COSTLY | {"device": "<u>gpu</u>"}
    versions = {"<s>": "</s>"}
    page = make_page(
        make_run("<b>&amp;", score('m"<img>/..', extractor=extractor, generation=told, versions=versions), pictures=1),
        make_run("_$a$ 'b", score('m"<img>/..', extractor=extractor, real={"count": "<em>"}, generation=COSTLY)),
    )
    assert page.rows[0][1:3] == ["<b>&amp;", "_$a$ 'b"]
    assert page.row('m"<img>/.. <script>alert(1)</script> <i>&')[3] == "5000 / <em>"
    assert "<u>gpu</u>" in page.row("<b>&amp;") and "<b>&amp;: measured with <s> </s>." in page.text
    assert not page.tags & {"script", "b", "i", "em", "u", "s"}
    assert {value for tag, name, value in page.attributes if tag == "img" and name == "class"} == {"plot", "samples"}
    assert {path.parent for path in tmp_path.glob("**/*.png")} == {tmp_path / "out", tmp_path / "<b>&amp;" / "images"}


def test_the_commands_that_repeat_a_run_stand_at_the_end_each_once(make_run, make_page):
    drawn = GENERATION | {"command": "generate --model m"}
    page = make_page(
        make_run(
            "a", score(command="score <x>", generation=drawn), score("kid", command="score <x>", generation=drawn)
        ),
        make_run("b", score()),
    )
    assert page.text.split("To repeat it")[1].strip() == "agenerate --model m\nscore <x>"


def test_runs_of_one_name_are_told_apart_by_their_parents(make_run, make_page, tmp_path):
    page = make_page(
        make_run("one/eval", score(), pictures=1), make_run("two/eval", score(), pictures=1), make_run("c", score())
    )
    assert page.rows[0][1:4] == ["one/eval", "two/eval", "c"]
    assert len(list((tmp_path / "out").glob("samples-*.png"))) == 2


def test_the_samples_are_the_first_24_by_name_and_small(make_run, make_page, tmp_path):
    run = make_run("a", score(), pictures=30)
    Image.new("RGB", (600, 300), (0, 0, 255)).save(run / "images" / "005.png")
    assert "a: pictures by name, the first 24 of 30" in make_page(run).text
    grid = Image.open(tmp_path / "out" / "samples-a.png").convert("RGBA")
    assert grid.size == (6 * 132 - 4, 4 * 68 - 4)
    shown = [grid.getpixel((x * 132 + 8, y * 68 + 8)) for y in range(4) for x in range(6)]
    assert shown == [(0, 0, 255, 255) if number == 5 else (number, 0, 0, 255) for number in range(24)]


def test_a_few_samples_make_a_small_grid(make_run, make_page, tmp_path):
    make_page(make_run("a", score(), pictures=2))
    assert Image.open(tmp_path / "out" / "samples-a.png").size == (2 * 24 + 4, 16)


def test_samples_come_with_their_prompts(make_run, make_page):
    told, untold = make_run("a", score(), pictures=2), make_run("b", score(), pictures=2)
    for number, text in enumerate(["a <red> seven", "a blue three\n"]):
        (told / "images" / f"{number:03}.txt").write_text(text)
    page = make_page(told, untold)
    assert page.text.count("their prompts") == 1
    assert "a <red> sevena blue three" in page.text


def test_a_run_whose_pictures_are_gone_has_no_samples(make_run, make_page, tmp_path):
    (make_run("a", score()) / "images").mkdir()
    make_page(tmp_path / "a")
    assert not list((tmp_path / "out").glob("samples-*.png"))


def test_trade_offs_are_drawn_where_two_runs_tell_the_numbers(make_run, make_page, tmp_path):
    no_memory = GENERATION | {"seconds_per_image": 2}
    page = make_page(
        make_run("a", *(score(metric, generation=COSTLY) for metric in ("fid", "kid")), score("recall")),
        make_run("b", score(generation=no_memory), score("recall", generation=COSTLY)),
    )
    assert [path.name for path in (tmp_path / "out").glob("tradeoff-*")] == ["tradeoff-fid.png"]
    assert "fid against seconds per picture" in page.text and "GiB" not in page.text.split("Quality against cost")[1]


def test_what_a_score_does_not_tell_of_its_making_the_file_of_the_run_tells(make_run, make_page, tmp_path):
    runs = [make_run(name, score(generation=None)) for name in "ab"]
    for run in runs:
        (run / "generation.json").write_text(json.dumps(COSTLY))
    page = make_page(*runs)
    assert "fid against seconds per picture and against peak memory, GiB" in page.text
    assert "LocalDiTPipeline" in page.row("a")


def test_each_run_is_a_point_at_its_cost_and_score():
    from matplotlib.figure import Figure

    lines = [
        score(value=12.0, interval=[10.0, 11.0], generation=COSTLY),  # as a bootstrap of FID may be
        score(value=8.0, generation=COSTLY | {"peak_memory_bytes": 2**31}),
        score(value=9.0),
    ]
    runs = [
        report.Run(name, Path(name), {("fid", "inception"): line}, line["generation"])
        for name, line in zip(["_a", "b$x$", "c"], lines, strict=True)
    ]
    axes = Figure().add_subplot()
    points = report.draw_panel(axes, runs, "fid", "inception", "peak_memory_bytes")
    drawn = {name: point.get_xydata().tolist() for name, point in points.items()}
    assert drawn == {"_a": [[3, 12]], "b$x$": [[2, 8]]}
    assert [[3, 10], [3, 11]] in [line.get_xydata().tolist() for line in axes.lines]
    assert axes.get_xlim()[0] == 0


def test_a_long_name_fits_in_the_plot(make_run, make_page, tmp_path):
    generation = {"seconds_per_image": 1.0}
    make_page(make_run("m" * 100, score(generation=generation)), make_run("b", score(generation=generation)))
    picture = Image.open(tmp_path / "out" / "tradeoff-fid.png").convert("L")
    margins = [picture.crop((x, 0, x + 2, picture.height)) for x in (0, picture.width - 2)]
    assert all(margin.getextrema() == (255, 255) for margin in margins)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is no JSON"),
        ("\ufffd[", "is no JSON"),
        ("[1]", 'has no "metric"'),
        ('{"metric": "fid"}', 'has no "metric" that is a text and "value"'),
        ('{"metric": "fid", "value": "3"}', '"value" that is a finite number'),
        ('{"metric": "fid", "value": true}', '"value" that is a finite number'),
        ('{"metric": "fid", "value": NaN}', '"value" that is a finite number'),
        ('{"metric": "fid", "value": 3, "interval": [1]}', "neither null nor [low, high]"),
        ('{"metric": "fid", "value": 3, "interval": [4, 2]}', "neither null nor [low, high]"),
        ('{"metric": "fid", "value": 3, "interval": [null, 2]}', "neither null nor [low, high]"),
        ('{"metric": "fid", "value": 3, "extractor": "inception"}', "\"extractor\" 'inception', which is neither"),
        ('{"metric": "fid", "value": 3, "real": 0}', '"real" 0, which is neither'),
    ],
)
def test_a_damaged_line_is_named(make_run, make_page, line, problem):
    run = make_run("a", score())
    with (run / "scores.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError) as refusal:
        make_page(run)
    message = str(refusal.value)
    assert message.startswith(f"Line 3 of {run / 'scores.jsonl'} ") and problem in message and message.endswith(".")


def test_a_line_needs_only_a_metric_and_a_value(make_run, make_page):
    assert make_page(make_run("a", {"metric": "fid", "value": 3})).row("fid ↓ no extractor")[1] == "3.000"


def test_what_is_no_run_is_refused(make_run, make_page, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    unscored = make_run("unscored")
    run = make_run("a", score())
    damaged = make_run("damaged", score())
    (damaged / "generation.json").write_text("[1]")
    for folders, problem in [
        ([tmp_path / "missing"], "missing' is no folder"),
        ([empty], "empty' has no scores.jsonl"),
        ([unscored], "holds no score"),
        ([run, run / ".." / "a"], "is given twice"),
        ([damaged], "generation.json is damaged (it is no JSON object)"),
    ]:
        with pytest.raises(ValueError) as refusal:
            make_page(*folders)
        assert problem in str(refusal.value) and str(refusal.value).endswith(".")
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_is_named(make_run, make_page):
    run = make_run("a", score(), pictures=2)
    (run / "images" / "001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"001\.png' cannot be read as a picture"):
        make_page(run)


@pytest.mark.parametrize("file", ["report.html", "samples-a.png"])
def test_nothing_is_overwritten_silently(make_run, tmp_path, file):
    output = tmp_path / "out"
    output.mkdir()
    (output / file).write_text("mine")
    arguments = [str(make_run("a", score(), pictures=1)), "--output", str(output)]
    with pytest.raises(ValueError, match=f"has '{file}' already; give another, or add --overwrite."):
        report.main(arguments)
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [(file, "mine")]
    report.main([*arguments, "--overwrite"])
    assert (output / file).read_bytes() != b"mine"


def test_an_output_that_is_a_file_is_refused(make_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = str(make_run("a", score()))
    for output in ("file", "file/in/it"):
        with pytest.raises(ValueError, match="is, or lies in, what is no folder to write to"):
            report.main([run, "--output", str(tmp_path / output)])


def test_the_command_line_says_where_the_page_is(make_run, tmp_path, capsys):
    report.main([str(make_run("a", score())), "--output", str(tmp_path / "new" / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'out' / 'report.html'}\n"
    with pytest.raises(ValueError, match="--output"):
        report.main([str(tmp_path / "a")])
