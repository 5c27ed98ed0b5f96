"""Panels to draw on, and where the plot is written."""

from pathlib import Path
from typing import Any


def panels(count: int) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, so many beside each other; where it is one, no array of them.

    Raises:
        ValueError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The plot needs the package matplotlib; pip install matplotlib.") from error
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count)


def write(figure: Any, path: Path) -> Path:
    """Write the figure, in a folder that need not be there, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
