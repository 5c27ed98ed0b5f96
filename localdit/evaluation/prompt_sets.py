"""Benchmarks' prompts, and the folders of pictures that their own scorers read."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image

from localdit.command_line import shortened
from localdit.evaluation.files import write_whole
from localdit.evaluation.images import read_rgb

LONGEST_NAME = 255  # bytes of a file name, on Linux


@dataclass(frozen=True)
class Entry:
    """One prompt of a set.

    Args:
        index: its place in the set, from 0. File names tell it, so prompts that are left over keep theirs.
        prompt: what to draw.
        identifier: DPG-Bench's name of the prompt.
        metadata: the JSON line that it came on, which GenEval scores by.
    """

    index: int
    prompt: str
    identifier: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"Prompt {self.index} ({shortened(self.prompt, 60)!r})"


class Layout:
    """How prompts are read and where their pictures go; a benchmark's own differs from this.

    Here prompts are the lines of a .txt, or come as "prompt" in those of a .jsonl, and pictures are
    <place>-<number>.png with the prompt beside them in a .txt, as folders of training pictures have it.
    """

    pictures_needed: int | None = None  # for each prompt; None for any number

    def read(self, path: Path) -> list[Entry]:
        if path.suffix == ".jsonl":
            return read_json_lines(path)
        return [Entry(index, line.strip()) for index, line in enumerate(read_lines(path))]

    def check(self, entry: Entry) -> None:
        """Raise a ValueError for a prompt that this layout cannot hold."""

    def check_folder(self, folder: Path, entries: Sequence[Entry], per_prompt: int) -> None:
        """Raise a ValueError for a folder whose other files would spoil the score."""

    def pictures(self, entry: Entry, per_prompt: int) -> list[str]:
        """The files of a prompt's pictures, in the folder."""
        return [f"{entry.index:05}-{number}.png" for number in range(per_prompt)]

    def texts(self, entry: Entry, per_prompt: int) -> dict[str, str]:
        """What else goes with a prompt's pictures: file and content."""
        return {str(Path(name).with_suffix(".txt")): entry.prompt for name in self.pictures(entry, per_prompt)}

    def compose(self, images: list[Image.Image], folder: Path) -> list[Image.Image]:
        """The pictures to write, of those that were drawn."""
        return images


class GenEval(Layout):
    """GenEval (Ghosh et al. 2023, arXiv 2310.11513), as its prompts/evaluation_metadata.jsonl has it.

    <place>/metadata.jsonl holds the prompt's line and <place>/samples/<number>.png its pictures, usually four, both in
    five digits. The layout is that of generation/diffusers_generate.py in github.com/djghosh13/geneval, whose
    evaluation/evaluate_images.py takes all files of digits and .png.
    """

    def read(self, path: Path) -> list[Entry]:
        return read_json_lines(path)

    def check(self, entry: Entry) -> None:
        if absent := sorted({"tag", "include"} - entry.metadata.keys()):
            raise ValueError(
                f"{entry} has no {' and no '.join(map(repr, absent))}, which GenEval scores by; give prompts of its "
                "evaluation_metadata.jsonl."
            )

    def pictures(self, entry: Entry, per_prompt: int) -> list[str]:
        return [f"{entry.index:05}/samples/{number:05}.png" for number in range(per_prompt)]

    def texts(self, entry: Entry, per_prompt: int) -> dict[str, str]:
        return {f"{entry.index:05}/metadata.jsonl": json.dumps(entry.metadata) + "\n"}


