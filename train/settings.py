"""A run's settings: checked before anything is loaded, kept beside what the run makes, compared when it is resumed."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from config import MixersConfig, ScoresConfig, TrainConfig, Within

logger = logging.getLogger(__name__)

SETTINGS_FILE = "config.yaml"

# what a resumed run may change without becoming another: where and how often something is written
FREE = (
    "output_dir",
    "resume",
    "dry_run",
    "report_to",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "validation_batches",
    *(f"scores.{field.name}" for field in fields(ScoresConfig)),
    "hub_repo_id",
    "hub_private",
)

# settings of data, with the sources that read them
HEARD = {
    "path": ("imagefolder", "huggingface", "webdataset", "mnist", "fashion_mnist", "precomputed"),
    "bucket_multiple": ("imagefolder", "huggingface", "webdataset"),
    "scan": ("imagefolder", "huggingface", "webdataset"),
    "held_out": ("imagefolder", "huggingface", "webdataset", "precomputed"),
    "streaming": ("huggingface",),
}


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise where a number of a config, or of a config in it, is outside the interval that `config.py` gives it.

    Raises:
        TypeError: for what is no number, or no whole one where that is asked for.
        ValueError: for a number out of range.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        for index, part in enumerate(value if isinstance(value, tuple | list) else ()):
            if is_dataclass(part):
                check_ranges(part, f"{name}.{index}.")
        for number_type, within in _bounds(hints[field.name]):
            for number in value if isinstance(value, tuple | list) else [value]:
                if number is not None:
                    _check_number(name, number, number_type, within.interval)


def _bounds(hint: Any) -> Iterator[tuple[type, Within]]:
    """The types and intervals of the numbers that a type hint allows."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Within):
            yield hint.__origin__, note
            return
    for part in get_args(hint):
        yield from _bounds(part)


def _check_number(name: str, number: Any, number_type: type, interval: str) -> None:
    kind, words = (Integral, "whole number") if number_type is int else (Real, "number")
    if not isinstance(number, kind) or isinstance(number, bool):
        raise TypeError(f"{name}={number!r} is of type {type(number).__name__}; give a {words}.")
    low, high = (float(end) for end in interval[1:-1].split(","))
    value = float(number)
    inside = value >= low if interval[0] == "[" else value > low
    if not (inside and (value <= high if interval[-1] == "]" else value < high)):
        raise ValueError(f"{name}={number} must be {_in_words(interval, low, high)}.")


def _in_words(interval: str, low: float, high: float) -> str:
    if math.isfinite(high):
        return f"in {interval}"
    if math.isfinite(low):
        return f"at least {low:g}" if interval[0] == "[" else f"above {low:g}, and finite"
    return "a finite number"


def check_output_dir(output_dir: str) -> None:
    """Raise a ValueError where this cannot be a folder that a run writes to."""
    if not output_dir.strip():
        raise ValueError(f"output_dir={output_dir!r} names no folder; give one, such as output/mine.")
    folder = Path(output_dir)
    blocking = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise ValueError(f"output_dir={output_dir!r} cannot be a folder, since {blocking} is a file; choose another.")


def check_new_folder(output_dir: str) -> None:
    """Raise a ValueError where a trained network cannot be written to a folder, or is there already."""
    check_output_dir(output_dir)
    if (Path(output_dir) / "config.json").is_file():
        raise ValueError(f"output_dir={output_dir!r} holds a trained network; remove it, or choose another folder.")


def check_run(config: TrainConfig) -> None:
    """Raise a ValueError or TypeError where a setting of a run is out of range or does not go with another."""
    check_ranges(config)
    check_output_dir(config.output_dir)
    if any(not prompt.strip() for prompt in config.sample.prompts):
        raise ValueError("sample.prompt holds an empty text; say what to draw.")
    check_trackers(config.report_to)
    check_data(config)
    check_heard(config)
    if config.data.recoloured and (config.data.name != "digit_scenes" or config.objective.process != "flow"):
        raise ValueError(
            f"data.recoloured={config.data.recoloured} needs data.name=digit_scenes and objective.process=flow; "
            "set it to 0."
        )
    if config.mixers != MixersConfig() and (config.pretrained is None or config.mixers.token_mixers is None):
        raise ValueError(
            "mixers turns the transformer of a pretrained pipeline into one with other mixers; set mixers.token_mixers "
            "and pretrained, or for a new transformer model.token_mixers."
        )
    check_few_step(config)
    if len(config.optimizer.post_hoc_ema) == 1 or (config.optimizer.post_hoc_ema and config.lora.rank):
        raise ValueError(
            f"optimizer.post_hoc_ema={list(config.optimizer.post_hoc_ema)} needs at least two widths, and the whole "
            "weights to train, not lora.rank; give [0.05, 0.1], or leave it out."
        )
    if config.hub_repo_id is not None:
        try:
            validate_repo_id(config.hub_repo_id)
        except HFValidationError as error:
            raise ValueError(f"hub_repo_id={config.hub_repo_id!r} is no name of a repository ({error}).") from error
        if config.lora.rank:
            raise ValueError("hub_repo_id pushes pipelines, not adapters; leave it out with lora.rank.")
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision='fp16' needs a CUDA device, and there is none here; use 'bf16' or 'no'.")


