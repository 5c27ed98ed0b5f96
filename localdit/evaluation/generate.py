"""Pictures of prompts, classes or neither by a pipeline, for scores: each of its own seed, with how they came about."""

import hashlib
import inspect
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image

from localdit.command_line import (
    DTYPES,
    Parser,
    best_device,
    check_device,
    counting_number,
    load_pipeline,
    seed_number,
    shortened,
    start_process,
)
from localdit.evaluation.extractors import weights_hash
from localdit.evaluation.files import check_writable, write_whole
from localdit.evaluation.generation import CALL, FILE, call_settings, load_settings
from localdit.evaluation.images import SUFFIXES
from localdit.evaluation.limits import counting_to
from localdit.evaluation.processes import in_batches
from localdit.evaluation.prompt_sets import LAYOUTS, Entry, export, missing, read_prompts
from localdit.evaluation.records import command_of, versions

USUAL = {"geneval": 4, "dpg-bench": 4, "t2i-compbench": 10}  # pictures of a prompt
MOST_PICTURES, MOST_STEPS = 100_000, 10_000


class Drawer:
    """Draws with a pipeline, and counts pictures and seconds."""

    def __init__(self, pipeline: DiffusionPipeline, options: Any):
        self.pipeline = pipeline
        self.seed, self.device = options.seed, options.device
        self.chosen = {name: getattr(options, name) for name in CALL if getattr(options, name) is not None}
        self.seconds, self.pictures = 0.0, 0

    def __call__(self, places: list[int], **what: Any) -> list[Image.Image]:
        """Pictures of what the pipeline's arguments say; their seeds are their places after the first."""
        generators = [torch.Generator().manual_seed(self.seed + place) for place in places]
        start = time.perf_counter()
        images = self.pipeline(**what, generator=generators, **self.chosen).images
        self.seconds += time.perf_counter() - start
        self.pictures += len(images)
        return images

    def peak_bytes(self) -> int:
        if torch.device(self.device).type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pictures_of_prompts(
    draw: Drawer, entries: list[Entry], per_prompt: int, batch_size: int
) -> Iterator[list[Image.Image]]:
    """The pictures of each prompt; a picture's seed depends on its prompt's place in the whole set."""
    together = max(1, batch_size // per_prompt)
    for start in range(0, len(entries), together):
        batch = entries[start : start + together]
        pairs = [(entry, number) for entry in batch for number in range(per_prompt)]
        places = [entry.index * per_prompt + number for entry, number in pairs]
        drawn = draw(places, prompt=[entry.prompt for entry, _ in pairs])
        for first in range(0, len(drawn), per_prompt):
            yield drawn[first : first + per_prompt]


def draw_prompts(draw: Drawer, entries: list[Entry], options: Any, state: PartialState) -> None:
    """Draw what is missing of a set of prompts."""
    absent = missing(entries, options.output, options.layout, options.per_prompt)
    own = absent[state.process_index :: state.num_processes]
    export(own, pictures_of_prompts(draw, own, options.per_prompt, options.batch_size), options.output, options.layout)


def draw_classes(draw: Drawer, options: Any, state: PartialState) -> None:
    """Draw what is missing of `per_class` pictures of each class, named CLASS-NUMBER.png."""
    classes = number_of_classes(draw.pipeline)
    whole = [(label, number) for label in range(classes) for number in range(options.per_class)]
    names = [f"{label:04}-{number:05}.png" for label, number in whole]
    absent = [place for place, name in enumerate(names) if not (Path(options.output) / name).is_file()]
    for places in in_batches(absent[state.process_index :: state.num_processes], options.batch_size):
        images = draw(places, class_labels=[whole[place][0] for place in places])
        for place, image in zip(places, images, strict=True):
            write_whole(Path(options.output), names[place], lambda draft, image=image: image.save(draft, format="PNG"))


def draw_any(draw: Drawer, options: Any, state: PartialState) -> None:
    """Draw what is missing of `pictures` pictures of nothing in particular, named NUMBER.png."""
    names = [f"{number:05}.png" for number in range(options.pictures)]
    absent = [place for place, name in enumerate(names) if not (Path(options.output) / name).is_file()]
    for places in in_batches(absent[state.process_index :: state.num_processes], options.batch_size):
        for place, image in zip(places, draw(places, batch_size=len(places)), strict=True):
            write_whole(Path(options.output), names[place], lambda draft, image=image: image.save(draft, format="PNG"))


def number_of_classes(pipeline: DiffusionPipeline) -> int:
    """0 for a pipeline of prompts."""
    return getattr(pipeline.components.get("transformer"), "config", {}).get("num_classes") or 0


def check_kind(pipeline: DiffusionPipeline, options: Any) -> None:
    """Raise a ValueError where a model is to draw what it does not know, such as prompts by one of classes."""
    parameters = inspect.signature(pipeline.__call__).parameters
    knows = {
        "prompts": "prompt" in parameters,
        "per_class": number_of_classes(pipeline) > 0,
        "pictures": "batch_size" in parameters and not number_of_classes(pipeline),
    }
    fitting = " or ".join(f"--{name}" for name, known in knows.items() if known) or "another model"
    if options.prompts and not knows["prompts"]:
        raise ValueError(f"--model {options.model!r} takes no prompts; give {fitting}.")
    if options.per_class and not knows["per_class"]:
        raise ValueError(f"--model {options.model!r} knows no classes; give {fitting}.")
    if options.pictures and not knows["pictures"]:
        raise ValueError(f"--model {options.model!r} wants to be told what to draw; give {fitting}.")


def what_to_draw(options: Any, entries: list[Entry]) -> dict[str, Any]:
    if not options.prompts:
        return {"per_class": options.per_class} if options.per_class else {"pictures": options.pictures}
    digest = hashlib.sha256("\n".join(entry.prompt for entry in entries).encode()).hexdigest()
    told = {"prompts": options.prompts, "prompts_sha256": digest}
    return {**told, "layout": options.layout, "per_prompt": options.per_prompt}


def settings_of(draw: Drawer, options: Any, entries: list[Entry]) -> dict[str, Any]:
    """How the pictures come about; what must not differ between two parts of one folder."""
    return {
        "pipeline": options.model,
        "weights_sha256": pipeline_hash(draw.pipeline),
        **what_to_draw(options, entries),
        "seed": options.seed,
        "dtype": options.dtype,
        **call_settings(draw.pipeline, draw.chosen),
        "versions": versions(),
    }


def pipeline_hash(pipeline: DiffusionPipeline) -> str:
    """The sha256 of the weights of all networks of a pipeline."""
    whole = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            whole.update(f"{name} {weights_hash(part)} ".encode())
    return whole.hexdigest()


def left_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of these settings told of its pictures, or {}; raises a ValueError where they were others."""
    before = load_settings(path) if path.is_file() else None
    if not any(file.suffix.lower() in SUFFIXES for file in path.parent.rglob("*")):
        return {}
    if before is None:
        raise ValueError(f"--output {str(path.parent)!r} holds pictures of others; choose a folder of its own.")
    for name, now in settings.items():
        if not same(name, was := before.get(name), now):
            told = f"{name}={shortened(repr(was), 120)}, and now {shortened(repr(now), 120)}"
            raise ValueError(f"--output holds pictures of another run ({told}); choose another folder.")
    return before


def same(name: str, was: Any, now: Any) -> bool:
    """Whether a setting says the same of two runs, however a folder or file is spelled."""
    if name == "pipeline":
        return Path(str(was)).resolve() == Path(now).resolve()
    return was == now or name == "prompts"  # whose sha256 stands beside it


def tell(path: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(path.parent, path.name, lambda draft: draft.write_text(text))


def parser() -> Parser:
    parser = Parser(prog="python -m localdit.evaluation generate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a pipeline")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", help="file, or folder, of prompts")
    what.add_argument("--per_class", type=counting_to(MOST_PICTURES), help="pictures of each class")
    what.add_argument("--pictures", type=counting_to(MOST_PICTURES), help="of a model without prompts and classes")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="lines", help="of the prompts and of the pictures")
    parser.add_argument("--per_prompt", type=counting_to(MOST_PICTURES), help="by default the benchmark's number, or 1")
    parser.add_argument("--output", required=True, help="folder of the pictures; those that are there stay")
    parser.add_argument("--height", type=counting_number)
    parser.add_argument("--width", type=counting_number)
    parser.add_argument("--num_inference_steps", type=counting_to(MOST_STEPS), help="by default the model's")
    parser.add_argument("--guidance_scale", type=float, help="by default the model's")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the first picture; the next count up")
    parser.add_argument("--batch_size", type=counting_number, default=8)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default=best_device())
    return parser


def main(arguments: list[str]) -> None:
    options = (command_line := parser()).parse_args(arguments)
    state, options.device = start_process(options.device)
    check_device(options.device, options.dtype)
    check_writable("--output", options.output)
    options.per_prompt = options.per_prompt or USUAL.get(options.layout, 1)
    entries = read_prompts(options.prompts, options.layout) if options.prompts else []
    draw = Drawer(load_pipeline(DiffusionPipeline, options.model, options.device, options.dtype), options)
    draw.pipeline.set_progress_bar_config(disable=True)
    check_kind(draw.pipeline, options)
    path, settings = Path(options.output) / FILE, settings_of(draw, options, entries)
    before = {"command": command_of(command_line, arguments)} | left_before(path, settings)
    if state.is_main_process:
        tell(path, {**before, **settings})
    state.wait_for_everyone()
    if options.prompts:
        draw_prompts(draw, entries, options, state)
    elif options.per_class:
        draw_classes(draw, options, state)
    else:
        draw_any(draw, options, state)
    spent = [(draw.seconds, draw.pictures, draw.peak_bytes())]
    spent = gather_object(spent) if state.num_processes > 1 else spent
    if not state.is_main_process:
        return
    if pictures := sum(pictures for _, pictures, _ in spent):
        seconds, memory = sum(seconds for seconds, *_ in spent) / pictures, max(memory for *_, memory in spent)
        measured = {"device": options.device, "seconds_per_image": seconds, "peak_memory_bytes": memory}
        # the cost of a whole folder says more than that of what was missing of it
        tell(path, {**settings, **measured, **before})
    print(options.output)
