"""From a batch of the loader to what the networks take: latents, condition and noise."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from config import TrainConfig
from train.components import Networks
from train.devices import to_device
from train.frozen import encode_pixels
from train.objective import Noised, Objective, flow_sigmas
from train.sharding import autocast
from train.stopwatch import Stopwatch

DROPOUT = 1  # keeps its seeds apart from those of pictures


@dataclass
class Example:
    """One micro-batch made ready: noised pictures, and the keyword arguments of the denoiser beside them."""

    noised: Noised
    condition: dict[str, torch.Tensor]
    generators: list[torch.Generator]  # of the pictures, for what is drawn beyond this


class BatchEncoder:
    """Turns batches into examples; what is random depends on the seed, the step and a picture's place in it alone."""

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        accelerator: Accelerator,
        watch: Stopwatch,
        empty_text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.config = config
        self.empty_text = empty_text
        self.networks = networks
        self.accelerator = accelerator
        self.watch = watch
        sigmas = None
        if config.few_step.teacher is not None:
            sigmas = flow_sigmas(config.objective, config.few_step.steps)[:-1]
        self.objective = Objective(config.objective, sigmas)

    def __call__(self, batch: dict, micro_step: int) -> Example:
        """Encode a batch of "image" [B, C, H, W] in [-1, 1] and, as the model asks, "caption" or "label".

        Precomputed batches have "latents" [B, C, h, w], and "text" [B, L, D] with its "mask" [B, L], in their place;
        those of few steps have "starts" beside them, and both [B, K, C, h, w].
        """
        generators = self.generators(micro_step, len(batch["name"]))
        drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        dropped = drawn < self.config.objective.condition_dropout
        noised = self.noised(batch, dropped, generators)
        condition = {**self.condition(batch, dropped, generators), **self.sizes(noised.inputs)}
        return Example(noised, condition, generators)

    def noised(self, batch: dict, dropped: torch.Tensor, generators: list[torch.Generator]) -> Noised:
        """The pictures of a batch with noise, or where few steps are learned, what these begin at."""
        if self.config.few_step.method == "distribution_matching":
            return self.objective.first_step(self.shape(batch), generators, self.accelerator.device)
        ready = "latents" in batch
        clean = to_device(batch["latents"], self.accelerator.device) if ready else self.latents(batch["image"])
        if "starts" in batch:
            return self.objective.a_step(to_device(batch["starts"], clean.device), clean, generators)
        return self.objective(clean, generators, self.source(batch, clean, dropped))

    def shape(self, batch: dict) -> tuple[int, ...]:
        """Of what the transformer works on, (B, C, h, w)."""
        if "latents" in batch:
            return batch["latents"].shape
        count, _, *sides = batch["image"].shape
        channels = self.networks.denoiser.transformer.config.in_channels
        return (count, channels, *(side // self.networks.vae_scale_factor for side in sides))

    def generators(self, micro_step: int, count: int) -> list[torch.Generator]:
        """What each picture of a micro-batch draws from, seeded by the step and the picture's place in the step.

        Not by history: a resumed run draws what an uninterrupted one would have drawn. Nor by the process: several
        processes, or several micro-steps, draw what one process does with all their pictures in one batch.
        """
        step, part = divmod(micro_step, self.config.gradient_accumulation_steps)
        first = (part * self.accelerator.num_processes + self.accelerator.process_index) * count
        seeds = (np.random.SeedSequence((self.config.seed, step, first + index)) for index in range(count))
        return [torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1)) for seed in seeds]

    def seed_dropout(self, micro_step: int) -> None:
        """Let what the networks drop out, in a model or in adapters, depend on seed, step and process alone."""
        words = (self.config.seed, micro_step, self.accelerator.process_index, DROPOUT)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the transformer works on: the pixels [B, C, H, W], or their latents where there is an autoencoder."""
        pixels, vae = to_device(pixels, self.accelerator.device), self.networks.vae
        if vae is None:
            return pixels
        with self.watch("vae"), autocast(self.accelerator, self.config):
            return encode_pixels(vae, pixels)

    def source(self, batch: dict, clean: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor | None:
        """What is noised in the place of `clean`; only a picture that keeps its caption starts from another one."""
        if not self.config.data.recoloured or "source" not in batch:
            return None
        other = (batch["source"] != batch["image"]).flatten(1).any(dim=1) & ~dropped
        source = clean.clone()
        if other.any():
            rows = to_device(other.nonzero().flatten(), clean.device)  # by a mask, the GPU would tell the host how many
            source[rows] = self.latents(batch["source"][other])
        return source

    def condition(
        self, batch: dict, dropped: torch.Tensor, generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Class labels, or the text's ids or states; the null class and the empty caption where `dropped` [B] says."""
        device = self.accelerator.device
        null_class = self.networks.denoiser.transformer.config.num_classes
        if null_class is not None:
            return {"class_labels": to_device(batch["label"].masked_fill(dropped, null_class), device)}
        if self.networks.tokenizer is None:
            return {}
        if self.empty_text is not None:
            states, mask = (
                torch.where(dropped.view(-1, *[1] * empty.ndim), empty, batch[name])
                for name, empty in zip(("text", "mask"), self.empty_text, strict=True)
            )
            kept = self.without_dropped_tokens(mask, generators)
            return {
                "encoder_hidden_states": to_device(states, device),
                "encoder_attention_mask": to_device(kept, device),
            }
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["caption"], strict=True)]
        tokens = self.networks.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        kept = self.without_dropped_tokens(tokens.attention_mask, generators)
        return {
            "input_ids": to_device(tokens.input_ids, device),
            "attention_mask": to_device(tokens.attention_mask, device),
            "encoder_attention_mask": to_device(kept, device),
        }

    def without_dropped_tokens(self, mask: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """A mask of tokens [B, L] without those that the transformer is not to see; the last of a text stays."""
        share = self.config.objective.token_dropout
        if not share:
            return mask
        drawn = torch.stack([torch.rand(mask.shape[1], generator=generator) for generator in generators])
        last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
        return mask * ((drawn >= share) | last)

    def sizes(self, clean: torch.Tensor) -> dict[str, torch.Tensor]:
        """Height and width in pixels and their ratio, for a transformer that was made with them."""
        if not self.networks.denoiser.transformer.use_additional_conditions:
            return {}
        count, (height, width) = len(clean), (side * self.networks.vae_scale_factor for side in clean.shape[-2:])
        device = self.accelerator.device
        return {
            "resolution": to_device(torch.tensor([[float(height), float(width)]] * count), device),
            "aspect_ratio": torch.full((count, 1), height / width, device=device),
        }
