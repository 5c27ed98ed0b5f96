"""What is computed beforehand: as in training, restartable, checked, and trained on without the frozen networks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from config import DataConfig, PrecomputeConfig, StageConfig, TrainBenchmarkConfig, TrainConfig
from localdit import LocalDiTPipeline
from tests.training import tiny_config
from train.benchmark import benchmark
from train.components import build_networks, build_text_encoder, build_tokenizer
from train.datasets import DigitScenes, build_dataset
from train.encoding import BatchEncoder
from train.precompute import precompute
from train.precomputed import PrecomputedSource
from train.settings import as_plain
from train.stopwatch import Stopwatch
from train.trainer import Trainer

SHARD = 6
PICTURES = 16


@pytest.fixture
def frozen_run(tmp_path) -> TrainConfig:
    """A run with an autoencoder and a text encoder that lie in folders and stay as they are."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.3,
        scaling_factor=0.7,
    )
    vae.save_pretrained(tmp_path / "vae")
    config = tiny_config(tmp_path / "run")
    tokenizer = build_tokenizer(DigitScenes(DataConfig(), seed=0).words(), max_length=16)
    tokenizer.save_pretrained(tmp_path / "text")
    build_text_encoder(config.text_encoder, len(tokenizer)).save_pretrained(tmp_path / "text")
    return replace(
        config,
        vae=str(tmp_path / "vae"),
        text_encoder=replace(config.text_encoder, pretrained=str(tmp_path / "text"), frozen=True),
        model=replace(config.model, in_channels=4, sample_size=16, patch_size=4),
    )


def job(run: TrainConfig, folder: Path, **changes) -> PrecomputeConfig:
    changes = {"pictures": PICTURES, "shard_size": SHARD, "dtype": "float32", **changes}
    return PrecomputeConfig(run=run, output_dir=str(folder), **changes)


def cached(run: TrainConfig, folder: Path, **data) -> TrainConfig:
    return replace(run, data=DataConfig(name="precomputed", path=str(folder), num_workers=0, **data))


def rows(source: PrecomputedSource) -> list[dict]:
    return [source[key] for keys in source.every(None).values() for key in keys]


def test_what_is_precomputed_is_what_training_computes(tmp_path, frozen_run):
    precompute(job(frozen_run, tmp_path / "ready"))
    ready = build_dataset(cached(frozen_run, tmp_path / "ready").data, 0, "caption")
    scenes = {item["name"]: item for item in (build_dataset(frozen_run.data, 0, "caption")[i] for i in range(PICTURES))}
    networks, accelerator = build_networks(frozen_run, list), Accelerator()
    encode = BatchEncoder(frozen_run, networks, accelerator, Stopwatch(accelerator.device))
    found = rows(ready)
    assert [item["name"] for item in found] == [f"scene {row}" for row in range(PICTURES)]
    for item in found:
        scene = scenes[item["name"]]
        torch.testing.assert_close(item["latents"], encode.latents(scene["image"][None])[0], rtol=1e-4, atol=1e-5)
        tokens = networks.tokenizer(scene["caption"], padding="max_length", return_tensors="pt")
        states = networks.denoiser.text_encoder(**tokens)[0][0]
        assert item["mask"].tolist() == tokens.attention_mask[0].tolist()
        kept = item["mask"].bool()
        torch.testing.assert_close(item["text"][kept], states[kept], rtol=1e-4, atol=1e-5)
        assert not item["text"][~kept].any()


def test_a_step_on_precomputed_data_has_the_loss_of_a_step_on_pictures(tmp_path, frozen_run):
    precompute(job(frozen_run, tmp_path / "ready"))
    losses = []
    for config in (frozen_run, cached(frozen_run, tmp_path / "ready")):
        trainer = Trainer(replace(config, objective=replace(config.objective, condition_dropout=0.5)))
        keys = [0, 1, 2, 3] if config is frozen_run else [(row, 0) for row in range(4)]
        batch = torch.utils.data.default_collate([trainer.source[key] for key in keys])
        losses.append(torch.cat(trainer.train_step(0, iter([batch])).losses))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_a_run_on_precomputed_data_needs_no_frozen_network_and_ends_with_both_in_its_pipeline(tmp_path, frozen_run):
    precompute(job(frozen_run, tmp_path / "ready", dtype="float16"))
    config = cached(frozen_run, tmp_path / "ready", held_out=0.3)
    trainer = Trainer(replace(config, validate_every=3, validation_batches=1))
    assert trainer.denoiser.text_encoder is None
    assert all(parameter.is_meta for parameter in trainer.networks.vae.parameters())
    trainer.train()
    assert (tmp_path / "run" / "samples" / "00000004.png").is_file()
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red seven on a black background", num_inference_steps=1).images[0]
    assert image.size == (64, 64)
    vae = AutoencoderKL.from_pretrained(str(frozen_run.vae))
    for mine, given in zip(pipeline.vae.parameters(), vae.parameters(), strict=True):
        assert torch.equal(mine, given)


