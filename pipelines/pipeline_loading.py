"""A pipeline's folder: what is missing or damaged in it is named in one sentence, before anything is loaded."""

import inspect
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

CONFIG_FILES = {  # of each component
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "transformer": "config.json",
    "vae": "config.json",
}
WAY_OUT = "copy or download the folder anew, or save the pipeline again"
MODELS = ("text_encoder", "transformer", "vae")

PLAIN = re.compile(r"[^.]+\.(safetensors|bin)")  # a file of weights that are of no variant, such as .fp16.safetensors
HUB_ARGUMENTS = ("repo_id", "private", "token", "commit_message", "create_pr")  # of save_pretrained, for the push
REMOTE_CODE = "diffusers_modules"  # the package that diffusers runs a folder's own code in


class LocalDiTLoadingMixin:
    """Loading that explains itself and that brings every model in fp32 unless told otherwise."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a folder or a Hub id as `DiffusionPipeline.from_pretrained` does, with the same arguments.

        Without `dtype` all weights come in fp32, in whatever precision they were stored: diffusers' models do so
        anyway, but transformers' (the text encoder) would stay as stored, and half precision suits no CPU.

        Raises:
            ValueError: where there is no such folder, or a file of it is missing or damaged.
        """
        source = os.fspath(pretrained_model_name_or_path)
        check_source(source, given=kwargs)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(source, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs: Any):
        """Make this pipeline of another's components, as `DiffusionPipeline.from_pipe` does, in their own precision."""
        if kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None:
            return super().from_pipe(pipeline, **kwargs)
        parts: list[Any] = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        dtypes = [part.dtype for part in parts]
        own = [type(pipeline.transformer), cls]
        if all(kind.__module__.startswith(REMOTE_CODE) for kind in own):
            # where localdit is installed it has annotated this; diffusers takes no component of another class
            cls.__init__.__annotations__["transformer"] = type(pipeline.transformer)
        # it casts everything to one precision; through fp32 the others come back to the bit
        with _casting_quietly():
            made = super().from_pipe(pipeline, **kwargs, dtype=dtypes[0] if len(set(dtypes)) == 1 else torch.float32)
            for part, dtype in zip(parts, dtypes, strict=True):
                if part.dtype != dtype:
                    part.to(dtype)
        return made

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, so that the folder loads wherever this pipeline did.

        transformers loads a text encoder in the precision that its config.json names, so that names fp32, whatever the
        weights' own. Code that came with the weights goes with them. With `push_to_hub=True` it is pushed too, by the
        method of that name, to `repo_id` or else to a repository of the folder's name.
        """
        pushes = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "text_encoder" / "config.json"
        if config_file.is_file():
            config = json.loads(config_file.read_text())
            config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
        if any(type(part).__module__.startswith(REMOTE_CODE) for part in (self, self.transformer)):
            _save_remote_code(self, Path(save_directory))
        if pushes:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)


@contextmanager
def _casting_quietly():
    """Inside, diffusers does not warn that a cast may cost precision, as it does of any model and any cast."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def passes(record: logging.LogRecord) -> bool:
        return "kept in float32" not in str(record.msg)

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def _save_remote_code(pipeline, folder: Path) -> None:
    """Copy the code that came with a pipeline's weights into its folder, and let model_index.json name it as it was."""
    transformer = pipeline.transformer
    part = pipeline if transformer is None else transformer
    source = Path(part.config.get("_name_or_path") or os.devnull)
    source = source if transformer is None else source.parent  # the transformer's folder is in the pipeline's
    if source.resolve() != folder.resolve():
        pipelines, models = list(source.glob("pipeline*.py")), list(source.glob("transformer/localdit.py"))
        if not pipelines:  # the folder is gone, or was named from elsewhere; what runs is a copy of its code
            own = type(pipeline).__module__.startswith(REMOTE_CODE)
            running = Path(inspect.getfile(type(pipeline if own else transformer))).parent
            pipelines, models = list(running.glob("pipeline*.py")), list(running.glob("localdit.py"))
        for file in pipelines:
            shutil.copyfile(file, folder / file.name)
        for file in models if transformer is not None else ():
            shutil.copyfile(file, folder / "transformer" / file.name)
    if transformer is None:
        return
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index["transformer"][0] = "localdit"
    index_file.write_text(json.dumps(index, indent=2) + "\n")


