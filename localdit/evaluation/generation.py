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
            return load_settings(path)
    return None


def load_settings(path: Path) -> dict[str, Any]:
    """What a generation.json holds; raises a ValueError where it is damaged."""
    try:
        settings = json.loads(path.read_text(), parse_constant=str)
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); take it away, or draw the pictures again.") from error
    return settings
