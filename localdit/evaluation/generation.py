"""How the pictures of a folder came about: generation.json among them or beside their folder."""

import inspect
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

FILE = "generation.json"
CALL = ("height", "width", "num_inference_steps", "guidance_scale")


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


def call_settings(pipeline: DiffusionPipeline, chosen: dict[str, Any]) -> dict[str, Any]:
    """What a call uses: what was chosen, else the folder's own defaults, else the pipeline's; and the sampler."""
    parameters = inspect.signature(pipeline.__call__).parameters
    own = dict(pipeline.config.get("call_defaults", None) or {})
    known = [name for name in CALL if name in parameters]
    found = {name: chosen.get(name, own.get(name, parameters[name].default)) for name in known}
    if default_size := getattr(pipeline, "default_size", None):  # which pipelines of others do not tell
        found["height"], found["width"] = default_size(found["height"], found["width"])
    scheduler = pipeline.scheduler
    settings = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    found |= {"scheduler": type(scheduler).__name__, "scheduler_config": settings}
    return json.loads(json.dumps(found), parse_constant=str)  # schedulers know -inf, and JSON does not
