"""The training loop."""

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import nn
from tqdm.auto import tqdm

from config import TrainConfig
from train.checkpoint import check_checkpoint, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from train.components import build_networks, check_networks, check_samples, model_settings
from train.data import MicroStepSampler, build_loader
from train.datasets import Condition, DigitScenes, ImageFolder, build_dataset
from train.objective import Objective
from train.optimizers import build_optimizers, build_schedules, own_settings, restore_settings
from train.settings import as_plain, check_run, save_settings


class Trainer:
    """One run, from its config to a pipeline in `output_dir/pipeline`."""

    def __init__(self, config: TrainConfig):
        check_run(config)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.objective = Objective(config.objective)
        dataset = build_dataset(config.data, config.seed, condition_of(model_settings(config)))
        resume = find_checkpoint(config.resume, self.output_dir / "checkpoints") if config.resume else None
        check_checkpoint(resume, config, self.output_dir / "checkpoints")
        if resume is None and (found := list_checkpoints(self.output_dir / "checkpoints")):
            raise ValueError(
                f"{config.output_dir} holds checkpoints of another run ({found[-1].name}); continue it with --resume "
                "latest, choose another --output_dir, or remove them."
            )
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=list(config.report_to) or None,
            project_dir=str(self.output_dir),
        )
        set_seed(config.seed)

        words = dataset.words() if isinstance(dataset, DigitScenes | ImageFolder) else []
        self.networks = build_networks(config, words)
        self.networks.classes = dataset.classes
        check_networks(self.networks, config.data, dataset.channels, dataset.classes)
        check_samples(self.networks.pipeline(config), config.sample)
        self.denoiser = self.networks.denoiser
        if self.networks.vae is not None:
            self.networks.vae.to(self.accelerator.device)
        if config.compile:
            # torch's own note on layer norms under autocast, which nothing here can change
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            self.denoiser.transformer.compile_repeated_blocks()
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        optimizers = build_optimizers(self.denoiser, config.optimizer)
        schedules = build_schedules(optimizers, config.optimizer, config.max_steps, self.accelerator.num_processes)
        self.model = self.accelerator.prepare(self.denoiser)
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]
        self.schedules = [self.accelerator.prepare(schedule) for schedule in schedules]
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.first_step = self._resume(resume) if resume else 0
        sampler = MicroStepSampler(
            config.batch_size,
            first=self.first_step * config.gradient_accumulation_steps,
            last=config.max_steps * config.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.loader = build_loader(dataset, sampler, config.data.num_workers)

    def _resume(self, checkpoint: Path) -> int:
        """Restore a checkpoint, under this run's settings rather than the checkpoint's; returns the steps done."""
        own = own_settings(self.optimizers)
        step = load_checkpoint(self.accelerator, checkpoint)
        restore_settings(self.optimizers, self.schedules, own)
        if self.ema is not None:
            self.ema.decay = self.config.optimizer.ema_decay
        return step

    def train(self) -> None:
        """Run from the first step to the last, then save the pipeline."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_settings(config, self.output_dir)
        accelerator.wait_for_everyone()
        if config.report_to:
            accelerator.init_trackers("train", config=None)
        batches, folder, settings = iter(self.loader), self.output_dir / "checkpoints", as_plain(config)
        losses, since = [], time.perf_counter()
        with self._progress() as progress:
            for step in range(self.first_step, config.max_steps):
                losses.append(self._step(step, batches))
                done = step + 1
                progress.update()
                saves = done % config.checkpoint_every == 0 or done == config.max_steps
                if saves or done % config.log_every == 0:  # the log stops a run whose loss is no number, unsaved
                    self._log(done, losses, time.perf_counter() - since, progress)
                    losses, since = [], time.perf_counter()
                if done % config.sample_every == 0:
                    self._draw_samples(done)
                if saves:
                    save_checkpoint(accelerator, folder, done, config.keep_checkpoints, settings)
        self.save_pipeline()
        accelerator.end_training()

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps,
            initial=self.first_step,
            disable=not self.accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )

    def _step(self, step: int, batches) -> torch.Tensor:
        accumulation = self.config.gradient_accumulation_steps
        losses = []
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            with self.accelerator.accumulate(self.model):
                loss = self._loss(next(batches), micro_step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
                for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            losses.append(loss.detach())
        if self.ema is not None:
            self.ema.step(self.parameters)
        return torch.stack(losses).mean()

    def _loss(self, batch: dict, micro_step: int) -> torch.Tensor:
        device = self.accelerator.device
        # seeded by place, not by history: a resumed run draws what an uninterrupted one would have drawn
        seed = np.random.SeedSequence((self.config.seed, micro_step, self.accelerator.process_index))
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        dropped = torch.rand(len(batch["image"]), generator=generator) < self.config.objective.condition_dropout
        clean = self._latents(batch["image"].to(device))
        noised = self.objective(clean, generator, self._source(batch, clean, dropped))
        condition = {**self._condition(batch, dropped), **self._size_condition(batch)}
        with self.accelerator.autocast():
            prediction = self.model(noised.inputs, noised.timestep, **condition)
        return noised.loss(prediction)

    @torch.no_grad()
    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the transformer works on: the pixels [B, C, H, W], or their latents where there is an autoencoder."""
        vae = self.networks.vae
        if vae is None:
            return pixels
        with self.accelerator.autocast():
            latents = vae.encode(pixels).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def _source(self, batch: dict, clean: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor | None:
        """What is noised in the place of `clean`; only a picture that keeps its caption starts from another one."""
        if not self.config.data.recoloured:
            return None
        other = (batch["source"] != batch["image"]).flatten(1).any(dim=1) & ~dropped
        source = clean.clone()
        if other.any():
            source[other.to(clean.device)] = self._latents(batch["source"][other].to(clean.device))
        return source

    def _condition(self, batch: dict, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        device = self.accelerator.device
        null_class = self.denoiser.transformer.config.num_classes
        if null_class is not None:
            return {"class_labels": batch["label"].masked_fill(dropped, null_class).to(device)}
        if self.networks.tokenizer is None:
            return {}
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["caption"], strict=True)]
        tokens = self.networks.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids.to(device), "attention_mask": tokens.attention_mask.to(device)}

    def _size_condition(self, batch: dict) -> dict[str, torch.Tensor]:
        """Height and width in pixels and their ratio, for a transformer that was made with them."""
        if not self.denoiser.transformer.use_additional_conditions:
            return {}
        count, height, width = len(batch["image"]), *batch["image"].shape[-2:]
        device = self.accelerator.device
        return {
            "resolution": torch.tensor([[float(height), float(width)]] * count, device=device),
            "aspect_ratio": torch.tensor([[height / width]] * count, device=device),  # data are squares: either way 1
        }

    def _log(self, step: int, losses: list[torch.Tensor], seconds: float, progress: tqdm) -> None:
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {step}; lower optimizer.learning_rate or use mixed_precision=no, and "
                "resume from the last checkpoint."
            )
        config = self.config
        pictures = len(losses) * config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        values = {
            "loss": loss,
            "learning_rate": self.schedules[0].get_last_lr()[0],
            "images_per_second": pictures / seconds,
        }
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            left = (config.max_steps - step) * seconds / len(losses)
            progress.set_postfix_str(
                f"loss {loss:.4f}, {values['images_per_second']:.0f} images/s, {left / 60:.0f} min left"
            )
            with (self.output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    @contextmanager
    def averaged_weights(self):
        """Inside, the networks hold the averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @torch.no_grad()
    def _draw_samples(self, step: int) -> None:
        sample = self.config.sample
        has_text = self.networks.tokenizer is not None
        if not self.accelerator.is_main_process or (has_text and not sample.prompts):
            return
        # eager, because compiling again for another batch size takes longer than a few pictures
        with self.averaged_weights(), torch.compiler.set_stance("force_eager"):
            self.denoiser.eval()
            pipeline = self.networks.pipeline(self.config)
            pipeline.set_progress_bar_config(disable=True)
            rows = sample.prompts if has_text else list(range(self.denoiser.transformer.config.num_classes or 1))
            cells = [row for row in rows for _ in range(sample.num_images)]
            generators = [torch.Generator().manual_seed(sample.seed + index) for index in range(len(cells))]
            if has_text:
                images = pipeline(cells, negative_prompt=sample.negative_prompt, generator=generators).images
            elif self.denoiser.transformer.config.num_classes is not None:
                images = pipeline(cells, generator=generators).images
            else:
                images = pipeline(batch_size=len(cells), generator=generators).images
            self.denoiser.train()
        folder = self.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        make_image_grid(images, rows=len(rows), cols=sample.num_images).save(folder / f"{step:08d}.png")

    def save_pipeline(self) -> None:
        """Write the averaged weights as a pipeline to `output_dir/pipeline`."""
        if not self.accelerator.is_main_process:
            return
        with self.averaged_weights():
            networks = deepcopy(self.networks)
        dtype = getattr(torch, self.config.save_dtype)
        networks.denoiser.to(dtype)
        if networks.vae is not None:
            nn.Module.to(networks.vae, dtype)  # diffusers' own warns of modules to keep in fp32, of which it has none
        networks.pipeline(self.config).save_pretrained(self.output_dir / "pipeline")


def condition_of(model: Mapping[str, Any]) -> Condition | None:
    """What the pictures have to come with, for a transformer of these settings."""
    if model["caption_channels"] is not None:
        return "caption"
    return "label" if model["num_classes"] is not None else None
