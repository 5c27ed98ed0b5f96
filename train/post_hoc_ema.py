"""Averages whose length is chosen after training: python -m train.post_hoc_ema RUN --width 0.08 --output FOLDER.

A run keeps two or more averages of its weights whose profiles are powers of the time, and saves them now and then; any
other such profile is nearly a weighted sum of what was saved (Karras et al. 2024, arXiv 2312.02696).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from localdit.command_line import Parser, counting_number, run
from train.settings import check_output_dir
from train.sharding import fill, whole

FOLDER = "post_hoc_ema"
WIDEST = 0.28  # the mean of all steps has the width 1 / sqrt(12)


def exponent(width: float) -> float:
    """The exponent g of the profile t^g whose standard deviation is `width` of the training so far."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(np.real(roots[np.isreal(roots)]).max())


class PowerAverages:
    """Averages of some parameters, one for each width; after t steps that of exponent g weighs step s by s^g."""

    def __init__(self, named_parameters: dict[str, nn.Parameter], widths: tuple[float, ...]):
        self.parameters = named_parameters
        self.widths = widths
        self.steps = 0
        self.averages = [{name: value.detach().clone() for name, value in named_parameters.items()} for _ in widths]

    @torch.no_grad()
    def step(self) -> None:
        """Take the parameters of a step in."""
        self.steps += 1
        for width, average in zip(self.widths, self.averages, strict=True):
            new = 1 - (1 - 1 / self.steps) ** (exponent(width) + 1)
            torch._foreach_lerp_(list(average.values()), [value.detach() for value in self.parameters.values()], new)

    def state_dict(self) -> dict[str, Any]:
        averages = [{name: whole(value) for name, value in average.items()} for average in self.averages]
        return {"steps": self.steps, "averages": averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            for name, value in average.items():
                fill(value, saved[name])

    def save(self, folder: Path, dtype: torch.dtype, writes: bool = True) -> None:
        """Write every average to a file of its own, which has its name when it is whole.

        All processes call this together, and one of them `writes`.
        """
        for width, average in zip(self.widths, self.state_dict()["averages"], strict=True):
            if not writes:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{self.steps:08d}-width-{width:g}.safetensors"
            draft = path.with_suffix(".draft")
            tensors = {name: value.to(dtype).contiguous() for name, value in average.items()}
            save_file(tensors, draft, {"step": str(self.steps), "width": str(width)})
            draft.replace(path)


def overlap(first: tuple[int, float], second: tuple[int, float]) -> float:
    """The inner product of two profiles over time, each of a step and an exponent."""
    (t, g), (u, h) = first, second
    low = min(t, u)
    return float((g + 1) * (h + 1) / (g + h + 1) * np.exp((g + 1) * np.log(low / t) + (h + 1) * np.log(low / u)) / low)


def coefficients(saved: list[tuple[int, float]], wanted: tuple[int, float]) -> np.ndarray:
    """How to weigh what was saved, each of a step and an exponent, to come nearest to the profile that is wanted."""
    gram = np.array([[overlap(first, second) for second in saved] for first in saved])
    target = np.array([overlap(first, wanted) for first in saved])
    return np.linalg.lstsq(gram, target, rcond=None)[0]


def list_saved(folder: Path) -> dict[Path, tuple[int, float]]:
    """The files of a run, with step and width.

    Raises:
        ValueError: where there is none.
    """
    saved = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            saved[path] = (int(file.metadata()["step"]), float(file.metadata()["width"]))
    if not saved:
        raise ValueError(f"{folder} holds no averages; train with --optimizer.post_hoc_ema '[0.05, 0.1]'.")
    return saved


def reconstruct(saved: dict[Path, tuple[int, float]], width: float, step: int) -> dict[str, torch.Tensor]:
    """The average of a width after a step, in fp32, from what was saved up to then."""
    usable = {path: (at, exponent(own)) for path, (at, own) in saved.items() if at <= step}
    weights = coefficients(list(usable.values()), (step, exponent(width)))
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(usable, weights.tolist(), strict=True):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, as it is no mapping
                term = file.get_tensor(name).double() * weight
                total[name] = total[name] + term if name in total else term
    return {name: value.float() for name, value in total.items()}


def averaged_pipeline(run_folder: Path, width: float, step: int | None) -> DiffusionPipeline:
    """The pipeline of a run with the average of a width in the place of its weights.

    Raises:
        ValueError: where the run has no such average.
    """
    saved = list_saved(run_folder / FOLDER)
    steps, widths = ({values[index] for values in saved.values()} for index in (0, 1))
    step = int(max(steps)) if step is None else step
    if step not in steps:
        raise ValueError(f"step={step} was not saved; choose among {sorted(steps)}.")
    if not min(widths) / 2 <= width <= WIDEST:
        raise ValueError(
            f"width={width} is far from the saved ones, {sorted(widths)}; take one between half the least and {WIDEST}."
        )
    pipeline = DiffusionPipeline.from_pretrained(run_folder / "pipeline", dtype=torch.float32)
    for name, value in reconstruct(saved, width, step).items():
        part, _, rest = name.partition(".")
        getattr(pipeline, part).get_parameter(rest).data.copy_(value)
    return pipeline


def main() -> None:
    parser = Parser(prog="python -m train.post_hoc_ema", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run with optimizer.post_hoc_ema")
    parser.add_argument("--width", type=float, required=True, help="of the average, as a share of the training: 0.08")
    parser.add_argument("--step", type=counting_number, help="of the average; by default the last that was saved")
    parser.add_argument("--output", required=True, help="folder of the pipeline")
    arguments = parser.parse_args()

    check_output_dir(arguments.output)
    if (Path(arguments.output) / "model_index.json").exists():
        raise ValueError(f"output={arguments.output!r} holds a pipeline; choose another folder.")
    averaged_pipeline(arguments.run, arguments.width, arguments.step).save_pretrained(arguments.output)
    print(json.dumps({"run": str(arguments.run), "width": arguments.width, "output": arguments.output}))


if __name__ == "__main__":
    run("train.post_hoc_ema", main)
