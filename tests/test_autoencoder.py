"""The small autoencoder: its loss, its latents, a transformer on them."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from config import (
    AutoencoderConfig,
    DataConfig,
)
from tests.training import tiny_config
from train.autoencoder import Reconstruction, build_autoencoder, standardize
from train.autoencoder import train as train_autoencoder
from train.trainer import Trainer


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
