"""Pictures without text with LocalDiT: of a class, or of nothing in particular."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import make_image_grid
from PIL import Image

from .pipeline_checks import LocalDiTChecksMixin, check_class_names, check_count
from .pipeline_common import LocalDiTPipelineMixin
from .pipeline_loading import LocalDiTLoadingMixin


@dataclass
class LocalDiTClassPipelineOutput(ImagePipelineOutput):
    """Pictures, and how they came about.

    Args:
        images: list of B PIL pictures, or array or tensor, as `output_type` says.
        trajectories: with `visualize`, for each picture a strip of its states from noise to picture, side by side.
    """

    images: list[Image.Image] | np.ndarray  # pyright: ignore[reportGeneralTypeIssues]
    trajectories: list[Image.Image] | None = None


class LocalDiTClassPipeline(
    LocalDiTChecksMixin, LocalDiTPipelineMixin, LocalDiTLoadingMixin, SanaLoraLoaderMixin, DiffusionPipeline
):
    """Generate pictures of given classes, or unconditionally.

    Args:
        vae: autoencoder of the latents, or None for a transformer that works on pixels.
        transformer: a `LocalDiTTransformer2DModel` without `caption_channels`; with `num_classes`, or without for an
            unconditional model.
        scheduler: any of diffusers' samplers whose `prediction_type` fits the training.
        id2label: names of the classes by number; several names of one class are separated by commas, as ImageNet's.
        call_defaults: what a call uses where the caller says nothing: "height", "width" (pixels),
            "num_inference_steps", "guidance_scale". Saved with the pipeline.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        vae: AutoencoderKL | None,
        transformer: ModelMixin,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict | None = None,
        call_defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        id2label = check_class_names(id2label)
        self.register_to_config(id2label=id2label)
        self.labels = {name: number for number in sorted(id2label) for name in _split_names(id2label[number])}
        self.initialize(call_defaults)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The numbers of classes by name; raises a ValueError for a name that no class has, or more than one."""
        names = [label] if isinstance(label, str) else label
        for name in names:
            if name not in self.labels:
                known = ", ".join(list(self.labels)[:20]) or "none; give numbers"
                raise ValueError(f"The class {name!r} is not known; this pipeline's names: {known}.")
            alike = [number for number, own in self.config.id2label.items() if name in _split_names(own)]
            if len(alike) > 1:
                raise ValueError(f"{name!r} is the name of the classes {alike}; give the number of one.")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        visualize: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> LocalDiTClassPipelineOutput | tuple:
        """Generate pictures.

        Where an argument is None the folder's `call_defaults` decide.

        Args:
            class_labels: a class by number or name, or a list of them; None for no class in particular.
            batch_size: how many pictures of no class in particular; not with `class_labels`.
            height, width: size in pixels, multiples of one token; by default the size the model was made for.
            num_inference_steps: denoising steps, at least 1.
            timesteps, sigmas: the sampler's own timesteps or sigmas instead of evenly chosen ones.
            guidance_scale: weight of classifier-free guidance (arXiv 2207.12598) away from no class in particular; 1 or
                less turns it off, and without a class there is none.
            num_images_per_label: pictures per class, at least 1.
            eta: noise of the DDIM sampler, in [0, 1]; other samplers ignore it.
            generator: one for all pictures, or a list with one for each, so that no picture depends on its batch.
            latents: starting noise, [B, in_channels, H, W], instead of drawing it.
            visualize: also return how each picture came about, as a strip from noise to picture.
            output_type: "pil", "np" (float in [0, 1], [B, height, width, channels]), "pt" (channels first) or "latent".
            return_dict: whether to return a `LocalDiTClassPipelineOutput` or a tuple.
            attention_kwargs: passed to the transformer; "scale" weighs LoRA adapters.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after each step; the dict it returns
                replaces those tensors. A diffusers `PipelineCallback` brings its own tensor names.
            callback_on_step_end_tensor_inputs: names of the tensors it receives, among `_callback_tensor_inputs`.

        Returns:
            `LocalDiTClassPipelineOutput` with `images` and, with `visualize`, `trajectories`; or a tuple of the two.

        Raises:
            ValueError, TypeError: for any argument out of its range, before any heavy work.
        """
        # 1. Check inputs
        height, width = self.default_size(height, width)
        num_inference_steps = self.call_default("num_inference_steps", num_inference_steps)
        guidance_scale = self.call_default("guidance_scale", guidance_scale)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_size(height, width)
        self.check_sampling(
            {"num_inference_steps": num_inference_steps, "num_images_per_label": num_images_per_label},
            guidance_scale,
            eta,
            timesteps,
            sigmas,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        labels = self.check_labels(class_labels, batch_size)
        batch_size = len(labels) * num_images_per_label
        self.check_generator(generator, batch_size)
        self.check_latents(latents, batch_size, height, width)
        device = self.begin(guidance_scale if class_labels is not None else 1.0, attention_kwargs)

        # 2. Prepare the labels, timesteps and latents
        labels = torch.tensor(labels, device=device).repeat_interleave(num_images_per_label)
        schedule, self._num_timesteps = self.set_timesteps(
            num_inference_steps, timesteps, sigmas, height, width, device
        )
        if latents is None:
            latents = self.prepare_noise(batch_size, height, width, self.transformer.dtype, device, generator)
        latents = latents.to(device) * self.init_noise_sigma
        states = [latents]

        def keep(latents: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            states.append(latents)
            return latents

        # 3. Denoise
        latents = self.denoise(
            latents,
            schedule,
            {"class_labels": labels},
            height,
            width,
            generator,
            eta,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            after_step=keep if visualize else None,
        )

        # 4. Decode
        images = self.decode(latents, output_type)
        trajectories = self.draw_trajectories(states) if visualize else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, trajectories)
        return LocalDiTClassPipelineOutput(images=images, trajectories=trajectories)

    def check_labels(self, class_labels, batch_size: int) -> list[int]:
        """The classes as numbers, the null class for None; raises where one does not exist."""
        num_classes = self.transformer.config.num_classes
        if self.transformer.config.caption_channels is not None:
            raise ValueError("This pipeline's transformer is conditioned on text; use LocalDiTPipeline.")
        check_count("batch_size", batch_size)
        if class_labels is None:
            return [num_classes or 0] * batch_size
        if num_classes is None:
            raise ValueError(f"class_labels={class_labels!r} was given, but this model has no classes; leave it out.")
        if batch_size != 1:
            raise ValueError(
                f"Give either class_labels or batch_size={batch_size}; for several pictures of each class, "
                "num_images_per_label."
            )
        given = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        if not given:
            raise ValueError("class_labels is an empty list; give at least one class.")
        labels = []
        for label in given:
            if not isinstance(label, str | Integral) or isinstance(label, bool):
                raise TypeError(f"class_labels holds {label!r} of type {type(label).__name__}; give numbers or names.")
            number = self.get_label_ids(label)[0] if isinstance(label, str) else int(label)
            if not 0 <= number < num_classes:
                raise ValueError(f"class {number} is outside [0, {num_classes}); this model has {num_classes} classes.")
            labels.append(number)
        return labels

    def transformer_conditions(self, conditions: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.transformer.config.num_classes is None:
            return {}
        labels = conditions["class_labels"]
        if self.do_classifier_free_guidance:
            labels = torch.cat((torch.full_like(labels, self.transformer.config.num_classes), labels))
        return {"class_labels": labels}

    def draw_trajectories(self, states: list[torch.Tensor]) -> list[Image.Image]:
        """One strip for each picture: its states, decoded, side by side."""
        columns = [self.decode(state, "pil") for state in states]
        return [make_image_grid(list(row), rows=1, cols=len(states)) for row in zip(*columns, strict=True)]


def _split_names(names: str) -> list[str]:
    """The names of one class."""
    return [name.strip() for name in names.split(",")]
