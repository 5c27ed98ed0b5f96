"""Benchmark prompts: what the scorers of GenEval, DPG-Bench and T2I-CompBench find, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localdit.evaluation.prompt_sets import Entry, export, missing, read_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def flat(count: int = 4, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[number % 4]) for number in range(count)]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def geneval(tmp_path) -> list[Entry]:
    return read_prompts(write_lines(tmp_path / "evaluation_metadata.jsonl", GENEVAL), "geneval")


@pytest.fixture
def dpg(tmp_path) -> list[Entry]:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "partiprompts3.txt").write_text("a cat, in great detail\n")
    (prompts / "12.txt").write_text("a metal ladder")
    return read_prompts(prompts, "dpg-bench")


@pytest.fixture
def compbench(tmp_path) -> list[Entry]:
    return read_prompts(
        write_lines(tmp_path / "color_val.txt", ["a red cup", "A clock reads 11:44.\tx"]), "t2i-compbench"
    )


def test_geneval_finds_the_line_of_each_prompt_and_its_samples(geneval, tmp_path):
    assert [entry.prompt for entry in geneval] == ["a photo of a bench", "a photo of two cups"]
    export(geneval, [flat(2), flat(2)], tmp_path / "out", "geneval")
    found = {}  # as its evaluate_images.py looks: folders of digits, files that begin with digits and .png
    for folder in filter(lambda path: path.is_dir() and path.name.isdigit(), (tmp_path / "out").iterdir()):
        names = [path.name for path in (folder / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
        found[folder.name] = json.loads((folder / "metadata.jsonl").read_text()), sorted(names)
    samples = ["00000.png", "00001.png"]
    assert found == {"00000": (GENEVAL[0], samples), "00001": (GENEVAL[1], samples)}
    assert len(files(tmp_path / "out")) == 6  # no draft is left


def test_dpg_bench_cuts_the_four_pictures_out_of_each_grid(dpg, tmp_path):
    assert [(entry.identifier, entry.prompt) for entry in dpg] == [
        ("12", "a metal ladder"),
        ("partiprompts3", "a cat, in great detail"),
    ]
    export(dpg, (flat() for _ in dpg), tmp_path / "out", "dpg-bench")
    assert files(tmp_path / "out") == {"12.png", "partiprompts3.png"}
    grid = Image.open(tmp_path / "out" / "12.png")
    assert grid.size == (16, 16)
    corners = [(0, 0), (8, 0), (0, 8), (8, 8)]  # left, top: the order of compute_dpg_bench.py
    for (left, top), colour in zip(corners, COLOURS, strict=True):
        assert (np.asarray(grid.crop((left, top, left + 8, top + 8))) == colour).all()


def test_t2i_compbench_reads_prompt_and_order_from_the_names(compbench, tmp_path):
    export(compbench, [flat(3), flat(3)], tmp_path, "t2i-compbench")
    names = [path.name for path in (tmp_path / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # as its scorers do
    assert [name.split("_")[0] for name in names] == 3 * ["a red cup"] + 3 * ["A clock reads 11:44."]
    assert names[0] == "a red cup_000000.png" and names[-1] == "A clock reads 11:44._000005.png"


def test_plain_prompts_go_beside_their_pictures(tmp_path):
    plain = read_prompts(write_lines(tmp_path / "a.txt", ["a cat", "a dog"]), "lines")
    assert plain == [Entry(0, "a cat"), Entry(1, "a dog")]
    told = read_prompts(write_lines(tmp_path / "a.jsonl", [{"prompt": "a cat"}, {"prompt": "ein Hündchen"}]), "lines")
    assert [entry.prompt for entry in told] == ["a cat", "ein Hündchen"]
    export(told, [flat(2), flat(2)], tmp_path / "out", "lines")
    assert files(tmp_path / "out") == {f"0000{p}-{n}.{end}" for p in (0, 1) for n in (0, 1) for end in ("png", "txt")}
    assert (tmp_path / "out" / "00001-0.txt").read_text(encoding="utf-8") == "ein Hündchen"


@pytest.mark.parametrize("layout", ["lines", "geneval", "dpg-bench", "t2i-compbench"])
def test_what_a_kill_left_undone_is_missing_and_takes_its_own_place(layout, tmp_path):
    entries = [Entry(index, f"prompt {index}", f"id{index}", {"tag": "", "include": []}) for index in range(3)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert missing(entries, whole, layout, 4) == entries
    export(entries, (flat() for _ in entries), whole, layout)
    assert missing(entries, whole, layout, 4) == []

    def killed():
        yield flat()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(entries, killed(), resumed, layout)
    (resumed / ".1.draft").write_bytes(b"half a picture")
    left = missing(entries, resumed, layout, 4)
    assert left == entries[1:]
    export(left, (flat() for _ in left), resumed, layout)
    assert files(resumed) == files(whole) | {".1.draft"}
    for name in files(whole):
        (resumed / name).unlink()
        broken = missing(entries, resumed, layout, 4)
        assert len(broken) == 1, f"{name} is gone"
        export(broken, [flat()], resumed, layout)


def test_a_picture_appears_under_its_name_when_it_is_whole(tmp_path, monkeypatch):
    def fails_half_way(self, path, **options):
        Path(path).write_bytes(b"half a picture")
        raise OSError("No space left on device")

    entries = [Entry(0, "a cat")]
    monkeypatch.setattr(Image.Image, "save", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        export(entries, [flat(1)], tmp_path, "t2i-compbench")
    assert missing(entries, tmp_path, "t2i-compbench", 1) == entries
    assert not list((tmp_path / "samples").iterdir())  # whose every file T2I-CompBench takes for a picture


@pytest.mark.parametrize(
    ("name", "content", "layout", "message"),
    [
        ("a.txt", "a cat\n\na dog\n", "lines", "Line 2 of '.*a.txt' is empty"),
        ("a.txt", "", "lines", "a.txt' holds no prompt; write one a line"),
        ("a.txt", "a cat\n \t \n", "t2i-compbench", "Line 2 of"),
        ("a.txt", "a cat\n\tseen\n", "t2i-compbench", "Prompt 1 .* is empty"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "lines", "Line 2 of '.*a.jsonl' is no JSON"),
        (
            "a.jsonl",
            '{"prompt": "a cat", "tag": "x", "include": []}\n[]\n',
            "geneval",
            'Line 2 .* no text under "prompt"',
        ),
        ("a.jsonl", '{"prompt": " "}\n', "lines", 'Line 1 .* no text under "prompt"'),
        ("a.jsonl", '{"prompt": 7}\n', "lines", 'Line 1 .* no text under "prompt"'),
        ("a.jsonl", '{"prompt": "a cat"}\n', "geneval", "no 'include' and no 'tag', which GenEval"),
        ("a.txt", "a cat\n", "dpg-bench", "no folder of .txt files"),
        ("a.txt", "a cat\n", "gen-eval", "layout='gen-eval' is not known; choose among lines, geneval"),
        ("a.txt", "a cat/dog\n", "t2i-compbench", "Prompt 0 .* a slash, an underscore"),
        ("a.txt", "a cat\na cat_dog\n", "t2i-compbench", "Prompt 1 .* a slash, an underscore"),
        ("a.txt", "x" * 245 + "\n", "t2i-compbench", "file name of 256 bytes, .* shorten it by 1"),
    ],
)
def test_prompts_that_cannot_be_drawn_or_scored_are_refused(tmp_path, name, content, layout, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_prompts(tmp_path / name, layout)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_the_longest_name_that_a_disk_takes_is_written(tmp_path):
    entries = read_prompts(write_lines(tmp_path / "a.txt", ["x" * 244]), "t2i-compbench")
    export(entries, [flat(1)], tmp_path / "out", "t2i-compbench")
    assert missing(entries, tmp_path / "out", "t2i-compbench", 1) == []


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9\n")
    with pytest.raises(ValueError, match="no UTF-8 at byte 5"):
        read_prompts(tmp_path / "a.txt", "lines")
    with pytest.raises(ValueError, match="No such file"):
        read_prompts(tmp_path / "b.txt", "lines")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert [entry.prompt for entry in read_prompts(tmp_path / "c.txt", "lines")] == ["a cat", "a dog"]


def test_dpg_bench_wants_ids_that_its_scorer_finds_again(tmp_path):
    (tmp_path / "a.b.txt").write_text("a cat")
    with pytest.raises(ValueError, match="id 'a.b', .* at the first dot"):
        read_prompts(tmp_path, "dpg-bench")
    (tmp_path / "a.b.txt").rename(tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match="c.txt in .* is empty"):
        read_prompts(tmp_path, "dpg-bench")
    with pytest.raises(ValueError, match="has no id"):
        export([Entry(0, "a cat")], [flat()], tmp_path, "dpg-bench")


def test_dpg_bench_wants_four_squares_of_one_size_in_the_whole_folder(dpg, tmp_path):
    out = tmp_path / "out"
    for count in (3, 5):
        with pytest.raises(ValueError, match=f"per_prompt={count} .* draw 4 of each"):
            export(dpg[:1], [flat(count)], out, "dpg-bench")
        with pytest.raises(ValueError, match=f"per_prompt={count} .* draw 4 of each"):
            missing(dpg, out, "dpg-bench", count)
    with pytest.raises(ValueError, match="8 x 8 and 16 x 16 pixels make no grid"):
        export(dpg[:1], [[*flat(3), *flat(1, (16, 16))]], out, "dpg-bench")
    with pytest.raises(ValueError, match="16 x 8 pixels make no grid"):
        export(dpg[:1], [flat(4, (16, 8))], out, "dpg-bench")
    assert not out.exists()
    export(dpg[:1], [flat()], out, "dpg-bench")
    with pytest.raises(ValueError, match="16 pixels a side do not go with '.*12.png', whose have 8"):
        export(dpg[1:], [flat(4, (16, 16))], out, "dpg-bench")


def test_two_prompts_of_one_file_name_are_refused_and_one_prompt_twice_is_not(tmp_path):
    with pytest.raises(ValueError, match="Prompt 0 .* the same place 0"):
        export([Entry(0, "a cat"), Entry(0, "a cat")], [flat(1), flat(1)], tmp_path / "a", "t2i-compbench")
    with pytest.raises(ValueError, match="the same place 'x.png'"):
        missing([Entry(0, "a cat", "x"), Entry(1, "a dog", "x")], tmp_path / "b", "dpg-bench", 4)
    # older lists of T2I-CompBench hold prompts twice
    twice = read_prompts(write_lines(tmp_path / "color_val.txt", ["a cat", "a cat"]), "t2i-compbench")
    export(twice, [flat(1), flat(1)], tmp_path / "c", "t2i-compbench")
    assert files(tmp_path / "c") == {"samples/a cat_000000.png", "samples/a cat_000001.png"}


def test_t2i_compbench_is_not_given_files_of_another_run(compbench, tmp_path):
    export(compbench, [flat(2), flat(2)], tmp_path, "t2i-compbench")
    with pytest.raises(ValueError, match="'samples/A clock reads 11:44._000002.png', which is none of these"):
        missing(compbench, tmp_path, "t2i-compbench", 3)


def test_each_prompt_gets_equally_many_pictures_and_at_least_one(geneval, tmp_path):
    with pytest.raises(ValueError, match="per_prompt=0 is too few"):
        export(geneval, [[], []], tmp_path, "geneval")
    with pytest.raises(ValueError, match="pictures of Prompt 1 .* are 3, of others 2"):
        export(geneval, [flat(2), flat(3)], tmp_path, "geneval")
    with pytest.raises(ValueError, match="shorter"):
        export(geneval, [flat(2)], tmp_path, "geneval")