def check_few_step(config: TrainConfig) -> None:
    """Raise a ValueError where few steps are to be learned with settings that do not go with it."""
    few_step = config.few_step
    if few_step.method == "progressive" and few_step.teacher_steps % few_step.steps:
        raise ValueError(
            f"few_step.teacher_steps={few_step.teacher_steps} is no multiple of few_step.steps={few_step.steps}; let "
            "each step of the student stand for as many of the teacher's."
        )
    if few_step.teacher is not None and config.distillation.teacher is not None:
        raise ValueError("few_step.teacher and distillation.teacher are both set; learn from one at a time.")
    if few_step.method != "distribution_matching":
        return
    if few_step.teacher is None:
        raise ValueError("few_step.method='distribution_matching' needs few_step.teacher; name a pipeline.")
    if config.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' scales one loss, and distribution_matching has two; choose 'bf16'.")
    if config.validate_every or config.data.recoloured:
        raise ValueError(
            f"few_step.method='distribution_matching' learns from no picture of the data, so that validate_every="
            f"{config.validate_every} and data.recoloured={config.data.recoloured} must be 0; scores.every judges what "
            "is drawn."
        )


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise a ValueError for a tracker that accelerate does not know, or that is not installed."""
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    for name in names:
        if name not in known:
            raise ValueError(f"report_to={name!r} is no tracker; choose among {known}.")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"report_to={name!r} needs the package {name}; pip install {name}.")


def check_data(config: TrainConfig) -> None:
    """Raise a ValueError for settings that a source would pass over in silence, or that would mix it with the run."""
    for place, data in enumerate((config.data, *config.mixture)):
        for name, readers in HEARD.items():
            if getattr(data, name) and data.name not in readers:
                setting = f"data.{name}" if place == 0 else f"mixture.{place - 1}.{name}"
                raise ValueError(
                    f"{setting}={getattr(data, name)!r} is for {' and '.join(readers)}, and means nothing to "
                    f"{data.name}; leave it out."
                )
        if data.name != "imagefolder" or data.path is None:
            continue
        if Path(config.output_dir).resolve().is_relative_to(Path(data.path).resolve()):
            raise ValueError(
                f"output_dir={config.output_dir!r} is inside {data.path}, where a resumed run would be trained on its "
                "own samples; choose a folder outside."
            )


def check_heard(config: TrainConfig) -> None:
    """Raise a ValueError where something is set that the run would pass over in silence."""
    optimizer, objective = config.optimizer, config.objective
    if optimizer.arguments and optimizer.name in ("adamw", "muon"):
        raise ValueError(
            f"optimizer.arguments={optimizer.arguments} are for an imported optimizer, such as torch.optim.AdamW, and "
            f"mean nothing to {optimizer.name!r}; leave them out, or name one."
        )
    if optimizer.lr_cycles > 1 and optimizer.lr_scheduler != "cosine_with_restarts":
        raise ValueError(
            f"optimizer.lr_cycles={optimizer.lr_cycles} is for optimizer.lr_scheduler='cosine_with_restarts', not "
            f"{optimizer.lr_scheduler!r}; set it to 1."
        )
    if objective.process != "flow" and (objective.shift_resolution is not None or objective.flow_shift != 1):
        raise ValueError(
            "objective.shift_resolution and objective.flow_shift need objective.process='flow', not "
            f"{objective.process!r}; leave them out."
        )
    if optimizer.warmup_steps >= config.max_steps and optimizer.lr_scheduler != "constant":
        logger.warning(
            "optimizer.warmup_steps=%d is not less than max_steps=%d: the learning rate rises to the end, and stays "
            "below what is set.",
            *(optimizer.warmup_steps, config.max_steps),
        )


def as_plain(config: Any) -> dict[str, Any]:
    """A config as dictionaries, lists, texts and numbers only."""
    return json.loads(json.dumps(asdict(config)))


def save_settings(config: TrainConfig, folder: Path) -> None:
    """Write every setting of a run, defaults included, as a recipe that starts it anew."""
    settings = {name: value for name, value in as_plain(config).items() if name not in ("resume", "dry_run")}
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def check_resumed(before: dict[str, Any], config: TrainConfig, checkpoint: str) -> None:
    """Compare the settings that a checkpoint was written under with those of the run that goes on from it.

    Raises:
        ValueError: where its weights or the optimizer's state cannot fit; other differences are logged.
    """
    old, new = dotted(before), dotted(as_plain(config))
    common = sorted(old.keys() & new.keys() - set(FREE))  # an older version may have known fewer settings
    changed = [(name, old[name], new[name]) for name in common if old[name] != new[name]]
    for name, was, now in changed:
        if _decides_shapes(name, was, now):
            raise ValueError(
                f"{name}={now!r}, but {checkpoint} was written with {was!r}; keep that, or start a run of its own in "
                "another output_dir."
            )
    if changed:
        told = ", ".join(f"{name} {was!r} -> {now!r}" for name, was, now in changed)
        logger.warning("Resumed with other settings than %s had: %s.", checkpoint, told)


def _decides_shapes(name: str, was: Any, now: Any) -> bool:
    """Whether a setting that changed changes what a checkpoint holds; paths may be spelt anew."""
    if name in ("vae", "pretrained", "text_encoder.pretrained"):
        return (was is None) != (now is None)
    if name in ("optimizer.post_hoc_ema", "few_step.method"):
        return True
    if name == "optimizer.ema_decay":
        return (was == 0) != (now == 0)
    return name.startswith(("model.", "text_encoder.", "lora.", "mixers.")) or name == "optimizer.name"


def dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; what a mixer is given stays one value."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name != "mixer_options":
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
