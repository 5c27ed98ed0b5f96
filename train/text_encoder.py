"""Trains a small T5 encoder to parse captions: python -m train.text_encoder --config RECIPE.

A T5 trained only through the transformer's loss stayed a bag of words: which colour goes with which digit, and which
digit lies where, hardly changes that loss until it is known. Told directly, it learns that in a minute.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from config import DataConfig, TextPretrainingConfig
from localdit.data.digit_scenes import BACKGROUNDS, COLOURS, DIGITS, Scene, sample_scene
from train.command_line import parse, run
from train.components import build_text_encoder, build_tokenizer
from train.datasets import DigitScenes
from train.settings import check_new_folder, check_ranges

PLACES = ("alone", "left", "right", "top", "bottom")
PLACE_PAIRS = {
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
NUM_CLASSES = (len(COLOURS), len(DIGITS), len(PLACES), len(BACKGROUNDS))
LONGEST_CAPTION = 15  # "a red one to the left of a blue two on a gray background" and </s>
UNASKED = -100  # what cross_entropy passes over


def parse_targets(scene: Scene, length: int) -> np.ndarray:
    """What each word of a scene's caption should know, int64 [length, 4], `UNASKED` where it need not.

    The words of a digit ("a red seven") know its colour, its digit and its place; every word knows the background.
    """
    targets = np.full((length, len(NUM_CLASSES)), UNASKED, np.int64)
    targets[: len(scene.caption.split()), 3] = list(BACKGROUNDS).index(scene.background)
    places = ("alone",) if scene.relation is None else PLACE_PAIRS[scene.relation]
    start = 0
    for glyph, place in zip(scene.glyphs, places, strict=True):
        words = len(str(glyph).split())
        targets[start : start + words, :3] = list(COLOURS).index(glyph.colour), glyph.digit, PLACES.index(place)
        start += words + len((scene.relation or "").split())
    return targets


class CaptionParser(nn.Module):
    """A text encoder with a linear layer that reads from each of its states what `parse_targets` asks."""

    def __init__(self, text_encoder: nn.Module, width: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.Linear(width, sum(NUM_CLASSES))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores [B, L, classes] for colour, digit, place and background."""
        states = self.text_encoder(input_ids, attention_mask=attention_mask)[0]
        return self.heads(states).split(NUM_CLASSES, dim=-1)

    def loss(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the four cross-entropies."""
        scores = self(input_ids, attention_mask)
        losses = [
            F.cross_entropy(score.flatten(0, 1), targets[..., index].flatten(), ignore_index=UNASKED)
            for index, score in enumerate(scores)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor) -> float:
        """The share of captions that are read without a single mistake."""
        guesses = torch.stack([score.argmax(-1) for score in self(input_ids, attention_mask)], dim=-1)
        right = (guesses == targets) | (targets == UNASKED)
        return right.all(dim=(1, 2)).float().mean().item()


def train(config: TextPretrainingConfig) -> None:
    """Run from the first step to the last, then save encoder and tokenizer to `output_dir`."""
    check_ranges(config)
    check_new_folder(config.output_dir)
    if config.text_encoder.pretrained is not None or config.text_encoder.frozen:
        raise ValueError(
            "text_encoder.pretrained and text_encoder.frozen have no place here: a new encoder is trained."
        )
    if config.text_encoder.max_sequence_length < LONGEST_CAPTION:
        raise ValueError(
            f"text_encoder.max_sequence_length={config.text_encoder.max_sequence_length} would cut captions; "
            f"choose at least {LONGEST_CAPTION}."
        )
    set_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    length = config.text_encoder.max_sequence_length
    tokenizer = build_tokenizer(DigitScenes(DataConfig(), config.seed).words(), length)
    text_encoder = build_text_encoder(config.text_encoder, len(tokenizer))
    parser = CaptionParser(text_encoder, config.text_encoder.d_model)
    optimizer = torch.optim.AdamW(parser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.max_steps // 10, num_training_steps=config.max_steps
    )

    def batch(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = tokenizer([scene.caption for scene in scenes], padding="max_length", return_tensors="pt")
        targets = np.stack([parse_targets(scene, length) for scene in scenes])
        return tokens.input_ids, tokens.attention_mask, torch.from_numpy(targets)

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    progress = tqdm(range(1, config.max_steps + 1), unit="step", dynamic_ncols=True)
    for step in progress:
        loss = parser.loss(*batch([sample_scene(rng) for _ in range(config.batch_size)]))
        loss.backward()
        nn.utils.clip_grad_norm_(parser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % config.log_every == 0 or step == config.max_steps:
            progress.set_postfix_str(f"loss {loss.item():.5f}")
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "time": time.time(), "loss": loss.item()}) + "\n")
    held_out = parser.accuracy(*batch([sample_scene(rng, held_out=True) for _ in range(1000)]))
    print(f"{held_out:.1%} of 1,000 captions of held-out combinations are parsed without a mistake.")
    text_encoder.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run("train.text_encoder", lambda: train(parse(TextPretrainingConfig, "train.text_encoder")))
