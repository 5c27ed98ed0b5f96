"""What `train.precompute` wrote: shards of latents and text states, and the manifest that says of what they are."""

import json
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from config import DataConfig, TrainConfig
from localdit.data.labelled_images import Split
from train.buckets import BucketSource, Key, rows_of
from train.data import Condition
from train.frozen import TOKENIZER, digest, on_disk, text_folders
from train.objective import flow_sigmas

FORMAT = 1
MANIFEST = "manifest.json"
EMPTY_CAPTION = "empty_caption.safetensors"


def networks_digests(config: TrainConfig) -> dict[str, Any]:
    """What the frozen networks of a run are: hashes of their weights, and the length of a text."""
    config = on_disk(config)
    text: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "max_sequence_length": None}
    if config.text_encoder.pretrained is not None and config.text_encoder.frozen:
        tokenizer, text_encoder = text_folders(config.text_encoder.pretrained)
        text = {
            "tokenizer": digest(tokenizer, TOKENIZER),
            "text_encoder": digest(text_encoder),
            "max_sequence_length": config.text_encoder.max_sequence_length,
        }
    return {"vae": None if config.vae is None else digest(config.vae), **text}


def load_manifest(folder: str | None) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: where there is none, as `train.precompute` writes it at its end.
    """
    path = Path(str(folder)) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.path={folder!r} has no whole {MANIFEST} ({type(error).__name__}); let python -m train.precompute "
            "finish there."
        ) from error
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} is of format {manifest['format']}, and this version reads {FORMAT}; compute it anew.")
    return manifest


def check_precomputed(config: TrainConfig) -> None:
    """Raise a ValueError where a run's frozen networks are not those that its data were computed with."""
    wanted = networks_digests(config)
    settings = {"vae": "vae", "max_sequence_length": "text_encoder.max_sequence_length"}
    for path in [part.path for part in (config.data, *config.mixture, *config.stages)]:
        found = load_manifest(path)["networks"]
        for name, value in wanted.items():
            if value != found[name]:
                setting = settings.get(name, "text_encoder.pretrained")
                raise ValueError(
                    f"{path} was computed with another {name} ({_short(found[name])}) than {setting} says "
                    f"({_short(value)}); set the one it was computed with, or compute it anew."
                )


def start_sigmas(data: DataConfig) -> list[float]:
    """The shares of noise that the steps of few start at, in precomputed data that hold them."""
    return (load_manifest(data.path).get("starts") or []) if data.name == "precomputed" else []


def holds_starts(config: TrainConfig) -> bool:
    """Whether a run's data are the steps that few steps are learned from, so that it needs no teacher beside it.

    Raises:
        ValueError: where they are steps of another schedule than the run's, or only some of the data are, or the run
            would drop the captions that the teacher was guided by.
    """
    stages = [replace(config.data, path=stage.path) for stage in config.stages if stage.path is not None]
    sources = (config.data, *config.mixture, *stages)
    found = [start_sigmas(data) for data in sources]
    if not any(found):
        return False
    paths = [data.path for data in sources]
    if not all(found):
        raise ValueError(f"Of {paths} some hold the starts of few steps and some do not; train on one kind at a time.")
    if config.few_step.method != "progressive":
        raise ValueError(
            f"{paths} hold the starts of few steps, for which few_step.method={config.few_step.method!r} has no use; "
            "name pictures with captions, or latents without starts."
        )
    if config.few_step.teacher is None or config.objective.condition_dropout:
        raise ValueError(
            f"{paths} hold the starts of few steps, guided by their captions; set few_step.teacher to whose steps they "
            "are, and objective.condition_dropout to 0."
        )
    sigmas = flow_sigmas(config.objective, config.few_step.steps)[:-1].tolist()
    for path, starts in zip(paths, found, strict=True):
        if len(starts) != len(sigmas) or not np.allclose(starts, sigmas, atol=1e-4):
            raise ValueError(
                f"{path} holds steps that start at noise of {np.round(starts, 3).tolist()}, but few_step.steps and "
                f"objective.flow_shift make it {np.round(sigmas, 3).tolist()}; set them to what it was computed with."
            )
    return True


