"""Trains a small AutoencoderKL: accelerate launch -m train.autoencoder --config train/recipes/digit_scenes_vae.yaml."""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from config import AutoencoderConfig
from train.command_line import parse, run
from train.data import MicroStepSampler, build_loader
from train.datasets import build_dataset
from train.settings import check_new_folder, check_ranges
from train.unreadable import UnreadablePictures

NORM_GROUPS = 8


class Reconstruction(nn.Module):
    """The autoencoder's loss as a module, so that one forward pass trains it under any launcher."""

    def __init__(self, vae: AutoencoderKL, pixel_std: float):
        super().__init__()
        self.vae = vae
        self.pixel_std = pixel_std

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative evidence bound per pixel (arXiv 1312.6114), scaled to a squared error, and that error alone.

        Args:
            pixels: pictures in [-1, 1], [B, C, H, W].
            noise: standard normal, in the shape of the latents.
        """
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        error = F.mse_loss(decoded.float(), pixels)
        return error + 2 * self.pixel_std**2 * posterior.kl().mean() / pixels[0].numel(), error


def check_levels(config: AutoencoderConfig) -> None:
    """Raise a ValueError where channels cannot be normalized in groups, or the picture cannot be halved so often."""
    channels, resolution = config.block_out_channels, config.data.resolution
    if not channels or any(count % NORM_GROUPS for count in channels):
        raise ValueError(f"block_out_channels={list(channels)} must be multiples of {NORM_GROUPS}, at least one.")
    if resolution % 2 ** (len(channels) - 1):
        raise ValueError(
            f"data.resolution={resolution} cannot be halved {len(channels) - 1} times, as {len(channels)} levels of "
            "block_out_channels ask for; drop a level or choose another size."
        )


def build_autoencoder(config: AutoencoderConfig, channels: int) -> AutoencoderKL:
    """An AutoencoderKL without attention, with random weights."""
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.block_out_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=config.data.resolution,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


@torch.no_grad()
def standardize(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Register the shift and scaling factor that give the latents of these pictures mean 0 and standard deviation 1."""
    latents = vae.encode(pixels).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train(config: AutoencoderConfig) -> None:
    """Run from the first step to the last, then save the autoencoder to `output_dir`."""
    check_ranges(config)
    check_new_folder(config.output_dir)
    check_levels(config)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    source = build_dataset(config.data, config.seed, condition=None)
    vae = build_autoencoder(config, source.channels)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    processes, rank = accelerator.num_processes, accelerator.process_index
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=100 * processes, num_training_steps=config.max_steps * processes
    )
    model, optimizer, schedule = accelerator.prepare(Reconstruction(vae, config.pixel_std), optimizer, schedule)
    sampler = MicroStepSampler(source, config.batch_size, 0, config.max_steps, rank, processes)
    loader = build_loader(sampler, config.data.num_workers)

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    unreadable = UnreadablePictures(folder, config.data.max_unreadable)
    progress = tqdm(loader, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(progress, start=1):
        pixels = batch["image"].to(accelerator.device)
        unreadable.note(batch.get("unreadable", []))
        sides = (side // 2 ** (len(config.block_out_channels) - 1) for side in pixels.shape[-2:])
        noise = torch.randn(len(pixels), config.latent_channels, *sides, device=pixels.device)
        with accelerator.autocast():
            loss, error = model(pixels, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if accelerator.is_main_process and (step % config.log_every == 0 or step == config.max_steps):
            progress.set_postfix_str(f"loss {loss.item():.5f}, squared error {error.item():.5f}")
            with (folder / "log.jsonl").open("a") as log:
                values = {"step": step, "time": time.time(), "loss": loss.item(), "squared_error": error.item()}
                log.write(json.dumps(values) + "\n")
    if accelerator.is_main_process:
        beyond = config.max_steps * config.batch_size * processes // 256 + 1  # what it was not trained on, if there is
        pictures = [source[key]["image"] for key in source.keys(beyond, 256, rank=0, world_size=1)]
        pixels = torch.stack(pictures).to(accelerator.device)
        standardize(vae.eval(), pixels)
        vae.to(getattr(torch, config.save_dtype)).save_pretrained(folder)
    accelerator.end_training()


if __name__ == "__main__":
    run("train.autoencoder", lambda: train(parse(AutoencoderConfig, "train.autoencoder")))
