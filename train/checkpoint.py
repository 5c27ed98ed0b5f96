"""Checkpoints: whole or not there, the newest found by its step."""

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

PREFIX = "step-"
STATE = "trainer_state.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> Path:
    """Write everything accelerate knows plus the step, under a name that appears only when all is written."""
    target, partial = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps({"step": step}))
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


def check_newest(resume: Path | None, folder: Path) -> None:
    """Raise a ValueError where a run's own folder holds checkpoints newer than the one that it is resumed from."""
    if resume is None or resume.resolve().parent != folder.resolve():
        return
    newest = list_checkpoints(folder)[-1]
    if newest.name > resume.name:
        raise ValueError(
            f"resume={str(resume)!r} is older than {newest.name} beside it, which the next resume='latest' would take; "
            "remove what is newer, or choose another --output_dir."
        )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Restore everything accelerate knows and return the number of steps done."""
    accelerator.load_state(str(checkpoint))
    return json.loads((checkpoint / STATE).read_text())["step"]