def _short(value: Any) -> str:
    return f"sha256 {value[:12]}" if isinstance(value, str) else str(value)


class PrecomputedSource(BucketSource):
    """Rows of the shards. An item has "latents" [C, h, w], with "starts" where few steps are
    learned (both then [K, C, h, w]), and "text" [L, D] with its "mask" [L], or "label".

    Attributes:
        empty_text: the states [L, D] and the mask [L] of the empty caption, for models with captions.
    """

    def __init__(self, config: DataConfig, seed: int, condition: Condition | None, split: Split = "train"):
        self.folder = Path(str(config.path))
        self.manifest = load_manifest(config.path)
        if condition is not None and condition != self.manifest["condition"]:
            raise ValueError(
                f"data.path={config.path!r} holds {self.manifest['condition'] or 'no condition'}s, but the model takes "
                f"{condition}s; compute them with that model's settings."
            )
        self.channels, self.condition = self.manifest["channels"], condition
        self.classes = self.manifest["classes"] if condition == "label" else None
        self.shards = self.manifest["shards"]
        self.opened: dict[int, Any] = {}  # shards by number; they are mapped into memory, not read
        self.names: dict[int, list[str]] = {}
        self.ends = list(accumulate(shard["pictures"] for shard in self.shards))
        rows = rows_of(split, list(range(self.ends[-1])), self.name, config.held_out)
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(self.shards[bisect_right(self.ends, row)]["bucket"], []).append(row)
        sizes = [(height, width) for height, width in self.manifest["sizes"]]
        super().__init__(sizes, {bucket: np.array(members[bucket]) for bucket in sorted(members)}, seed)
        self.empty_text = self._empty_text() if condition == "caption" else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}  # a worker opens its own

    def shard(self, number: int) -> Any:
        """An opened shard.

        Raises:
            ValueError: where the file is not there or not whole.
        """
        if number not in self.opened:
            path = self.folder / self.shards[number]["file"]
            try:
                self.opened[number] = safe_open(path, framework="pt")
            except Exception as error:  # safetensors has an error of its own for each way to be broken
                raise ValueError(f"{path} cannot be read ({error}); remove it and precompute anew.") from error
        return self.opened[number]

    def place(self, row: int) -> tuple[int, int]:
        """Number of the shard of a row, and the row's place in it."""
        number = bisect_right(self.ends, row)
        return number, row - (self.ends[number - 1] if number else 0)

    def name(self, row: int) -> str:
        number, place = self.place(row)
        if number not in self.names:
            self.names[number] = json.loads(self.shard(number).metadata()["names"])
        return self.names[number][place]

    def __getitem__(self, key: Key) -> dict:
        row, _ = key
        number, place = self.place(row)
        shard = self.shard(number)
        item: dict = {"name": self.name(row), "latents": shard.get_slice("latents")[place].float()}
        if self.manifest.get("starts"):
            item["starts"] = shard.get_slice("starts")[place].float()
        if self.condition == "label":
            item["label"] = int(shard.get_slice("labels")[place])
        if self.condition == "caption":
            first = int(shard.get_slice("text_ends")[place - 1]) if place else 0
            states = shard.get_slice("text")[first : int(shard.get_slice("text_ends")[place])]
            item["text"], item["mask"] = self._padded(states)
        return item

    def _padded(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [n, D] with zeros behind them up to the length of a text, and the mask of the true ones."""
        length = self.manifest["networks"]["max_sequence_length"]
        padded = torch.zeros(length, states.shape[1])
        padded[: len(states)] = states
        return padded, (torch.arange(length) < len(states)).long()

    def _empty_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        with safe_open(self.folder / EMPTY_CAPTION, framework="pt") as file:
            return self._padded(file.get_tensor("text"))