class DPGBench(Layout):
    """DPG-Bench (Hu et al. 2024, arXiv 2403.05135), whose prompts are a folder of <id>.txt.

    <id>.png is a 2x2 grid of four pictures. The layout is that of dpg_bench/ in github.com/TencentQQGYLab/ELLA, whose
    compute_dpg_bench.py cuts each grid into squares of the one side that its command line gives (dist_eval.sh FOLDER
    SIDE), and takes what stands before a file's first dot for the id. It tries every file in the folder, and passes
    over those whose id it does not know.
    """

    pictures_needed = 4

    def read(self, path: Path) -> list[Entry]:
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ValueError(f"{str(path)!r} is no folder of .txt files; give DPG-Bench's dpg_bench/prompts.")
        entries = [Entry(index, read_text(file).strip(), file.stem) for index, file in enumerate(files)]
        if empty := [file.name for file, entry in zip(files, entries, strict=True) if not entry.prompt]:
            raise ValueError(f"{empty[0]} in {str(path)!r} is empty; take it away, or write a prompt.")
        return entries

    def check(self, entry: Entry) -> None:
        if not entry.identifier:
            raise ValueError(f"{entry} has no id, which DPG-Bench scores by; give prompts of its folder of <id>.txt.")
        if set(entry.identifier) & set("./"):
            raise ValueError(
                f"{entry} has the id {entry.identifier!r}, and DPG-Bench's scorer cuts file names at the first dot; "
                "give it an id without dots and slashes."
            )

    def pictures(self, entry: Entry, per_prompt: int) -> list[str]:
        return [f"{entry.identifier}.png"]

    def texts(self, entry: Entry, per_prompt: int) -> dict[str, str]:
        return {}

    def compose(self, images: list[Image.Image], folder: Path) -> list[Image.Image]:
        sizes = sorted({image.size for image in images})
        width, height = sizes[0]
        if len(sizes) > 1 or width != height:
            found = " and ".join(f"{width} x {height}" for width, height in sizes)
            raise ValueError(f"Pictures of {found} pixels make no grid for DPG-Bench; draw squares of one size.")
        grid = make_image_grid([image.convert("RGB") for image in images], rows=2, cols=2)
        # all grids are cut alike, and pictures of another size can be left from another run
        neighbour = next(folder.glob("*.png"), None)
        if neighbour is not None and (side := read_rgb(neighbour).width) != grid.width:
            raise ValueError(
                f"Pictures of {width} pixels a side do not go with {str(neighbour)!r}, whose have {side // 2}; "
                "draw all in one size, or choose another folder."
            )
        return [grid]


class T2ICompBench(Layout):
    """T2I-CompBench (Huang et al. 2023, arXiv 2307.06350), a .txt for each category, as in its examples/dataset.

    samples/<prompt>_<number>.png, with a number of six digits that counts on over the whole category, so a folder holds
    one category, and twice the same prompt is no trouble. The layout is that of GORS_finetune/inference_eval.py in
    github.com/Karine-Huang/T2I-CompBench. What follows a tab in a prompt file is left away, as there. The scorers know
    a prompt by the name of the file alone, up to the first underscore, and fail on files in samples/ that have no
    number, so prompts with a slash, an underscore or an overlong name cannot be scored. No prompt of the lists for
    validation that were looked at (color, shape, texture, complex, non_spatial) is like that. The 3-in-1 score of
    "complex" wants ten pictures for each prompt.
    """

    def read(self, path: Path) -> list[Entry]:
        return [Entry(index, line.split("\t")[0].strip()) for index, line in enumerate(read_lines(path))]

    def check(self, entry: Entry) -> None:
        if "/" in entry.prompt or "_" in entry.prompt or not entry.prompt.isprintable():
            raise ValueError(
                f"{entry} has a slash, an underscore or a control character, and T2I-CompBench's scorers read the "
                "prompt from the file's name up to its first underscore; write it without."
            )
        if (length := len(self.name(entry.prompt, 0).encode())) > LONGEST_NAME:
            raise ValueError(
                f"{entry} makes a file name of {length} bytes, and T2I-CompBench's scorers read the prompt from there; "
                f"shorten it by {length - LONGEST_NAME}."
            )

    def check_folder(self, folder: Path, entries: Sequence[Entry], per_prompt: int) -> None:
        expected = {name for entry in entries for name in self.pictures(entry, per_prompt)}
        found = {f"samples/{path.name}" for path in (folder / "samples").glob("*")}
        if strangers := sorted(found - expected):
            raise ValueError(
                f"{str(folder)!r} holds {strangers[0]!r}, which is none of these prompts' ({len(entries)}, at "
                f"per_prompt={per_prompt}), and T2I-CompBench's scorers take every file there; choose another folder."
            )

    def name(self, prompt: str, number: int) -> str:
        return f"{prompt}_{number:06}.png"

    def pictures(self, entry: Entry, per_prompt: int) -> list[str]:
        first = entry.index * per_prompt
        return [f"samples/{self.name(entry.prompt, number)}" for number in range(first, first + per_prompt)]

    def texts(self, entry: Entry, per_prompt: int) -> dict[str, str]:
        return {}


LAYOUTS: dict[str, Layout] = {
    "lines": Layout(),
    "geneval": GenEval(),
    "dpg-bench": DPGBench(),
    "t2i-compbench": T2ICompBench(),
}


