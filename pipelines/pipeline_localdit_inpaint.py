"""Inpainting with LocalDiT: the text says what to paint where a mask is white; the rest of the picture stays."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import T5EncoderModel, T5Tokenizer

from .pipeline_checks import LocalDiTChecksMixin
from .pipeline_common import LocalDiTPipelineMixin
from .pipeline_image_input import LocalDiTImageInputMixin
from .pipeline_loading import LocalDiTLoadingMixin
from .pipeline_mask_input import LocalDiTMaskInputMixin
from .pipeline_single_file import LocalDiTSingleFileMixin
from .pipeline_text_input import LocalDiTTextInputMixin


class LocalDiTInpaintPipeline(
    LocalDiTMaskInputMixin,
    LocalDiTImageInputMixin,
    LocalDiTChecksMixin,
    LocalDiTTextInputMixin,
    LocalDiTPipelineMixin,
    LocalDiTSingleFileMixin,
    LocalDiTLoadingMixin,
    SanaLoraLoaderMixin,
    DiffusionPipeline,
):
    """Paint a masked part of pictures anew, by text.

    Args:
        tokenizer: tokenizer of the text encoder; may be None where embeddings are given.
        text_encoder: T5 encoder; may be None where embeddings are given.
        vae: autoencoder of the latents, or None for a transformer that works on pixels.
        transformer: a `LocalDiTTransformer2DModel` with `caption_channels`.
        scheduler: any of diffusers' samplers whose `prediction_type` fits the training.
        call_defaults: what a call uses where the caller says nothing: "height", "width" (pixels),
            "num_inference_steps", "guidance_scale", "img2img_guidance_scale" (for image to image, where it differs),
            "strength", "max_sequence_length"; and "aspect_ratio", which the transformer was trained with:
            "height/width" (PixArt's) or "width/height". Saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ]

    def __init__(
        self,
        tokenizer: T5Tokenizer | None,
        text_encoder: T5EncoderModel | None,
        vae: AutoencoderKL | None,
        transformer: ModelMixin,
        scheduler: KarrasDiffusionSchedulers,
        call_defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.initialize(call_defaults)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Paint the white part of the mask anew and leave every other pixel as it is.

        Where an argument is None the folder's `call_defaults` decide, so `pipe(prompt, image, mask_image)` gives the
        model's best.

        Args:
            prompt: one text or a list.
            image: one picture for all prompts or as many as there are prompts: PIL, numpy [H, W, 3] or [B, H, W, 3] in
                [0, 1], torch [B, 3, H, W] in [0, 1] or [-1, 1]; it is resized to `height` x `width`.
            mask_image: white (over one half) where to paint; one for all prompts or as many as there are prompts: PIL,
                numpy [H, W] or [B, H, W], torch [H, W] or [B, 1, H, W], in [0, 1]; resized like the picture.
            strength: how far the painted part may leave the picture, in [0, 1]: 0 returns it, 1 ignores what was there.
            negative_prompt: what to steer away from; None for the empty text. Unused where guidance is off.
            height, width: size in pixels, multiples of one token; by default the size the model was made for.
            num_inference_steps: denoising steps, at least 1.
            timesteps, sigmas: the sampler's own timesteps or sigmas instead of evenly chosen ones.
            guidance_scale: weight of classifier-free guidance (arXiv 2207.12598); 1 or less turns it off.
            num_images_per_prompt: pictures per prompt, at least 1.
            eta: noise of the DDIM sampler, in [0, 1]; other samplers ignore it.
            generator: one for all pictures, or a list with one for each, so that no picture depends on its batch.
            latents: the noise that is mixed into the picture, [B, in_channels, H, W], instead of drawing it.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask: from
                `encode_prompt`, instead of texts.
            max_sequence_length: tokens per text.
            output_type: "pil", "np" (float in [0, 1], [B, height, width, channels]), "pt" (channels first) or "latent".
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            attention_kwargs: passed to the transformer; "scale" weighs LoRA adapters.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after each step; the dict it returns
                replaces those tensors. A diffusers `PipelineCallback` brings its own tensor names.
            callback_on_step_end_tensor_inputs: names of the tensors it receives, among `_callback_tensor_inputs`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple whose first element are the images.

        Raises:
            ValueError, TypeError: for any argument out of its range, before any heavy work.
        """
        # 1. Check inputs
        height, width = self.default_size(height, width)
        num_inference_steps = self.call_default("num_inference_steps", num_inference_steps)
        guidance_scale = self.call_default("guidance_scale", guidance_scale)
        max_sequence_length = self.call_default("max_sequence_length", max_sequence_length)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_size(height, width)
        counts = {
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
        }
        self.check_sampling(
            counts,
            guidance_scale,
            eta,
            timesteps,
            sigmas,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        prompts = self.check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        batch_size = prompts * num_images_per_prompt
        self.check_generator(generator, batch_size)
        self.check_latents(latents, batch_size, height, width)
        self.check_strength(strength)
        self.check_image(image, prompts, height, width)
        self.check_mask(mask_image, prompts)
        device = self.begin(guidance_scale, attention_kwargs)

        # 2. Encode the prompt
        conditions = self.prompt_conditions(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_images_per_prompt,
            device,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )

        # 3. Prepare timesteps and latents
        schedule, self._num_timesteps = self.set_timesteps(
            num_inference_steps, timesteps, sigmas, height, width, device
        )
        schedule, self._num_timesteps = self.last_timesteps(schedule, self._num_timesteps, strength)
        clean = self.encode_image(image, batch_size, height, width, self.transformer.dtype, device)
        if latents is None:
            latents = self.prepare_noise(batch_size, height, width, self.transformer.dtype, device, generator)
        noise = latents.to(clean)
        mask = self.encode_mask(mask_image, batch_size, height, width, device)
        latent_mask = self.latent_mask(mask)
        latents = self.add_noise(clean, noise, schedule, strength)

        def keep_the_rest(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return torch.where(latent_mask, latents, self.noised(clean, noise, timesteps))

        # 4. Denoise
        latents = self.denoise(
            latents,
            schedule,
            conditions,
            height,
            width,
            generator,
            eta,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            after_step=keep_the_rest,
        )

        # 5. Decode, and put back the pixels that the mask leaves alone
        images = self.decode(latents, "latent" if output_type == "latent" else "pt")
        if output_type != "latent":
            images = torch.where(mask, images, self.kept_pixels(image, clean, height, width).to(images))
            images = self.to_output_type(images, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
