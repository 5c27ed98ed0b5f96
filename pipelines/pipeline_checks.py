"""What the LocalDiT pipelines refuse before any heavy work, each in one sentence."""

import inspect
import math
import reprlib
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

MOST_TOKENS = 2**24  # of one picture; 65,536 pixels a side with a VAE of 8 and patches of 2


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give a number.")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite; give a finite number.")


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give a whole number.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def check_class_names(id2label: Any) -> dict[int, str]:
    """Names of classes by number, which come as text from JSON; raises a ValueError where they are anything else."""
    named = {} if id2label is None else id2label
    if (
        not isinstance(named, dict)
        or not all(isinstance(name, str) and name for name in named.values())
        or not all(str(number).isdecimal() for number in named)
    ):
        raise ValueError(
            f"id2label={reprlib.repr(id2label)} does not name classes by number; give a dict such as "
            "{0: 'cat', 1: 'dog'}."
        )
    return {int(number): name for number, name in named.items()}


class LocalDiTChecksMixin:
    """Checks of a call's arguments against each other and against the components."""

    def check_size(self, height, width) -> None:
        """Raise unless both sides, in pixels, are whole numbers of tokens."""
        token = self.vae_scale_factor * self.transformer.config.patch_size  # pixels along one side of a token
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, Integral) or isinstance(side, bool):
                raise TypeError(f"{name}={side!r} is not a whole number of pixels; give an int.")
            if side < token or side % token:
                below = max(side // token, 1) * token
                raise ValueError(
                    f"{name}={side} is not a positive multiple of {token} pixels (one token); "
                    f"the nearest that are: {below} and {below + token}."
                )
        tokens = (height // token) * (width // token)
        if tokens > MOST_TOKENS:
            raise ValueError(f"height={height} and width={width} make {tokens} tokens; choose at most {MOST_TOKENS}.")

    def check_prompts(
        self,
        prompt,
        negative_prompt,
        prompt_embeds,
        prompt_attention_mask,
        negative_prompt_embeds,
        negative_prompt_attention_mask,
    ) -> int:
        """Return how many prompts there are; raise unless they come as texts or as embeddings that fit the model."""
        if (prompt is None) == (prompt_embeds is None):
            given = "neither was" if prompt is None else "both were"
            raise ValueError(f"Give either prompt or prompt_embeds; {given} given.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Give either negative_prompt or negative_prompt_embeds; both were given.")
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            missing = "text_encoder" if self.text_encoder is None else "tokenizer"
            raise ValueError(f"This pipeline has no {missing}; give prompt_embeds and prompt_attention_mask instead.")
        _check_texts("prompt", prompt)
        _check_texts("negative_prompt", negative_prompt)
        width = self.transformer.config.caption_channels
        if width is None:
            raise ValueError("This pipeline's transformer takes no text; use one that was made with caption_channels.")
        _check_embeds("prompt_embeds", prompt_embeds, prompt_attention_mask, width)
        _check_embeds("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_attention_mask, width)

        prompts = len(prompt_embeds) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative_prompt, list) and len(negative_prompt) not in (1, prompts):
            raise ValueError(
                f"negative_prompt has {len(negative_prompt)} texts for {prompts} prompts; give one, or one for each."
            )
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != prompts:
            raise ValueError(
                f"negative_prompt_embeds has {len(negative_prompt_embeds)} rows for {prompts} prompts; "
                "give one for each."
            )
        if (
            prompt_embeds is not None
            and negative_prompt_embeds is not None
            and prompt_embeds.shape != negative_prompt_embeds.shape
        ):
            raise ValueError(
                f"prompt_embeds {list(prompt_embeds.shape)} and negative_prompt_embeds "
                f"{list(negative_prompt_embeds.shape)} differ in shape; encode both to the same length."
            )
        return prompts

    def check_sampling(
        self,
        counts: dict[str, Any],
        guidance_scale,
        eta,
        timesteps,
        sigmas,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raise for a number out of range, a sampler or schedule that cannot work, an unknown output or callback."""
        self.check_scheduler()
        for name, count in counts.items():
            check_count(name, count)
        check_number("guidance_scale", guidance_scale)
        check_number("eta", eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is outside [0, 1].")
        if timesteps is not None and sigmas is not None:
            raise ValueError("Give either timesteps or sigmas; both were given.")
        self._check_schedule("timesteps", timesteps)
        self._check_schedule("sigmas", sigmas)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is not known; choose 'pil', 'np', 'pt' or 'latent'.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end={callback_on_step_end!r} cannot be called; give a function.")
        if isinstance(callback_on_step_end_tensor_inputs, str):
            raise TypeError(
                f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs!r} is a str; give a list of "
                "names."
            )
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has unknown name(s) {unknown}; "
                f"choose among {self._callback_tensor_inputs}."
            )

    def check_scheduler(self) -> None:
        """Raise where a sampler made by `from_config` would pass over what the model's own is configured for."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        flow_matching = hasattr(self.scheduler, "scale_noise")
        knows_flow = flow_matching or "use_flow_sigmas" in inspect.signature(type(self.scheduler).__init__).parameters
        if config.get("use_flow_sigmas", False) and not knows_flow:
            raise ValueError(
                f"{name} has no use_flow_sigmas, which this model was trained for; choose DPMSolverMultistepScheduler, "
                "UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler."
            )
        # its last step would divide what the network got wrong by the smallest sigma
        if flow_matching and config.get("prediction_type") == "sample" and self.scheduler.order > 1:
            raise ValueError(
                f"{name} is of order {self.scheduler.order}, which a model that predicts the clean picture cannot "
                "follow; choose FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler."
            )

    def _check_schedule(self, name: str, schedule) -> None:
        if schedule is None:
            return
        try:
            numbers = np.asarray(schedule, dtype=float)
        except (TypeError, ValueError):
            raise TypeError(f"{name}={reprlib.repr(schedule)} is not a list of numbers; give one.") from None
        if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
            raise ValueError(f"{name}={reprlib.repr(schedule)} must be a list of at least one finite number.")
        known = inspect.signature(self.scheduler.set_timesteps).parameters
        # schedulers that spread flow sigmas themselves take timesteps in their signature and stumble over them
        if name not in known or (name == "timesteps" and self.scheduler.config.get("use_flow_sigmas", False)):
            raise ValueError(
                f"{name} was given, but this pipeline's {type(self.scheduler).__name__} chooses its own; "
                f"leave {name} out, or set a scheduler that takes them, such as FlowMatchEulerDiscreteScheduler."
            )

    def check_generator(self, generator, batch_size: int) -> None:
        """Raise unless generator is None, a torch.Generator, or a list with one for each picture."""
        for item in generator if isinstance(generator, list) else [generator]:
            if not isinstance(item, torch.Generator) and generator is not None:
                raise TypeError(
                    f"generator is or holds {item!r} of type {type(item).__name__}; "
                    "give a torch.Generator, such as torch.Generator().manual_seed(0), or a list of them."
                )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)} for {batch_size} pictures; give one for each.")

    def check_latents(self, latents, batch_size: int, height: int, width: int) -> None:
        """Raise unless the latents have the shape that the size asks for and hold finite numbers."""
        if latents is None:
            return
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"latents is of type {type(latents).__name__}; give a tensor.")
        channels = self.transformer.config.in_channels
        shape = [batch_size, channels, height // self.vae_scale_factor, width // self.vae_scale_factor]
        if list(latents.shape) != shape:
            raise ValueError(f"latents has shape {list(latents.shape)}; these prompts and this size want {shape}.")
        if not torch.isfinite(latents).all():
            raise ValueError("latents holds NaN or infinite numbers; give finite ones, drawn from a standard normal.")


def _check_texts(name: str, texts) -> None:
    if texts is None:
        return
    if not isinstance(texts, str | list):
        raise TypeError(f"{name}={reprlib.repr(texts)} is of type {type(texts).__name__}; give a str or a list of str.")
    if not texts and isinstance(texts, list):
        raise ValueError(f"{name} is an empty list; give at least one text.")
    for text in [texts] if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} holds {text!r} of type {type(text).__name__}; every entry must be a str.")


def _check_embeds(name: str, embeds, mask, width: int) -> None:
    mask_name = name.replace("embeds", "attention_mask")
    if (embeds is None) != (mask is None):
        raise ValueError(f"Give {name} and {mask_name} together; encode_prompt returns both.")
    if embeds is None:
        return
    if not isinstance(embeds, torch.Tensor) or not isinstance(mask, torch.Tensor):
        wrong = embeds if not isinstance(embeds, torch.Tensor) else mask
        raise TypeError(f"{name} and {mask_name} must be tensors; one is of type {type(wrong).__name__}.")
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {list(embeds.shape)}; this model wants [batch, tokens, {width}] "
            "from the text encoder it was trained with."
        )
    if not len(embeds) or mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name} {list(embeds.shape)} and {mask_name} {list(mask.shape)} do not fit; "
            "give at least one row and a mask of [batch, tokens]."
        )
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; encode the prompt in float32 or bfloat16.")
