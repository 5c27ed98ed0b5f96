"""Draws the log of a run: python -m train.run_plot FOLDER; a run does it by itself at every checkpoint."""

import argparse
import json
from pathlib import Path

import numpy as np

from train.command_line import run
from train.run_log import LOG

PLOT = "log.png"
PANELS = {"loss": "loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}


def read_log(folder: Path) -> list[dict]:
    """What a run tells of each step, in order; of a step that was done again after a kill, what it told last.

    Raises:
        ValueError: where the folder has no log.
    """
    file = folder / LOG
    if not file.is_file():
        raise ValueError(f"{folder} has no {LOG}; give the output_dir of a run.")
    lines: dict[int, dict] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        lines[line["step"]] = {**lines.get(line["step"], {}), **line}
    return [lines[step] for step in sorted(lines)]


def plot(folder: Path) -> Path:
    """Write `folder/log.png`: loss, gradient norm and learning rate over the steps, and the loss by timestep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(folder)
    steps = [line["step"] for line in lines]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for panel, (key, title) in zip(axes.flat, PANELS.items(), strict=False):
        values = [np.nan if line.get(key) is None else line[key] for line in lines]
        panel.plot(steps, values, marker="." if len(steps) < 30 else None)
        validated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        if key == "loss" and validated:
            panel.plot(list(validated), list(validated.values()), marker=".", label="held-out pictures")
            panel.legend(fontsize="small")
        panel.set(title=title, xlabel="step", yscale="linear" if key == "learning_rate" else "log")
        panel.grid(alpha=0.3)
    panel = axes.flat[3]
    told = [line for line in lines if "loss_by_timestep" in line]
    third = max(1, len(told) // 3)
    for name, part in (("first third", told[:third]), ("last third", told[-third:])):
        rows = np.array([line["loss_by_timestep"] for line in part], dtype=float)
        seen = ~np.isnan(rows).all(axis=0)
        middles = (np.arange(rows.shape[1]) + 0.5) / rows.shape[1]
        panel.plot(middles[seen], np.nanmean(rows[:, seen], axis=0), marker=".", label=f"{name} of the run")
    panel.set(title="loss by timestep", xlabel="share of the timesteps (1 is noise alone)", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(folder / PLOT, dpi=100)
    pyplot.close(figure)
    return folder / PLOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.run_plot", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of a run")
    for folder in parser.parse_args().folders:
        print(plot(folder))


if __name__ == "__main__":
    run("train.run_plot", main)
