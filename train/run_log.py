"""What a run tells of itself: a progress bar, a line of JSON every so many steps, and accelerate's trackers."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from config import TrainConfig
from train.objective import TRAIN_TIMESTEPS
from train.settings import as_plain, dotted
from train.stopwatch import Stopwatch

LOG, SKIPPED = "log.jsonl", "skipped_steps.jsonl"
BUCKETS = 10  # of timesteps, whose losses are told apart


@dataclass
class StepRecord:
    """What one step leaves on the device, to be read when a line is due: nothing here makes the host wait.

    Args:
        losses, timesteps: of every picture, [B] tensors, one for each micro-step.
        names: of the pictures.
        unreadable: which pictures could not be read, and why.
        grad_norm: before it was clipped.
        finite: whether the weights were updated, which they are not where a loss or gradient is no number.
        critic_loss: of what learns beside the model, if anything does.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    grad_norm: torch.Tensor = torch.tensor(0.0)
    finite: torch.Tensor = torch.tensor(True)
    critic_loss: torch.Tensor | None = None


class RunLog:
    """Gathers the records of all processes and writes them down."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, watch: Stopwatch, state: dict[str, Any]):
        self.config = config
        self.accelerator = accelerator
        self.watch = watch
        self.folder = Path(config.output_dir)
        self.skipped = state.get("skipped_steps", 0)  # steps without an update, since the run began
        self.records: list[StepRecord] = []
        self.since = time.perf_counter()
        self.progress = tqdm(
            total=config.max_steps,
            initial=state["step"],
            disable=not accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )

    def add(self, record: StepRecord) -> None:
        self.records.append(record)
        self.progress.update()

    def write(self, step: int, learning_rate: float) -> dict[str, Any]:
        """One line about the steps since the last one; all processes call this together.

        Raises:
            FloatingPointError: where more steps than `max_skipped_steps` could not update the weights.
        """
        records, self.records = self.records, []
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        finite = torch.stack([record.finite for record in records]).cpu().numpy()
        norms = torch.stack([record.grad_norm for record in records]).float().cpu().numpy()
        values = {
            **self._losses(records, finite),
            "grad_norm": float(norms[np.isfinite(norms)].mean()) if np.isfinite(norms).any() else None,
            "learning_rate": learning_rate,
            "images_per_second": self._pictures(records) / seconds,
            "shares_of_time": self._shares_of_time(seconds),
        }
        if critic := [record.critic_loss for record in records if record.critic_loss is not None]:
            loss = self.accelerator.reduce(torch.stack(critic).mean(), "mean")
            values["critic_loss"] = float(loss) if torch.isfinite(loss) else None  # pyright: ignore[reportArgumentType]
        if self.accelerator.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if not finite.all():
            self._note_skipped(step, records, finite)
        self.skipped += int((~finite).sum())
        if self.skipped:
            values["skipped_steps"] = self.skipped
        self._tell(step, values, seconds / len(records))
        if self.skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped} steps up to step {step} had a loss or a gradient that is no number, more than "
                f"max_skipped_steps={self.config.max_skipped_steps}; lower optimizer.learning_rate or use "
                f"mixed_precision=no, look at the pictures named in {self.folder / SKIPPED}, and resume from the last "
                "checkpoint."
            )
        return values

    def _losses(self, records: list[StepRecord], finite: np.ndarray) -> dict[str, Any]:
        """The mean loss of all pictures, and of those in each tenth of the timesteps (None where there are none)."""
        kept = [record for record, is_finite in zip(records, finite, strict=True) if is_finite]
        if not kept:
            return {"loss": None, "loss_by_timestep": [None] * BUCKETS}
        losses = [losses for record in kept for losses in record.losses]
        return loss_by_timestep(
            self.accelerator, losses, [timesteps for record in kept for timesteps in record.timesteps]
        )

    def _shares_of_time(self, seconds: float) -> dict[str, float]:
        """How much of the time went where; the text encoder runs inside the model's forward pass."""
        spent = self.watch.read()
        spent["model"] -= spent.get("text", 0.0)
        return {name: share / seconds for name, share in sorted(spent.items())}

    def _pictures(self, records: list[StepRecord]) -> int:
        """Pictures of all processes."""
        return sum(len(losses) for record in records for losses in record.losses) * self.accelerator.num_processes

    def _note_skipped(self, step: int, records: list[StepRecord], finite: np.ndarray) -> None:
        """Write down which pictures were in the steps without an update."""
        first = step - len(records) + 1
        mine = [
            {"step": first + index, "samples": record.names}
            for index, (record, is_finite) in enumerate(zip(records, finite, strict=True))
            if not is_finite
        ]
        lines = gather_object(mine)
        if self.accelerator.is_main_process:
            with (self.folder / SKIPPED).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def went_back(self, step: int, to: int) -> None:
        """Tell that the run left its course at a step and goes on from one before."""
        self.note(step, {"rolled_back_to": to})
        self.progress.write(f"The loss at step {step} left its course; back to step {to}, and on with the next data.")
        self.progress.n = to
        self.records = []

    def note(self, step: int, values: dict[str, Any]) -> None:
        """Write values of a step to the log and the trackers."""
        self.accelerator.log(dict(scalars(values)), step=step)
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a") as log:
                log.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def show(self, step: int, path: Path) -> None:
        """Hand a sheet of samples, if it was written, to the trackers that take pictures."""
        if not path.is_file():
            return
        sheet = np.asarray(Image.open(path).convert("RGB"))[None]  # [1, H, W, 3]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": sheet}, step=step, **layout)

    def _tell(self, step: int, values: dict[str, Any], seconds_per_step: float) -> None:
        self.note(step, values)
        loss = "none" if values["loss"] is None else f"{values['loss']:.4f}"
        slowest = ", ".join(f"{name} {share:.0%}" for name, share in values["shares_of_time"].items())
        left = (self.config.max_steps - step) * seconds_per_step / 60
        self.progress.set_postfix_str(
            f"loss {loss}, {values['images_per_second']:.0f} images/s ({slowest}), {left:.0f} min left"
        )


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers of `report_to`, and tell them the settings of the run.

    Raises:
        ValueError: where one cannot start, such as for want of a login.
    """
    if not config.report_to:
        return
    try:
        accelerator.init_trackers("train")
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would make a run of its own of them
                tracker.store_init_configuration(dict(settings_by_name(as_plain(config))))
    except Exception as error:  # each tracker fails in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"report_to={list(config.report_to)} cannot start ({reason}); log in, or leave it out."
        ) from error


def settings_by_name(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, as numbers and texts."""
    for name, value in dotted(settings).items():
        yield name, value if isinstance(value, int | float | str) else str(value)


def loss_by_timestep(
    accelerator: Accelerator, losses: list[torch.Tensor], timesteps: list[torch.Tensor]
) -> dict[str, Any]:
    """The mean loss over all processes, and that of each tenth of the timesteps, None where there are none.

    Args:
        losses, timesteps: of pictures, [B] tensors.
    """
    pairs = torch.stack([torch.cat(losses), torch.cat(timesteps).to(losses[0])], dim=1)
    values, places = accelerator.gather(pairs).T.cpu().numpy()
    buckets = np.minimum(places / TRAIN_TIMESTEPS * BUCKETS, BUCKETS - 1).astype(int)
    parts = [values[buckets == bucket] for bucket in range(BUCKETS)]
    by_timestep = [float(part.mean()) if len(part) else None for part in parts]
    return {"loss": float(values.mean()), "loss_by_timestep": by_timestep}


def scalars(values: dict[str, Any], prefix: str = ""):
    """The numbers of nested values by their dotted names, as trackers want them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from scalars({str(index): each for index, each in enumerate(value)}, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value
