"""Files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(folder: Path, name: str, write: Callable[[Path], Any]) -> None:
    """Write a file in the folder, which has its name when it is whole."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the pictures, a draft that a kill left behind would be scored, or stop T2I-CompBench's scorers
    draft = folder / f".{os.getpid()}.draft"
    write(draft)
    draft.replace(path)
