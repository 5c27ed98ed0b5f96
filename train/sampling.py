"""Pictures drawn while a run goes on: a sheet to look at, and a fixed set to score."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from config import TrainConfig
from localdit.evaluation.extractors import load_extractor
from localdit.evaluation.features import features_of_images, load_features
from localdit.evaluation.scores import check_comparable, check_wanted, score_features
from train.components import Networks
from train.stopping import StopSignals


def rows_of(networks: Networks, prompts: list[str]) -> list[Any]:
    """What the model can be asked for: the prompts, or else its classes, or else nothing in particular."""
    if networks.tokenizer is not None:
        return prompts
    return list(range(networks.denoiser.transformer.config.num_classes or 1))


def draw(
    networks: Networks, config: TrainConfig, asked: list[Any], first_seed: int, device: torch.device, stop: StopSignals
) -> list[Image.Image]:
    """A picture for each prompt or class, from seeds that count up; unfinished ones where the run is told to stop."""
    networks.denoiser.eval()
    pipeline = networks.pipeline(config).to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(first_seed + index) for index in range(len(asked))],
        "callback_on_step_end": stop.interrupt_sampling,
    }
    if networks.tokenizer is not None:
        arguments |= {"prompt": asked, "negative_prompt": config.sample.negative_prompt}
    elif networks.denoiser.transformer.config.num_classes is not None:
        arguments["class_labels"] = asked
    else:
        arguments["batch_size"] = len(asked)
    images = pipeline(**arguments).images
    networks.denoiser.train()
    return images


def draw_sheet(networks: Networks, config: TrainConfig, path: Path, device: torch.device, stop: StopSignals) -> None:
    """Write `sample.num_images` pictures of each prompt or class, a row each, unless the run is told to stop."""
    sample = config.sample
    rows = rows_of(networks, sample.prompts)
    cells = [row for row in rows for _ in range(sample.num_images)]
    images = draw(networks, config, cells, sample.seed, device, stop) if cells else []
    if images and not stop.noted:
        path.parent.mkdir(exist_ok=True)
        make_image_grid(images, rows=len(rows), cols=sample.num_images).save(path)


class SampleScores:
    """Scores of pictures of always the same prompts or classes, from always the same seeds.

    Raises:
        ValueError: where the extractor, the reference or the prompts are missing, or do not fit.
    """

    def __init__(self, config: TrainConfig, networks: Networks, device: torch.device):
        self.config, self.device, scores = config, device, config.scores
        if scores.extractor is None or scores.reference is None:
            raise ValueError("scores.every needs scores.extractor and scores.reference; see docs/evaluation.md.")
        try:
            import torchmetrics  # noqa: F401
        except ImportError as error:
            raise ImportError("scores.every needs the package torchmetrics; pip install torchmetrics.") from error
        self.extractor = load_extractor(scores.extractor, str(device))
        self.reference = load_features(scores.reference)
        like = features_of_images([Image.new("RGB", (8, 8))], self.extractor)
        drawn = replace(like, values=like.values.repeat(scores.pictures, axis=0), pictures=self.reference.pictures)
        check_comparable(self.reference, drawn)
        check_wanted(list(scores.metrics), self.reference, drawn, force=False)
        self.prompts = self._read_prompts() if networks.tokenizer is not None else []

    def _read_prompts(self) -> list[str]:
        path = self.config.scores.prompts
        if path is None or not Path(path).is_file():
            raise ValueError(f"scores.prompts={path!r} is no file; give one with a prompt a line.")
        prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"scores.prompts={path!r} holds no prompt; write one a line.")
        return prompts

    def __call__(self, networks: Networks, stop: StopSignals) -> dict[str, float]:
        """The scores by the names of their metrics, or nothing where the run is told to stop."""
        scores, rows = self.config.scores, rows_of(networks, self.prompts)
        asked = [rows[index % len(rows)] for index in range(scores.pictures)]
        images: list[Image.Image] = []
        for first in range(0, len(asked), scores.batch_size):
            part = asked[first : first + scores.batch_size]
            images += draw(networks, self.config, part, self.config.sample.seed + first, self.device, stop)
            if stop.noted:
                return {}
        features = features_of_images(images, self.extractor)
        records = score_features(self.reference, features, scores.metrics, resamples=0)
        return {record["metric"]: record["value"] for record in records}