def check_source(source: str, given: dict[str, Any]) -> None:
    """Raise a ValueError unless `source` is a complete pipeline folder or may be a Hub id.

    Args:
        source: a folder, or a Hub id as "name" or "owner/name".
        given: components that do not come from the folder, by name.
    """
    if os.path.isdir(source):
        check_folder(Path(source), given)
    elif os.path.exists(source):
        raise ValueError(f"{source!r} is a file; give the folder that holds model_index.json.")
    elif not _may_be_hub_id(source):
        raise ValueError(f"The folder {source!r} does not exist; give a pipeline's folder or a Hub id.")


def _may_be_hub_id(source: str) -> bool:
    """Whether `source` reads as "name" or "owner/name", where owner is no folder here."""
    owner, _, name = source.rpartition("/")
    plain = not source.startswith("/") and all(
        part and not part.startswith((".", "~")) for part in (owner or name, name)
    )
    return plain and not any(character in owner + name for character in "/\\:") and not (owner and os.path.isdir(owner))


def check_folder(folder: Path, given: dict[str, Any]) -> None:
    """Raise a ValueError that names the first file of a pipeline's folder that is missing or damaged."""
    index = _read_json(folder / "model_index.json")
    for name in ("transformer", "scheduler"):
        if name not in {**index, **given}:
            raise ValueError(f"{folder / 'model_index.json'} names no {name}; give a folder of a LocalDiT pipeline.")
    kind = index["transformer"][1] if "transformer" not in given else None
    if kind is not None and kind.startswith("PixArt"):
        raise ValueError(
            f"{folder} holds a {kind}; use LocalDiTTransformer2DModel.from_pixart; give it as transformer=."
        )
    _check_text_width(folder, given)
    for name, entry in index.items():
        if name in CONFIG_FILES and name not in given and isinstance(entry, list) and any(entry):
            _read_json(folder / name / CONFIG_FILES[name])
            for file in (folder / name).glob("*.json"):
                _read_json(file)
            if name in MODELS:
                _check_weights(folder / name, given.get("variant"))
            if name == "text_encoder":
                _check_text_encoder(folder / name, entry[1])


def _check_text_width(folder: Path, given: dict[str, Any]) -> None:
    files = [folder / name / "config.json" for name in ("text_encoder", "transformer")]
    if {"text_encoder", "transformer"} & {*given} or not all(file.is_file() for file in files):
        return
    width, channels = _read_json(files[0]).get("d_model"), _read_json(files[1]).get("caption_channels")
    if width is not None and channels != width:
        raise ValueError(
            f"{files[1]} has caption_channels={channels}, but the text encoder's states are {width} wide; {WAY_OUT}."
        )


def _check_weights(folder: Path, variant: str | None) -> None:
    weights = {file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)}
    if variant is None and weights and not any(PLAIN.fullmatch(file.name) for file in weights):
        raise ValueError(
            f"{folder} holds weights of a variant only ({min(weights).name}); give variant=, such as 'fp16'."
        )
    if not weights:
        raise ValueError(f"The weights of {folder} are missing (*.safetensors); {WAY_OUT}.")
    for index in folder.glob("*.index*.json"):
        shards = {folder / name for name in _read_json(index).get("weight_map", {}).values()}
        if shards & weights and shards - weights:  # an index none of whose shards is there belongs to another variant
            raise ValueError(f"{min(shards - weights)} is missing; {WAY_OUT}.")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); {WAY_OUT}.") from error


def _check_text_encoder(folder: Path, class_name: str) -> None:
    """Raise where a tensor is missing, which transformers would draw at random with a warning in the log."""
    text_encoder: Any = getattr(transformers, class_name, None)
    files = list(folder.glob("*.safetensors"))
    if text_encoder is None or not files:
        return
    held: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            held |= set(tensors.keys())
    with torch.device("meta"):
        model = text_encoder(text_encoder.config_class.from_pretrained(folder))
    held |= {own for other, own in (model.all_tied_weights_keys or {}).items() if other in held}
    missing = sorted(dict(model.named_parameters()).keys() - held)
    if missing:
        raise ValueError(f"The weights of {folder} lack {len(missing)} tensor(s) ({missing[0]}, ...); {WAY_OUT}.")


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {WAY_OUT}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); {WAY_OUT}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (not a JSON object); {WAY_OUT}.")
    return content
