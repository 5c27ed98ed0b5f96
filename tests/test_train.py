"""The trainer: its data order, its checkpoints, its command line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from config import (
    AutoencoderConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextEncoderConfig,
    TextPretrainingConfig,
    TrainConfig,
)
from localdit import LocalDiTClassPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.data import digit_scenes
from train.autoencoder import Reconstruction, build_autoencoder, standardize
from train.autoencoder import train as train_autoencoder
from train.command_line import parse
from train.compare_mixers import ComparisonConfig
from train.components import build_text_encoder, build_tokenizer
from train.data import MicroStepSampler
from train.datasets import DigitScenes, ImageFolder
from train.text_encoder import CaptionParser, parse_targets
from train.text_encoder import train as train_text_encoder
from train.trainer import Trainer, build_optimizers

RECIPES = sorted(Path("train/recipes").glob("*.yaml"))


def tiny_config(folder: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        output_dir=str(folder),
        model=ModelConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=3,
            num_layers=2,
            sample_size=64,
            patch_size=16,
            caption_channels=16,
            use_additional_conditions=False,
            mixer_options={"window": {"window_size": 3, "global_context": 2}},
        ),
        text_encoder=TextEncoderConfig(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, max_sequence_length=16),
        data=DataConfig(num_workers=0),
        objective=ObjectiveConfig(prediction_type="sample"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=2, ema_decay=0.9),
        sample=SampleConfig(prompt=["a red seven on a black background"], num_inference_steps=2, num_images=2),
        batch_size=4,
        max_steps=6,
        log_every=2,
        sample_every=4,
        checkpoint_every=3,
        report_to=(),
    )
    return replace(config, **changes)


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    for index, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((70 + number, 90, 3), 100 * index + 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text(f"A {name}, number {number}.")
    return folder


def test_every_position_is_seen_once_over_micro_steps_and_ranks():
    samplers = [MicroStepSampler(batch_size=4, first=0, last=10, rank=rank, world_size=3) for rank in range(3)]
    seen = [position for sampler in samplers for batch in sampler for position in batch]
    assert sorted(seen) == list(range(10 * 3 * 4))
    assert all(len(sampler) == 10 for sampler in samplers)


def test_resuming_continues_the_order_where_it_was():
    whole = list(MicroStepSampler(4, first=0, last=10, rank=1, world_size=2))
    assert list(MicroStepSampler(4, first=6, last=10, rank=1, world_size=2)) == whole[6:]


def test_digit_scenes_depend_on_seed_and_position_only():
    first, again = (DigitScenes(DataConfig(), seed=3)[7] for _ in range(2))
    other = DigitScenes(DataConfig(), seed=4)[7]
    assert torch.equal(first["image"], again["image"]) and first["caption"] == again["caption"]
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].min() >= -1 and first["image"].max() <= 1


def test_recoloured_scenes_come_with_a_source_of_the_same_shapes():
    data = DigitScenes(DataConfig(recoloured=0.5, one_digit=1.0), seed=0)
    pairs = [data[position] for position in range(60)]
    changed = [pair for pair in pairs if not torch.equal(pair["image"], pair["source"])]
    assert 15 < len(changed) < 45
    assert all(" above " not in pair["caption"] and " of " not in pair["caption"] for pair in pairs)
    for pair in changed:
        # the ground is grey, so a pixel is of the ground exactly if it has the colour of the corner
        grounds = [(picture - picture[:, :1, :1]).abs().amax(0) < 0.01 for picture in (pair["image"], pair["source"])]
        assert (grounds[0] != grounds[1]).float().mean() < 0.01


def test_only_recoloured_pictures_that_keep_their_caption_start_from_their_source(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, data=DataConfig(num_workers=0, recoloured=0.5)))
    image = torch.rand(3, 3, 64, 64)
    batch = {"image": image, "source": torch.cat([image[:1], torch.rand(2, 3, 64, 64)])}
    source = trainer._source(batch, image, dropped=torch.tensor([False, True, False]))
    assert torch.equal(source[:2], image[:2]) and torch.equal(source[2], batch["source"][2])


def test_the_tokenizer_knows_every_word_of_every_caption():
    tokenizer = build_tokenizer(DigitScenes(DataConfig(), 0).words(), 16)
    rng = np.random.default_rng(0)
    captions = [digit_scenes.sample_scene(rng).caption for _ in range(300)]
    ids = tokenizer(captions).input_ids
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert max(map(len, ids)) <= 16
    assert tokenizer("A RED seven!").input_ids == tokenizer("a red seven").input_ids
    assert tokenizer.decode(tokenizer("a red seven").input_ids, skip_special_tokens=True) == "a red seven"


def test_image_folder_shows_every_picture_once_an_epoch_in_another_order(picture_folder):
    data = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder), resolution=32), 0, condition="caption")
    epochs = [[data[epoch * 6 + index]["caption"] for index in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data[0]["image"].shape == (3, 32, 32)


def test_image_folder_of_classes_labels_by_folder(picture_folder):
    data = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder), resolution=32), 0, condition="label")
    assert data.classes == ["cat", "dog"]
    assert sorted(data[index]["label"] for index in range(6)) == [0, 0, 0, 1, 1, 1]


def test_training_lowers_the_loss_and_leaves_a_pipeline(tmp_path):
    config = tiny_config(tmp_path, max_steps=40, batch_size=8, checkpoint_every=40, sample_every=40, log_every=5)
    Trainer(config).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert Image.open(tmp_path / "samples" / "00000040.png").size == (2 * 64, 64)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red seven on a black background").images[0].size == (64, 64)
    assert pipeline.config.call_defaults == {"num_inference_steps": 2, "max_sequence_length": 16}


def test_the_saved_pipeline_holds_the_averaged_weights(tmp_path):
    trainer = Trainer(tiny_config(tmp_path))
    trainer.train()
    saved = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [name for name, _ in trainer.denoiser.named_parameters()]
    averaged = dict(zip(names, trainer.ema.shadow_params, strict=True))
    for name, tensor in saved.items():
        assert torch.equal(tensor, averaged[f"transformer.{name}"])
    live = trainer.denoiser.transformer.proj_out.weight
    assert not torch.equal(saved["proj_out.weight"], live)


@pytest.mark.parametrize(("num_workers", "optimizer"), [(0, "adamw"), (1, "adamw"), (0, "muon")])
def test_an_interrupted_run_ends_in_the_same_weights_to_the_bit(tmp_path, num_workers, optimizer):
    config = tiny_config(
        tmp_path / "whole",
        data=DataConfig(num_workers=num_workers),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=2e-3, warmup_steps=2, ema_decay=0.9),
        gradient_accumulation_steps=2,
        sample_every=100,
    )
    whole = Trainer(config)
    whole.train()
    # "killed" after step 3: the newest checkpoint is the one of step 3
    Trainer(replace(config, output_dir=str(tmp_path / "parts"), max_steps=3)).train()
    resumed = Trainer(replace(config, output_dir=str(tmp_path / "parts"), resume="latest"))
    assert resumed.first_step == 3
    resumed.train()
    for mine, theirs in zip(resumed.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def autoencoder_config(tmp_path) -> AutoencoderConfig:
    return AutoencoderConfig(
        output_dir=str(tmp_path / "vae"),
        data=DataConfig(num_workers=0),
        block_out_channels=(8, 8),
        batch_size=4,
        max_steps=3,
        log_every=1,
    )


def test_the_autoencoder_loss_is_the_negative_evidence_bound(autoencoder_config):
    vae = build_autoencoder(autoencoder_config, channels=3)
    pixels, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    loss, error = Reconstruction(vae, pixel_std=0.1)(pixels, noise)
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    reconstruction = (decoded - pixels).square().sum(dim=(1, 2, 3)) / (2 * 0.1**2)
    bound = (reconstruction + kl).mean()
    torch.testing.assert_close(loss * pixels[0].numel() / (2 * 0.1**2), bound, rtol=1e-4, atol=0)
    torch.testing.assert_close(error, (decoded - pixels).square().mean())


def test_standardized_latents_have_mean_zero_and_deviation_one(autoencoder_config):
    vae, pixels = build_autoencoder(autoencoder_config, channels=3), torch.rand(4, 3, 16, 16)
    standardize(vae, pixels)
    latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(latents.mean()) < 1e-4 and abs(latents.std() - 1) < 1e-4


def test_a_transformer_trains_on_the_latents_of_a_trained_autoencoder(tmp_path, autoencoder_config):
    train_autoencoder(autoencoder_config)
    assert len((tmp_path / "vae" / "log.jsonl").read_text().splitlines()) == 3
    tiny = tiny_config(tmp_path / "run")
    model = replace(tiny.model, in_channels=4, sample_size=32, patch_size=8)
    Trainer(replace(tiny, vae=str(tmp_path / "vae"), model=model, save_dtype="float16")).train()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor != 1
    assert pipeline("a red seven on a black background").images[0].size == (64, 64)


def test_a_run_can_start_from_the_weights_of_a_pipeline(tmp_path):
    first = Trainer(tiny_config(tmp_path / "first"))
    first.train()
    config = tiny_config(tmp_path / "second", pretrained=str(tmp_path / "first" / "pipeline"), model=ModelConfig())
    second = Trainer(config)
    for mine, theirs in zip(second.denoiser.parameters(), first.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)
    second.train()
    assert DiffusionPipeline.from_pretrained(tmp_path / "second" / "pipeline").transformer.config.num_layers == 2


@pytest.mark.parametrize(("num_classes", "name"), [(10, "sklearn_digits"), (None, "photo_patches")])
def test_a_model_without_text_trains_on_classes_or_on_nothing_and_can_be_tuned(tmp_path, num_classes, name):
    tiny = tiny_config(tmp_path / "first")
    channels = 1 if num_classes else 3
    model = replace(
        tiny.model, in_channels=channels, sample_size=16, patch_size=4, caption_channels=None, num_classes=num_classes
    )
    config = replace(tiny, model=model, data=DataConfig(name=name, resolution=16, num_workers=0))
    Trainer(config).train()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "first" / "pipeline")
    assert isinstance(pipeline, LocalDiTClassPipeline)
    assert pipeline.labels.get("seven") == (7 if num_classes else None)
    sheet = Image.open(next((tmp_path / "first" / "samples").iterdir()))
    assert sheet.size == (2 * 16, 16 * (num_classes or 1))

    again = replace(
        config, output_dir=str(tmp_path / "tuned"), pretrained=str(tmp_path / "first" / "pipeline"), model=ModelConfig()
    )
    trainer = Trainer(again)
    assert torch.equal(trainer.denoiser.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)
    trainer.train()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, optimizer=OptimizerConfig(name="muon", muon_learning_rate=0.03)))
    adamw, muon = build_optimizers(trainer.denoiser, trainer.config.optimizer)
    assert isinstance(muon, torch.optim.Muon) and muon.param_groups[0]["lr"] == 0.03
    names = {id(parameter): name for name, parameter in trainer.denoiser.named_parameters()}
    by_muon = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    by_adamw = {names[id(parameter)] for group in adamw.param_groups for parameter in group["params"]}
    assert "transformer.transformer_blocks.0.attn.to_q.weight" in by_muon
    assert "transformer.transformer_blocks.1.ff.net.2.weight" in by_muon
    assert "transformer.transformer_blocks.0.scale_shift_table" in by_adamw
    assert {"transformer.proj_out.weight", "transformer.pos_embed.proj.weight"} <= by_adamw
    assert by_muon.isdisjoint(by_adamw) and by_muon | by_adamw == set(names.values())
    undecayed = [group for group in adamw.param_groups if group["weight_decay"] == 0]
    assert not any(names[id(p)].endswith("proj_out.weight") for group in undecayed for p in group["params"])


def test_the_slow_parameters_of_a_mixer_have_their_own_rate_and_no_decay(tmp_path):
    config = tiny_config(tmp_path)
    model = replace(config.model, token_mixers=("ssm", "window"), mixer_options={"ssm": {"state_size": 4}})
    settings = OptimizerConfig(name="muon", learning_rate=3e-3, slow_learning_rate=1e-4, weight_decay=0.1)
    trainer = Trainer(replace(config, model=model, optimizer=settings))
    groups = build_optimizers(trainer.denoiser, settings)[0].param_groups
    names = {id(parameter): name for name, parameter in trainer.denoiser.named_parameters()}
    slow = {names[id(parameter)] for group in groups if group["lr"] == 1e-4 for parameter in group["params"]}
    kernel = "transformer.transformer_blocks.0.attn.processor.kernel."
    assert slow == {kernel + name for name in ("log_step", "log_decay", "frequency")}
    assert all(group["weight_decay"] == 0 for group in groups if group["lr"] == 1e-4)
    trainer.train()


def test_muon_moves_every_matrix_of_the_blocks(tmp_path):
    config = tiny_config(tmp_path, max_steps=2, optimizer=OptimizerConfig(name="muon", warmup_steps=0, ema_decay=0))
    trainer = Trainer(config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.denoiser.named_parameters()}
    trainer.train()
    blocks = {name: p for name, p in trainer.denoiser.named_parameters() if ".attn." in name and p.ndim == 2}
    assert blocks and not any(torch.equal(before[name], parameter) for name, parameter in blocks.items())


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
    words = ImageFolder(DataConfig(name="imagefolder", path=str(picture_folder)), 0, condition="caption").words()
    tokenizer = build_tokenizer([*words, "(big)."], 16)
    ids = tokenizer("A cat, number 2; a dog (big).").input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) == 8


def test_a_pixart_is_tuned_with_its_size_conditions_and_its_variance_left_alone(tmp_path, pipeline):
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=64,
        patch_size=16,
        caption_channels=24,
        use_additional_conditions=True,
    )
    transformer = LocalDiTTransformer2DModel.from_pixart(pixart, "window", {"window": {"window_size": 2}})
    start = LocalDiTPipeline(
        pipeline.tokenizer,
        pipeline.text_encoder,
        None,
        transformer,
        pipeline.scheduler,
        {"aspect_ratio": "width/height"},
    )
    start.save_pretrained(tmp_path / "start")
    trainer = Trainer(tiny_config(tmp_path / "run", pretrained=str(tmp_path / "start"), model=ModelConfig()))
    trainer.train()
    tuned = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert tuned.config.call_defaults["aspect_ratio"] == "width/height"
    before, after = transformer.proj_out.weight, tuned.transformer.proj_out.weight
    assert not torch.equal(before.unflatten(0, (-1, 6))[:, :3], after.unflatten(0, (-1, 6))[:, :3])
    variance = [weight.unflatten(0, (-1, 6))[:, 3:] for weight in (before, after)]
    torch.testing.assert_close(*variance, rtol=1e-3, atol=0)  # weight decay alone


def test_a_new_run_does_not_touch_the_checkpoints_of_another(tmp_path):
    Trainer(tiny_config(tmp_path)).train()
    with pytest.raises(
        ValueError, match=r"holds checkpoints of another run \(step-00000006\); continue it with --resume"
    ):
        Trainer(tiny_config(tmp_path, max_steps=2))


def test_only_the_last_checkpoints_are_kept(tmp_path):
    Trainer(tiny_config(tmp_path, checkpoint_every=1, keep_checkpoints=2)).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_an_older_checkpoint_is_continued_elsewhere_so_that_nothing_newer_is_lost(tmp_path):
    Trainer(tiny_config(tmp_path, checkpoint_every=1, keep_checkpoints=3)).train()
    older = str(tmp_path / "checkpoints" / "step-00000004")
    with pytest.raises(ValueError, match="is older than step-00000006 beside it.*another --output_dir"):
        Trainer(tiny_config(tmp_path, resume=older))
    elsewhere = tiny_config(tmp_path / "other", resume=older, max_steps=5, keep_checkpoints=1)
    Trainer(elsewhere).train()
    assert [path.name for path in (tmp_path / "other" / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"resume": "latest"}, "holds no checkpoint"),
        ({"resume": "nowhere"}, "'nowhere' is not a whole checkpoint"),
        ({"data": DataConfig(name="imagefolder")}, "data.path=None is not a folder"),
        ({"data": DataConfig(resolution=32)}, "data.resolution=32"),
        ({"data": DataConfig(one_digit=1.5)}, "data.one_digit=1.5"),
        ({"data": DataConfig(name="imagefolder", recoloured=0.1)}, "data.recoloured=0.1"),
        ({"objective": ObjectiveConfig(flow_shift=0)}, "objective.flow_shift=0"),
        ({"text_encoder": TextEncoderConfig(d_model=32)}, "text_encoder.d_model=32"),
        ({"text_encoder": TextEncoderConfig(pretrained="nowhere")}, "text_encoder.pretrained='nowhere' holds no T5"),
        ({"model": ModelConfig(in_channels=4, caption_channels=16)}, "model.in_channels=4"),
        ({"pretrained": "nowhere"}, "pretrained='nowhere' cannot be loaded"),
        ({"vae": "nowhere"}, "vae='nowhere' holds no autoencoder"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_a_run_that_cannot_work_is_refused_in_one_sentence(tmp_path, changes, phrase):
    with pytest.raises(ValueError, match=phrase) as caught:
        Trainer(tiny_config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_picture_without_caption_and_an_unreadable_one_are_named(picture_folder):
    config = DataConfig(name="imagefolder", path=str(picture_folder), resolution=32)
    (picture_folder / "cat" / "0.png").write_bytes(b"no picture")
    data = ImageFolder(config, 0, condition="caption")
    with pytest.raises(ValueError, match=r"cat.0\.png cannot be read"):
        [data[index] for index in range(6)]
    (picture_folder / "dog" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"dog.1\.png .* no caption"):
        ImageFolder(config, 0, condition="caption")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_config(recipe):
    if recipe.stem.startswith("mixers_"):
        comparison = parse(
            ComparisonConfig, "train", ["--config", str(recipe), "--seeds", "7", "--run.batch_size", "3"]
        )
        assert comparison.seeds == 7 and comparison.run.batch_size == 3
        return
    kinds = {"vae": AutoencoderConfig, "text": TextPretrainingConfig}
    config_class = kinds.get(recipe.stem.rpartition("_")[2], TrainConfig)
    config = parse(config_class, "train", ["--config", str(recipe), "--max_steps", "7", "--seed", "3"])
    assert isinstance(config, config_class)
    assert config.max_steps == 7 and config.seed == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no_such_key", "1"],
        ["--max_step", "3"],
        ["--max_steps", "many"],
        ["--objective.process", "magic"],
        ["--config", "nowhere.yaml"],
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(TrainConfig, "train", ["--config", "train/recipes/digit_scenes.yaml", *arguments])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_processes_train_together(tmp_path):
    """Launched as a user would on a machine of two processes; gloo on the CPU."""
    recipe = ["--config", "train/recipes/digit_scenes.yaml", "--output_dir", str(tmp_path), "--max_steps", "2"]
    small = ["--batch_size", "2", "--model.num_layers", "1", "--compile", "false", "--data.num_workers", "0"]
    pixels = ["--vae", "null", "--model.in_channels", "3", "--model.sample_size", "64", "--model.patch_size", "8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "train"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *recipe, *small, *pixels, "--log_every", "1"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