def read_prompts(path: str | Path, layout: str) -> list[Entry]:
    """The prompts of a benchmark's own file, or DPG-Bench's folder, in its order.

    Args:
        layout: among `LAYOUTS`, whose classes say which file that is.

    Raises:
        ValueError: where it cannot be read, holds no prompt or an empty one, or one that the scorer could not take; of
            a damaged line the message gives the number.
    """
    chosen = find_layout(layout)
    entries = chosen.read(Path(path))
    check_entries(entries, chosen)
    return entries


def missing(entries: Sequence[Entry], folder: str | Path, layout: str, per_prompt: int) -> list[Entry]:
    """The prompts that have not all their files in the folder yet.

    Args:
        entries: all prompts that the folder is for.
        per_prompt: the pictures of each prompt.

    Raises:
        ValueError: where the layout wants another number of pictures, cannot hold a prompt, or the folder holds files
            that would be scored with these and are none of theirs.
    """
    chosen, folder = find_layout(layout), Path(folder)
    check_count(per_prompt, chosen)
    check_entries(entries, chosen)
    chosen.check_folder(folder, entries, per_prompt)

    def is_complete(entry: Entry) -> bool:
        names = [*chosen.texts(entry, per_prompt), *chosen.pictures(entry, per_prompt)]
        return all((folder / name).is_file() for name in names)

    return [entry for entry in entries if not is_complete(entry)]


def export(entries: Sequence[Entry], pictures: Iterable[list[Image.Image]], folder: str | Path, layout: str) -> None:
    """Write pictures where the benchmark's scorer looks for them, each file whole or not at all.

    Args:
        entries: prompts, such as those that `missing` gives.
        pictures: for each of them, in this order, its pictures, equally many; they are taken one prompt at a time.

    Raises:
        ValueError: where a prompt has too few pictures, or the layout cannot hold them.
    """
    chosen, folder = find_layout(layout), Path(folder)
    check_entries(entries, chosen)
    per_prompt = None
    for entry, images in zip(entries, pictures, strict=True):
        per_prompt = per_prompt or len(images)
        check_count(len(images), chosen)
        if len(images) != per_prompt:
            raise ValueError(f"The pictures of {entry} are {len(images)}, of others {per_prompt}; draw equally many.")
        composed = chosen.compose(images, folder)
        for name, text in chosen.texts(entry, per_prompt).items():
            write_whole(folder, name, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
        for name, image in zip(chosen.pictures(entry, per_prompt), composed, strict=True):
            write_whole(folder, name, lambda draft, image=image: image.save(draft, format="PNG"))


def find_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is not known; choose among {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def check_count(per_prompt: int, layout: Layout) -> None:
    if layout.pictures_needed is not None and per_prompt != layout.pictures_needed:
        raise ValueError(
            f"per_prompt={per_prompt} is not what this benchmark scores; draw {layout.pictures_needed} of each."
        )
    if per_prompt < 1:
        raise ValueError(f"per_prompt={per_prompt} is too few; draw at least one of each.")


def check_entries(entries: Sequence[Entry], layout: Layout) -> None:
    """Raise a ValueError for a prompt that the layout cannot hold, or two that would have the same files."""
    taken: dict[int | str, Entry] = {}
    for entry in entries:
        if not entry.prompt:
            raise ValueError(f"{entry} is empty; take it away, or say what to draw.")
        layout.check(entry)
        for place in (entry.index, *layout.pictures(entry, 1)):
            if place in taken:
                raise ValueError(
                    f"{entry} and {shortened(taken[place].prompt, 60)!r} have the same place {place!r}; give each "
                    "prompt of a set its own."
                )
            taken[place] = entry


def read_json_lines(path: Path) -> list[Entry]:
    """Prompts of a .jsonl, with the whole line as metadata."""
    entries = []
    for index, line in enumerate(read_lines(path)):
        where = f"Line {index + 1} of {str(path)!r}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON ({error.msg}); mend it or take it away.") from error
        prompt = content.get("prompt") if isinstance(content, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{where} has no text under "prompt"; write {{"prompt": ...}}, or take it away.')
        entries.append(Entry(index, prompt.strip(), metadata=content))
    return entries


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, of which none may be empty."""
    if not (text := read_text(path)).strip():
        raise ValueError(f"{str(path)!r} holds no prompt; write one a line.")
    lines = text.removesuffix("\n").split("\n")
    if empty := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise ValueError(f"Line {empty[0]} of {str(path)!r} is empty; take it away, or write a prompt.")
    return lines


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); give a file of prompts.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no UTF-8 at byte {error.start}; save it as UTF-8.") from error
