"""Checkpoints: whole or not there, told from damaged ones by their hashes, the newest found by its step."""

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from config import TrainConfig
from train.settings import check_resumed

logger = logging.getLogger(__name__)

# a T5's embedding has two names, of which one is enough to save
logging.getLogger("accelerate.utils.other").addFilter(lambda record: "shared tensor" not in str(record.msg))

PREFIX = "step-"
STATE = "trainer_state.json"
NEWEST = ("latest", "auto")  # of `resume`; "auto" also starts a run that has no checkpoint yet
RESULTS = ("pipeline", "lora", "post_hoc_ema", "samples", "log.jsonl")  # what a run leaves beside its checkpoints


def save_checkpoint(accelerator: Accelerator, folder: Path, keep: int, state: dict[str, Any]) -> Path:
    """Write everything accelerate knows, and `state`, under a name that appears when all of it is on the disk.

    Of the whole checkpoints in the folder the last `keep` stay, and the one of the least validation loss.

    Args:
        state: for JSON; at least "step", the number of steps done. "config" has the run's settings, "validation_loss"
            the loss that the best is chosen by.

    Raises:
        OSError: where it cannot be written; older checkpoints are then as they were.
    """
    name = f"{PREFIX}{state['step']:08d}"
    target, partial = folder / name, folder / f".{name}.partial"
    if accelerator.is_main_process:
        for left in folder.glob(f".{PREFIX}*.partial"):  # by a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            complete(partial, state)
            if target.exists():
                discard(target)
            os.replace(partial, target)
            sync(folder)
    except Exception as error:  # torch, safetensors and the system each say in their own way that a disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(cannot_write(target, error)) from error
    if accelerator.is_main_process:
        for old in superfluous(list_checkpoints(folder), keep):
            discard(old)
    accelerator.wait_for_everyone()
    return target


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, under another name first, so that a kill meanwhile leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def complete(partial: Path, state: dict[str, Any]) -> None:
    """Add the state with the hash of every file, and wait until all of it is on the disk."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    hashes = {path.relative_to(partial).as_posix(): file_hash(path) for path in files}
    (partial / STATE).write_text(json.dumps({**state, "files": hashes}))
    for path in [*files, partial / STATE, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(target: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    whole = list_checkpoints(target.parent)
    last = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no older checkpoint"
    free = shutil.disk_usage(target.parent).free / 2**30
    return (
        f"{target} cannot be written ({reason}; {free:.1f} GiB are free); {last}; make room and go on with "
        "--resume latest."
    )


def superfluous(checkpoints: list[Path], keep: int) -> list[Path]:
    """All but the last `keep` checkpoints and the best."""
    losses = {}
    for path in checkpoints:
        with suppress(ValueError):  # a damaged one is the best of nothing
            losses[path] = read_state(path).get("validation_loss")
    measured = {path: loss for path, loss in losses.items() if loss is not None}
    best = min(measured, key=measured.__getitem__) if measured else None
    return [path for path in checkpoints[: max(0, len(checkpoints) - keep)] if path != best]


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; whether their files are still what they were is not read."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file())


def find_checkpoint(resume: str, folder: Path) -> Path:
    """The checkpoint that `resume` names, a path, or "latest" or "auto": the newest that is not damaged.

    Raises:
        ValueError: where there is none, or the named one is damaged.
    """
    if resume not in NEWEST:
        if not (Path(resume) / STATE).is_file():
            raise ValueError(f"resume={resume!r} is not a whole checkpoint (it has no {STATE}); name one, or 'latest'.")
        if reason := damage(Path(resume)):
            raise ValueError(f"{resume} cannot be resumed from ({reason}); name another checkpoint, or 'latest'.")
        return Path(resume)
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is passed over, because it is damaged: %s.", checkpoint, reason)
    if checkpoints:
        raise ValueError(
            f"resume={resume!r}, but {folder} holds {len(checkpoints)} damaged checkpoint(s) and no whole one; drop "
            "resume to start anew, in another output_dir."
        )
    raise ValueError(f"resume={resume!r}, but {folder} holds no checkpoint; drop resume, or say auto, to start anew.")


def find_start(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that a run begins from, or None for one that starts anew.

    Raises:
        ValueError: where there is none to resume from, or where a new run would write over another.
    """
    folder = output_dir / "checkpoints"
    others = list_checkpoints(folder)
    if resume is not None and (others or resume != "auto"):
        return find_checkpoint(resume, folder)
    if others:
        raise ValueError(
            f"{output_dir} holds checkpoints of another run ({others[-1].name}); continue it with --resume latest, "
            "choose another --output_dir, or remove them."
        )
    # a run that ended before its first checkpoint has logged and drawn, and no more
    kept = ("log.jsonl", "samples") if resume == "auto" else ()
    if left := [name for name in RESULTS if name not in kept and (output_dir / name).exists()]:
        raise ValueError(
            f"{output_dir} holds what another run left ({', '.join(left)}), and no checkpoint to continue it from; "
            "choose another --output_dir, or remove that."
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error).rstrip(".")
    for name, expected in state.get("files", {}).items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if file_hash(checkpoint / name) != expected:
            return f"{name} is not what was written"
    return None


def check_checkpoint(resume: Path, config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError where a run of this config cannot go on from a checkpoint, or has nothing to do after it."""
    state = read_state(resume)
    check_resumed(state.get("config") or {}, config, resume.name)
    if state["step"] > config.max_steps:
        raise ValueError(f"max_steps={config.max_steps} is less than {resume.name} has done; raise it to train on.")
    if config.resume not in NEWEST:
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
    """The state that a checkpoint was saved with, and under "files" the hash of each of its other files."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        if not isinstance(state["step"], int):
            raise TypeError("its step is no number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / STATE} is damaged ({error}); resume from another checkpoint.") from error
    return state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Restore everything accelerate knows and return the state that was saved with it.

    Raises:
        ValueError: where a file of the checkpoint is of another run.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # torch, safetensors, pickle and json each fail in their own ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{checkpoint} cannot be resumed from ({reason}); name another checkpoint.") from error
    return read_state(checkpoint)
