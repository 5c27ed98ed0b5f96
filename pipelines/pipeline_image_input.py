"""What the LocalDiT pipelines that start from a picture share: checking, encoding and noising it."""

import reprlib

import numpy as np
import torch
from PIL import Image

# B pictures in the batch, C channels of the latents, H and W their size

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels


def single_pictures(image) -> list:
    """The pictures of a batch, a single picture, or a list of either."""
    if isinstance(image, list):
        return [picture for item in image for picture in single_pictures(item)]
    return list(image) if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4 else [image]


def check_picture(picture, channels: int, latents: bool) -> None:
    """Raise unless picture is readable and has pixels, `channels` channels and values in the documented range."""
    if isinstance(picture, Image.Image):
        if 0 in picture.size:
            raise ValueError(f"image is {picture.width} x {picture.height} pixels; give a picture of at least 1 x 1.")
        if channels not in PIL_MODES:
            raise ValueError(f"image is a PIL image, but this pipeline wants {channels} channels; give a tensor.")
        try:
            picture.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"image cannot be read ({error}); give a complete picture.") from error
        return
    if not isinstance(picture, np.ndarray | torch.Tensor):
        raise TypeError(
            f"image is or holds {reprlib.repr(picture)} of type {type(picture).__name__}; give a PIL image "
            "(diffusers.utils.load_image reads a path), a numpy array, a tensor or a list of them."
        )
    shape, axis = tuple(picture.shape), 0 if isinstance(picture, torch.Tensor) else -1
    if len(shape) != 3 or shape[axis] != channels or 0 in shape:
        layout = f"[height, width, {channels}]" if axis else f"[{channels}, height, width]"
        raise ValueError(f"image has a picture of shape {list(shape)}; give {layout} with at least one pixel.")
    values = torch.as_tensor(np.array(picture)) if isinstance(picture, np.ndarray) else picture
    if not values.isfinite().all():
        raise ValueError("image holds NaN or infinite numbers; give finite ones.")
    if latents or values.dtype == torch.uint8:
        return
    if not values.is_floating_point() or values.abs().max() > 1.1:  # a resized picture may be a little over 1
        raise ValueError(
            f"image has {values.dtype} values from {values.min():g} to {values.max():g}; "
            "give floats in [0, 1] or bytes (uint8)."
        )


def as_unit_range(picture, signed: bool):
    """A picture with values in [0, 1]: bytes are divided by 255, and `signed` values come from [-1, 1]."""
    if isinstance(picture, Image.Image):
        return picture
    if str(picture.dtype).endswith("uint8"):
        return picture / 255
    return ((picture + 1) / 2 if signed else picture).clip(0, 1)


class LocalDiTImageInputMixin:
    """From a picture and a strength to the noisy latents and the timesteps that are left."""

    def check_strength(self, strength) -> None:
        """Raise unless strength is a number in [0, 1]."""
        if not isinstance(strength, int | float | np.floating) or isinstance(strength, bool) or not 0 <= strength <= 1:
            raise ValueError(f"strength={strength!r} is not a number in [0, 1]; 0 returns the picture, 1 ignores it.")

    def check_image(self, image, prompts: int, height: int, width: int) -> None:
        """Raise unless image is one picture, or one for each prompt, that `encode_image` can read."""
        if image is None or (isinstance(image, list) and not image):
            raise ValueError("image is missing; give a PIL image, a numpy array, a tensor or a list of them.")
        pictures = single_pictures(image)
        if len(pictures) not in (1, prompts):
            raise ValueError(
                f"image holds {len(pictures)} pictures for {prompts} prompts; give one, or one for each prompt."
            )
        latents = self.is_latents(image)
        for picture in pictures:
            check_picture(picture, self.transformer.config.in_channels if latents else self.pixel_channels, latents)
        wanted = [height // self.vae_scale_factor, width // self.vae_scale_factor]
        if latents and list(image.shape[-2:]) != wanted:
            raise ValueError(
                f"image holds latents of {list(image.shape[-2:])}; {height} x {width} pixels want {wanted}."
            )

    @property
    def pixel_channels(self) -> int:
        """Channels of a picture."""
        if self.vae is None:
            return self.transformer.config.in_channels
        config = self.vae.config
        return config.get("in_channels") or config.encoder_in_channels  # the latter of a ConsistencyDecoderVAE

    def is_latents(self, image) -> bool:
        """Whether image is a tensor of latents, by its channels, rather than one of pixels."""
        if self.vae is None or not isinstance(image, torch.Tensor) or image.ndim < 3:
            return False
        return image.shape[-3] == self.transformer.config.in_channels != self.pixel_channels

    def last_timesteps(
        self, timesteps: torch.Tensor, num_inference_steps: int, strength: float
    ) -> tuple[torch.Tensor, int]:
        """The last `strength` of the schedule, and how many steps that is.

        A sampler with `use_flow_sigmas` starts at the step whose share of noise is nearest to `strength`, so a shift of
        the sigmas leaves its meaning as it is; other samplers count steps.
        """
        steps = min(round(num_inference_steps * strength), num_inference_steps)
        if self.scheduler.config.get("use_flow_sigmas", False) and 0 < strength < 1:
            noise = self.scheduler.sigmas[:num_inference_steps] - strength
            steps = num_inference_steps - int(noise.abs().argmin())
        first = (num_inference_steps - steps) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:] if steps else timesteps[:0], steps

    def encode_image(
        self, image, batch_size: int, height: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The clean latents of the picture(s), repeated to the batch, [B, C, H, W].

        A VAE's latents are the mode of its posterior, so they depend on no generator and no batch.
        """
        if self.is_latents(image):
            latents = image.reshape(-1, *image.shape[-3:]).to(device=device, dtype=dtype)
        else:
            pixels = self.image_pixels(image, height, width).to(device)
            latents = pixels.to(dtype)
            if self.vae is not None:
                config = self.vae.config
                latents = self.vae_encode(pixels.to(self.vae.dtype))
                latents = (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor
                latents = latents.to(dtype)
        return latents.repeat_interleave(batch_size // len(latents), dim=0)

    def image_pixels(self, image, height: int, width: int) -> torch.Tensor:
        """The picture(s) resized, in [-1, 1], one row for each."""
        pictures = single_pictures(image)
        # one picture alone may be all bright, so the whole batch tells the range; undershoot by resizing does not
        signed = any(not isinstance(picture, Image.Image) and picture.min() < -0.1 for picture in pictures)
        pictures = [as_unit_range(picture, signed) for picture in pictures]
        return torch.cat([self._preprocess(picture, height, width) for picture in pictures])

    def _preprocess(self, picture, height: int, width: int) -> torch.Tensor:
        if isinstance(picture, Image.Image):
            picture = picture.convert(PIL_MODES[self.pixel_channels])
        return self.image_processor.preprocess(picture, height=height, width=width)

    def add_noise(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """The latents at the first of `timesteps`: the picture where none are left, nothing but noise at strength 1."""
        if not len(timesteps):
            return clean
        if strength == 1:
            return noise * self.init_noise_sigma
        return self.noised(clean, noise, timesteps)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The picture as it would be at the first of `timesteps`, or clean where none are left."""
        if not len(timesteps):
            return clean
        start = timesteps[:1].expand(len(clean))
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            return self.scheduler.scale_noise(clean, start, noise)
        return self.scheduler.add_noise(clean, noise, start)
