"""How the pictures of a folder came about: generation.json among them or beside their folder."""

import json
from pathlib import Path
from typing import Any

FILE = "generation.json"


def read_generation(folder: str | Path) -> dict[str, Any] | None:
    """What `python -m localdit.evaluation generate` wrote about a folder, or None.

    Raises:
        ValueError: where it is damaged.
    """
    for path in (Path(folder) / FILE, Path(folder).resolve().parent / FILE):
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); take it away, or draw the pictures again.") from error
    return None
