"""What the LocalDiT pipelines that start from a picture share: checking, encoding and noising it."""

import numpy as np
import torch
from diffusers.image_processor import is_valid_image_imagelist
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import retrieve_latents
from PIL import Image

# B pictures in the batch, C channels of the latents, H and W their size


class LocalDiTImageInputMixin:
    """From a picture and a strength to the noisy latents and the timesteps that are left."""

    def check_strength(self, strength: float) -> None:
        """Raise unless strength is a number in [0, 1]."""
        if not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise ValueError(f"strength={strength!r} is outside [0, 1]; 0 returns the picture, 1 ignores it.")

    def check_image(self, image, prompts: int) -> None:
        """Raise unless image is of a type the image processor reads, not empty, and one or as many as prompts."""
        if image is None:
            raise ValueError("image is missing; give a PIL image, a numpy array, a tensor or a list of them.")
        if isinstance(image, list) and not image:
            raise ValueError("image is an empty list; give at least one picture.")
        if not is_valid_image_imagelist(image):
            raise TypeError(
                f"image has type {type(image).__name__}, which is not a picture; "
                "give a PIL image, a numpy array, a tensor or a list of them."
            )
        for picture in image if isinstance(image, list) else [image]:
            if isinstance(picture, Image.Image):
                empty, unreal = 0 in picture.size, False
            else:
                empty = 0 in picture.shape
                unreal = (
                    not np.isfinite(picture).all() if isinstance(picture, np.ndarray) else not picture.isfinite().all()
                )
            if empty:
                raise ValueError("image has no pixels; give a picture of at least 1 x 1.")
            if unreal:
                raise ValueError("image holds NaN or infinite numbers; give finite ones.")
        batched = not isinstance(image, list | Image.Image) and image.ndim == 4
        pictures = len(image) if isinstance(image, list) or batched else 1
        if prompts % pictures:
            raise ValueError(
                f"image holds {pictures} pictures for {prompts} prompts; give one, or one for each prompt."
            )

    def last_timesteps(
        self, timesteps: torch.Tensor, num_inference_steps: int, strength: float
    ) -> tuple[torch.Tensor, int]:
        """The last `strength` of the schedule, and how many steps that is."""
        steps = min(round(num_inference_steps * strength), num_inference_steps)
        first = (num_inference_steps - steps) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:], steps

    def encode_image(
        self,
        image,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The clean latents of the picture(s), repeated to the batch, [B, C, H, W]."""
        channels = self.transformer.config.in_channels
        if self.vae is not None and isinstance(image, torch.Tensor) and image.shape[-3] == channels != 3:
            latents = image.reshape(-1, *image.shape[-3:]).to(device=device, dtype=dtype)
        else:
            pixels = self.image_processor.preprocess(image, height=height, width=width).to(device=device)
            latents = pixels.to(dtype)
            if self.vae is not None:
                latents = self._encode_pixels(pixels.to(self.vae.dtype), generator).to(dtype)
        return latents.repeat_interleave(batch_size // len(latents), dim=0)

    def _encode_pixels(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        if isinstance(generator, list):
            rows = [
                retrieve_latents(self.vae.encode(pixels[index : index + 1]), generator=generator[index])
                for index in range(len(pixels))
            ]
            latents = torch.cat(rows)
        else:
            latents = retrieve_latents(self.vae.encode(pixels), generator=generator)
        config = self.vae.config
        return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor

    def add_noise(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """The latents at the first of `timesteps`: the picture where none are left, nothing but noise at strength 1."""
        if not len(timesteps):
            return clean
        if strength == 1:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        start = timesteps[:1].expand(len(clean))
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            return self.scheduler.scale_noise(clean, start, noise)
        return self.scheduler.add_noise(clean, noise, start)