def test_a_pipeline_is_tuned_on_precomputed_data_without_loading_its_frozen_networks(tmp_path, frozen_run):
    Trainer(replace(frozen_run, max_steps=1, sample_every=10)).train()
    text = replace(frozen_run.text_encoder, pretrained=None)
    tune = replace(frozen_run, pretrained=str(tmp_path / "run" / "pipeline"), vae=None, text_encoder=text)
    tune = replace(tune, text_encoder=replace(text, max_sequence_length=7))  # the pipeline's own, 16, counts
    precompute(job(tune, tmp_path / "ready"))
    assert json.loads((tmp_path / "ready" / "manifest.json").read_text())["networks"]["max_sequence_length"] == 16
    trainer = Trainer(replace(cached(tune, tmp_path / "ready"), output_dir=str(tmp_path / "tuned"), max_steps=1))
    assert trainer.denoiser.text_encoder is None
    trainer.train()
    assert LocalDiTPipeline.from_pretrained(tmp_path / "tuned" / "pipeline").text_encoder is not None


def test_what_was_cut_short_goes_on_and_writes_the_same(tmp_path, frozen_run):
    folder = tmp_path / "ready"
    precompute(job(frozen_run, folder))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [shard["pictures"] for shard in json.loads(whole["manifest.json"])["shards"]] == [6, 6, 4]
    (folder / "manifest.json").unlink()
    (folder / "shard-000001.safetensors").unlink()
    (folder / "empty_caption.safetensors").unlink()
    with pytest.raises(ValueError, match="let python -m train.precompute finish"):
        build_dataset(cached(frozen_run, folder).data, 0, "caption")
    kept = (folder / "shard-000000.safetensors").stat().st_mtime_ns
    precompute(job(frozen_run, folder))
    assert (folder / "shard-000000.safetensors").stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    for name in ("manifest.json", "empty_caption.safetensors"):  # killed after the last shard
        (folder / name).unlink()
    precompute(job(frozen_run, folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_two_processes_write_what_one_writes(tmp_path, frozen_run):
    precompute(job(frozen_run, tmp_path / "one"))
    recipe = tmp_path / "job.yaml"
    recipe.write_text(yaml.safe_dump(as_plain(job(frozen_run, tmp_path / "two"))))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "train.precompute"]
    threads = str(torch.get_num_threads())  # their number changes the last bits
    subprocess.run(
        [sys.executable, *command, "--config", str(recipe)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads},
        check=True,
        capture_output=True,
        timeout=300,
    )
    for path in (tmp_path / "one").iterdir():
        other = tmp_path / "two" / path.name
        if path.suffix == ".safetensors":  # where a tensor lies in memory changes some CPUs' last bits
            torch.testing.assert_close(load_file(other), load_file(path), msg=path.name)
        else:
            assert other.read_bytes() == path.read_bytes(), path.name


def test_labels_and_sizes_are_kept_and_what_cannot_be_read_is_left_out(tmp_path, frozen_run, picture_folder):
    folder = next(path for path in sorted(picture_folder.iterdir()) if path.is_dir())
    Image.new("RGB", (100, 40)).save(folder / "wide.png")
    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    model = replace(frozen_run.model, caption_channels=None, num_classes=3, mixer_options=None)
    data = DataConfig(name="imagefolder", path=str(picture_folder), resolution=64, bucket_multiple=16, num_workers=0)
    run = replace(frozen_run, model=model, data=data, vae=None)
    precompute(job(replace(run, model=replace(model, in_channels=3)), tmp_path / "ready", pictures=None))
    source = build_dataset(cached(run, tmp_path / "ready").data, 0, "label")
    assert isinstance(source, PrecomputedSource)
    found, given = rows(source), build_dataset(data, 0, "label")
    assert source.classes == given.classes
    originals = [given[key] for keys in given.every(None).values() for key in keys]
    originals = {item["name"]: item for item in originals if not item["unreadable"]}
    assert len(found) == len(originals) and str(broken) not in originals
    assert len({item["latents"].shape for item in found}) > 1
    for item in found:
        assert torch.equal(item["latents"], originals[item["name"]]["image"])
        assert item["label"] == originals[item["name"]]["label"]
    assert str(broken) in (tmp_path / "ready" / "unreadable.jsonl").read_text()


def test_precomputed_pictures_grow_by_stages(tmp_path, frozen_run, picture_folder):
    for side in (32, 64):
        data = DataConfig(name="imagefolder", path=str(picture_folder), resolution=side, num_workers=0)
        precompute(job(replace(frozen_run, data=data), tmp_path / f"{side}"))
    small = StageConfig(until_step=2, resolution=32, batch_size=3, path=str(tmp_path / "32"))
    config = replace(cached(frozen_run, tmp_path / "64"), stages=(small,), max_steps=3)
    trainer, seen = Trainer(config), []
    trainer.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    batches = iter(trainer.loader)
    for step in range(3):
        trainer.train_step(step, batches)
    assert seen == [(3, 4, 8, 8)] * 2 + [(4, 4, 16, 16)]
    for stage, phrase in (
        (replace(small, path=None), "stages.0.path=None, with data.name=precomputed; precompute its pictures"),
        (replace(small, resolution=48), "stages.0.resolution=48, but .* has pictures of 32; make them equal"),
    ):
        with pytest.raises(ValueError, match=phrase):
            Trainer(replace(config, stages=(stage,)))
    with pytest.raises(ValueError, match="it is for precomputed data alone"):
        Trainer(replace(config, data=frozen_run.data))


def test_the_cost_of_the_trainer_is_told_beside_a_bare_loop(frozen_run, capsys):
    ratios = benchmark(TrainBenchmarkConfig(run=frozen_run, rounds=2, steps=1, peak_tflops=1.0))
    assert list(ratios) == ["bare loop", "trainer, one batch", "trainer, precomputed", "trainer, pictures"]
    assert ratios["bare loop"] == 1 and all(ratio > 0.2 for ratio in ratios.values())
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and all(" of the bare loop (" in line for line in told[:4])
    operations = 1e12 * float(told[4].split(" TFLOP a step")[0].rsplit(" ", 1)[1])
    # two blocks of 12 D² weights beside cross-attention, 16 tokens, 4 pictures; forward and backward take 6 for each
    least = 6 * 2 * 12 * 24**2 * 16 * 4
    assert least < operations < 3 * least
    assert told[4].endswith("% of 1")
    assert not Path(frozen_run.output_dir).exists()


def test_what_does_not_go_together_is_one_sentence(tmp_path, frozen_run):
    folder = tmp_path / "ready"
    precompute(job(frozen_run, folder))
    with pytest.raises(ValueError, match="other dtype"):
        precompute(job(frozen_run, folder, dtype="float16"))
    with pytest.raises(ValueError, match="set pictures to how many"):
        precompute(job(frozen_run, tmp_path / "endless", pictures=None))
    with pytest.raises(ValueError, match="cannot be precomputed together"):
        precompute(job(replace(frozen_run, data=DataConfig(recoloured=0.2)), tmp_path / "recoloured"))
    own_text = replace(frozen_run, text_encoder=replace(frozen_run.text_encoder, pretrained=None, frozen=False))
    with pytest.raises(ValueError, match="text_encoder.frozen"):
        precompute(job(own_text, tmp_path / "own"))
    longer = replace(frozen_run, text_encoder=replace(frozen_run.text_encoder, max_sequence_length=20))
    with pytest.raises(ValueError, match=r"max_sequence_length \(16\)"):
        Trainer(cached(longer, folder))
    with pytest.raises(ValueError, match="holds captions, but the model takes labels"):
        build_dataset(cached(frozen_run, folder).data, 0, "label")
    AutoencoderKL.from_pretrained(str(frozen_run.vae)).save_pretrained(tmp_path / "same_vae")
    Trainer(replace(cached(frozen_run, folder), vae=str(tmp_path / "same_vae")))  # where it lies does not matter
    other = AutoencoderKL.from_pretrained(str(frozen_run.vae))
    torch.nn.init.zeros_(other.quant_conv.bias)
    torch.nn.init.ones_(other.quant_conv.weight)
    other.save_pretrained(tmp_path / "other_vae")
    with pytest.raises(ValueError, match="computed with another vae"):
        Trainer(replace(cached(frozen_run, folder), vae=str(tmp_path / "other_vae")))
