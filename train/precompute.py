"""Computes once what the frozen networks of a run make of its pictures and captions, for runs without these networks.

python -m train.precompute --run train/recipes/digit_scenes.yaml --pictures 20000 --output_dir output/scenes_latents

Several processes, on one machine or many that share the folder, share the work when started by accelerate launch. What
was cut short goes on where it was. Train with --data.name precomputed --data.path FOLDER.
"""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from config import PrecomputeConfig
from train.command_line import parse, run
from train.components import condition_of, model_settings
from train.data import Source
from train.datasets import build_dataset
from train.few_step_starts import StepEncoder
from train.frozen import encode_pixels, load_text_encoder, load_vae, on_disk
from train.objective import flow_sigmas
from train.precomputed import EMPTY_CAPTION, FORMAT, MANIFEST, networks_digests
from train.settings import as_plain, check_output_dir, check_ranges
from train.unreadable import UnreadablePictures

PATIENCE = timedelta(days=7)  # of processes that are done before the others
PLAN = "plan.json"  # what the folder is being filled with, so that nothing else is added to it


class Encoder:
    """The frozen networks, on batches of a source."""

    def __init__(self, config: PrecomputeConfig, accelerator: Accelerator, source: Source, needs_text: bool):
        frozen = on_disk(config.run)
        self.accelerator = accelerator
        self.dtype = getattr(torch, config.dtype)
        self.vae = load_vae(frozen.vae)
        if self.vae is not None:
            self.vae.to(accelerator.device)
        self.tokenizer, self.text_encoder = load_text_encoder(frozen.text_encoder) if needs_text else (None, None)
        if self.text_encoder is not None:
            self.text_encoder.to(accelerator.device).eval()
        self.steps = StepEncoder(config, accelerator, source) if config.few_step_starts else None

    def pictures(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """The "latents" of a batch; where few steps are to be learned, those that they predict, and their "starts"."""
        if self.steps is None:
            return {"latents": self.latents(torch.stack([item["image"] for item in batch]))}
        starts, pictures = self.steps(default_collate(batch))
        return {"starts": starts.to(self.dtype), "latents": pictures.to(self.dtype)}

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the transformer will work on, [B, C, h, w]."""
        if self.vae is None:
            return pixels.to(self.dtype)
        with self.accelerator.autocast():
            return encode_pixels(self.vae, pixels.to(self.accelerator.device)).to(self.dtype).cpu()

    @torch.no_grad()
    def text(self, captions: list[str]) -> list[torch.Tensor]:
        """The states [n, D] of each caption's own tokens."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.accelerator.device)
        with self.accelerator.autocast():
            states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = zip(states.to(self.dtype).cpu(), tokens.attention_mask.sum(dim=1).tolist(), strict=True)
        return [row[:length].clone() for row, length in kept]


def precompute(config: PrecomputeConfig) -> dict[str, Any]:
    """Write the shards that are missing in `config.output_dir`, then the manifest, which is returned.

    Raises:
        ValueError: where the folder is being filled with something else, or the run's networks are not frozen.
    """
    check_ranges(config)
    check_output_dir(config.output_dir)
    if config.run.mixture or config.run.stages or config.run.data.recoloured:
        raise ValueError(
            "run.mixture, run.stages and run.data.recoloured cannot be precomputed together; precompute each source by "
            "itself, in one size, with recoloured at 0."
        )
    waits = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision, kwargs_handlers=[waits])
    condition = condition_of(model_settings(config.run))
    source = build_dataset(config.run.data, config.run.seed, condition)
    batches = [
        (bucket, keys[start : start + config.shard_size])
        for bucket, keys in source.every(config.pictures).items()
        for start in range(0, len(keys), config.shard_size)
    ]
    folder = Path(config.output_dir)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "networks": networks_digests(config.run),
        "condition": condition,
        "dtype": config.dtype,
        "channels": source.channels,
        "classes": source.classes,
        "sizes": source.sizes,
        "data": as_plain(config.run.data),
        "seed": config.run.seed,
        "starts": sigmas_to_keep(config),
        "few_step": {**as_plain(config.run.few_step), "student": config.student} if config.few_step_starts else None,
        "shard_pictures": [len(keys) for _, keys in batches],
    }
    mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
    missing = [number for number in mine if not (folder / file_name(number)).is_file()]
    # the empty caption counts as missing too, or a run killed after the last shard would never get it
    needs_empty = condition == "caption" and accelerator.is_main_process and not (folder / EMPTY_CAPTION).is_file()
    encode = None
    if missing or needs_empty:
        encode = Encoder(config, accelerator, source, needs_text=condition == "caption")
    if accelerator.is_main_process:  # when nothing is left to be refused
        claim(folder, json.loads(json.dumps(manifest)))
    accelerator.wait_for_everyone()
    if encode is not None:
        unreadable = UnreadablePictures(folder, config.run.data.max_unreadable)
        progress = tqdm(missing, unit="shard", dynamic_ncols=True, disable=not accelerator.is_local_main_process)
        for number in progress:
            write_shard(folder / file_name(number), source, batches[number][1], config, encode, unreadable)
        if needs_empty:
            write(folder / EMPTY_CAPTION, {"text": encode.text([""])[0]}, {})
    accelerator.wait_for_everyone()
    manifest["shards"] = list(described(folder, [bucket for bucket, _ in batches]))
    if accelerator.is_main_process:
        finish(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    accelerator.wait_for_everyone()
    return manifest


def sigmas_to_keep(config: PrecomputeConfig) -> list[float] | None:
    """The shares of noise that the steps of few start at, where these are kept.

    Raises:
        ValueError: where it is not said whose steps they are, or a student is without a use.
    """
    if config.few_step_starts:
        if config.run.few_step.teacher is None:
            raise ValueError("few_step_starts needs run.few_step.teacher, the pipeline whose steps are to be learned.")
        return flow_sigmas(config.run.objective, config.run.few_step.steps)[:-1].tolist()
    if config.student is not None:
        raise ValueError(f"student={config.student!r} leads to the starts of few steps; set few_step_starts to true.")
    return None


def file_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what a folder is being filled with; raises a ValueError where that is something else already."""
    path = folder / PLAN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if other := sorted(name for name in plan if plan[name] != before.get(name)):
            raise ValueError(
                f"output_dir={str(folder)!r} is being filled with other {' and '.join(other)}; choose another folder, "
                "or go on with the settings before."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    finish(path, (json.dumps(plan, indent=2) + "\n").encode())


def write_shard(
    path: Path, source: Source, keys: list, config: PrecomputeConfig, encode: Encoder, unreadable: UnreadablePictures
) -> None:
    """Encode the pictures of some keys, all of one size, and write them as one file."""
    names, pictures, labels, texts = [], [], [], []
    for batch in loaded(source, keys, config):
        unreadable.note([item.get("unreadable", "") for item in batch])
        batch = [item for item in batch if not item.get("unreadable")]  # another picture stands in for these
        if not batch:
            continue
        names += [item["name"] for item in batch]
        pictures.append(encode.pictures(batch))
        if encode.text_encoder is not None:
            texts += encode.text([item["caption"] for item in batch])
        labels += [item["label"] for item in batch if "label" in item]
    tensors = {"latents": torch.empty(0)}
    for name in pictures[0] if pictures else ():
        tensors[name] = torch.cat([part[name] for part in pictures])
    if texts:
        tensors["text"] = torch.cat(texts)
        tensors["text_ends"] = torch.tensor([len(states) for states in texts]).cumsum(0)
    if labels:
        tensors["labels"] = torch.tensor(labels)
    write(path, tensors, {"names": json.dumps(names)})


def loaded(source: Source, keys: list, config: PrecomputeConfig) -> Iterator[list[dict]]:
    """The items of some keys, in batches."""
    size = config.run.batch_size
    parts = [keys[start : start + size] for start in range(0, len(keys), size)]
    workers = config.run.data.num_workers
    yield from DataLoader(source, batch_sampler=parts, num_workers=workers, collate_fn=list)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, which has its name when it is whole."""
    draft = path.with_suffix(f".{os.getpid()}.draft")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata)
    draft.replace(path)


def finish(path: Path, content: bytes) -> None:
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_bytes(content)
    draft.replace(path)


def described(folder: Path, buckets: list[int]) -> Iterator[dict[str, Any]]:
    """The manifest's line of each shard that holds a picture."""
    for number, bucket in enumerate(buckets):
        with safe_open(folder / file_name(number), framework="pt") as shard:
            pictures = len(json.loads(shard.metadata()["names"]))
        if pictures:
            yield {"file": file_name(number), "bucket": bucket, "pictures": pictures}


def main() -> None:
    config = parse(PrecomputeConfig, "train.precompute")
    manifest = precompute(config)
    pictures = sum(shard["pictures"] for shard in manifest["shards"])
    if PartialState().is_main_process:
        print(f"{pictures} pictures; train on them by --data.name precomputed --data.path {config.output_dir}")


if __name__ == "__main__":
    run("train.precompute", main)
