"""Checkpoints: whole or not there, the newest found by its step."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from config import TrainConfig
from train.settings import check_resumed

# a T5's embedding has two names, of which one is enough to save
logging.getLogger("accelerate.utils.other").addFilter(lambda record: "shared tensor" not in str(record.msg))

PREFIX = "step-"
STATE = "trainer_state.json"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, keep: int, settings: dict[str, Any] | None = None
) -> Path:
    """Write everything accelerate knows, the step and the run's settings, under a name that appears when all is there.

    Of the whole checkpoints in the folder the last `keep` stay.
    """
    target, partial = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps({"step": step, "config": settings or {}}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        others = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint != target]
        for old in others[: len(others) - (keep - 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file())


def find_checkpoint(resume: str, folder: Path) -> Path:
    """The checkpoint that `resume` ("latest" or a path) names; raises a ValueError where there is none."""
    if resume != "latest":
        if not (Path(resume) / STATE).is_file():
            raise ValueError(f"resume={resume!r} is not a whole checkpoint (it has no {STATE}); name one, or 'latest'.")
        return Path(resume)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"resume='latest', but {folder} holds no checkpoint; drop resume to start anew.")
    return checkpoints[-1]


def check_checkpoint(resume: Path | None, config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError where a run of this config cannot go on from a checkpoint, or has nothing to do after it."""
    if resume is None:
        return
    state = read_state(resume)
    check_resumed(state.get("config") or {}, config, resume.name)
    if state["step"] > config.max_steps:
        raise ValueError(f"max_steps={config.max_steps} is less than {resume.name} has done; raise it to train on.")
    check_newest(resume, folder)


def check_newest(resume: Path, folder: Path) -> None:
    """Raise a ValueError where a run's own folder holds checkpoints newer than the one that it is resumed from."""
    if resume.resolve().parent != folder.resolve():
        return
    newest = list_checkpoints(folder)[-1]
    if newest.name > resume.name:
        raise ValueError(
            f"resume={str(resume)!r} is older than {newest.name} beside it, which the next resume='latest' would take; "
            "remove what is newer, or choose another --output_dir."
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The step of a checkpoint, and under "config" the settings of its run where it knows them."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        if not isinstance(state["step"], int):
            raise TypeError("its step is no number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / STATE} is damaged ({error}); resume from another checkpoint.") from error
    return state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Restore everything accelerate knows and return the number of steps done.

    Raises:
        ValueError: where a file of the checkpoint is missing, damaged or of another run.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # torch, safetensors, pickle and json each fail in their own ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{checkpoint} cannot be resumed from ({reason}); name another checkpoint.") from error
    return read_state(checkpoint)["step"]
