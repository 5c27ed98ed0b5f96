"""Files and folders to write: where they may be, whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localdit.command_line import check_file


def check_writable(option: str, folder: str | Path) -> None:
    """Raise a ValueError where a folder cannot be made or written to; `option` is what the command line calls it."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} {str(folder)!r} is, or lies in, what is no folder to write to; choose another.")


def check_target(option: str, path: str | Path) -> None:
    """Raise a ValueError where a file to write is a folder, or lies where none can be written."""
    check_file(option, path)
    check_writable(option, Path(path).parent)


def write_whole(folder: Path, name: str, write: Callable[[Path], Any]) -> None:
    """Write a file in the folder, which has its name when it is whole."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the pictures, a draft that a kill left behind would be scored, or stop T2I-CompBench's scorers
    draft = folder / f".{os.getpid()}.draft"
    write(draft)
    draft.replace(path)
