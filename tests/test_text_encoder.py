"""The small text encoder: its tokenizer, its lessons, a frozen one in a run."""

import json
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file

from config import (
    DataConfig,
    TextEncoderConfig,
    TextPretrainingConfig,
)
from localdit.data import digit_scenes
from tests.training import tiny_config
from train.components import build_text_encoder, build_tokenizer
from train.datasets import DigitScenes, build_dataset
from train.text_encoder import CaptionParser, parse_targets
from train.text_encoder import train as train_text_encoder
from train.trainer import Trainer


def test_the_tokenizer_knows_every_word_of_every_caption():
    tokenizer = build_tokenizer(DigitScenes(DataConfig(), 0).words(), 16)
    rng = np.random.default_rng(0)
    captions = [digit_scenes.sample_scene(rng).caption for _ in range(300)]
    ids = tokenizer(captions).input_ids
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert max(map(len, ids)) <= 16
    assert tokenizer("A RED seven!").input_ids == tokenizer("a red seven").input_ids
    assert tokenizer.decode(tokenizer("a red seven").input_ids, skip_special_tokens=True) == "a red seven"


def test_the_words_of_a_caption_know_their_digit_and_its_place():
    targets = parse_targets(digit_scenes.parse_caption("a green five below a magenta two on a gray background"), 12)
    five, two = [1, 5, 4, 2], [5, 2, 3, 2]  # colour, digit, place (bottom, top), background
    blank = [-100, -100, -100, 2]
    assert targets.tolist() == [five, five, five, blank, two, two, two, *[blank] * 4, [-100] * 4]
    alone = parse_targets(digit_scenes.parse_caption("a red seven on a black background"), 7)
    assert alone.tolist() == [[0, 7, 0, 0]] * 3 + [[-100, -100, -100, 0]] * 4


def test_the_words_of_a_relation_of_several_words_belong_to_no_digit():
    targets = parse_targets(digit_scenes.parse_caption("a red one to the left of a blue two on a black background"), 14)
    assert (targets[:3, 2] == 1).all() and (targets[7:10, 2] == 2).all()  # left, right
    assert (targets[3:7, :3] == -100).all() and (targets[10:, :3] == -100).all()


def test_a_caption_counts_as_parsed_only_without_a_mistake():
    scene = digit_scenes.parse_caption("a red seven on a black background")
    parser = CaptionParser(build_text_encoder(TextEncoderConfig(), 40), 128)
    ids, mask = torch.randint(40, (2, 7)), torch.ones(2, 7)
    targets = torch.from_numpy(np.stack([parse_targets(scene, 7)] * 2))
    guesses = torch.stack([score.argmax(-1) for score in parser(ids, mask)], dim=-1)
    right = torch.where(targets == -100, targets, guesses)
    assert parser.accuracy(ids, mask, right) == 1
    right[1, 0, 1] = (right[1, 0, 1] + 1) % 10
    assert parser.accuracy(ids, mask, right) == 0.5


def test_a_frozen_text_encoder_that_was_trained_before_is_loaded_and_stays_as_it_is(tmp_path, capsys):
    text = tiny_config(tmp_path).text_encoder
    pretraining = TextPretrainingConfig(
        str(tmp_path / "text"), text_encoder=text, max_steps=60, batch_size=16, learning_rate=1e-2, log_every=20
    )
    train_text_encoder(pretraining)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "text" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert "captions of held-out combinations" in capsys.readouterr().out

    given = TextEncoderConfig(pretrained=str(tmp_path / "text"), frozen=True, max_sequence_length=16)
    trainer = Trainer(tiny_config(tmp_path / "run", text_encoder=given))
    trainer.train()
    trained = load_file(tmp_path / "text" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "pipeline" / "text_encoder" / "model.safetensors")
    assert trained.keys() == saved.keys() and all(torch.equal(trained[name], saved[name]) for name in trained)
    start = Trainer(tiny_config(tmp_path / "start", text_encoder=given)).denoiser.transformer
    assert not torch.equal(trainer.denoiser.transformer.proj_out.weight, start.proj_out.weight)


def test_a_frozen_text_encoder_stays_without_dropout(tmp_path):
    config = tiny_config(tmp_path)
    trainer = Trainer(replace(config, text_encoder=replace(config.text_encoder, frozen=True)))
    trainer.denoiser.train()
    assert trainer.denoiser.transformer.training and not trainer.denoiser.text_encoder.training
    assert len(trainer.parameters) == len(list(trainer.denoiser.transformer.parameters()))


def test_words_beside_punctuation_are_known(picture_folder):
    words = build_dataset(DataConfig(name="imagefolder", path=str(picture_folder)), 0, "caption").words()
    tokenizer = build_tokenizer([*words, "(big)."], 16)
    ids = tokenizer("A cat, number 2; a dog (big).").input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) == 8
