"""What inpainting needs beside a picture: reading a mask, and the picture's own pixels."""

import reprlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# B pictures in the batch, H and W of the picture in pixels


def single_masks(mask_image) -> list:
    """The masks of a batch, a single mask, or a list of either."""
    if isinstance(mask_image, list):
        return [mask for item in mask_image for mask in single_masks(item)]
    if isinstance(mask_image, np.ndarray) and mask_image.ndim >= 3 and mask_image.shape[-1] == 1:
        mask_image = mask_image[..., 0]  # numpy's channels come last
    batch = {np.ndarray: 3, torch.Tensor: 4}.get(type(mask_image))
    return list(mask_image) if batch is not None and mask_image.ndim == batch else [mask_image]


def as_plane(mask) -> torch.Tensor:
    """A mask as floats in [0, 1], [H, W]; raises where it is none."""
    if isinstance(mask, Image.Image):
        if 0 in mask.size:
            raise ValueError(f"mask_image is {mask.width} x {mask.height} pixels; give a mask of at least 1 x 1.")
        try:
            mask.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"mask_image cannot be read ({error}); give a complete picture.") from error
        if mask.mode.startswith(("I", "F")):
            raise ValueError(f"mask_image has PIL mode {mask.mode!r}; convert it to 'L', black and white.")
        return torch.from_numpy(np.array(mask.convert("L"))).float() / 255
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise TypeError(
            f"mask_image is or holds {reprlib.repr(mask)} of type {type(mask).__name__}; give a PIL image, a numpy "
            "array, a tensor or a list of them."
        )
    plane = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
    plane = plane[0] if plane.ndim == 3 and len(plane) == 1 else plane
    if plane.ndim != 2 or not plane.numel():
        raise ValueError(f"mask_image has a mask of shape {list(mask.shape)}; give [height, width].")
    plane = plane.float() / 255 if plane.dtype == torch.uint8 else plane.float()
    if not plane.isfinite().all() or plane.min() < 0 or plane.max() > 1:
        raise ValueError(f"mask_image has values from {plane.min():g} to {plane.max():g}; give 0 to 1, or bytes.")
    return plane


class LocalDiTMaskInputMixin:
    """From a mask to what is painted, in pixels and in latents."""

    def check_mask(self, mask_image, prompts: int) -> None:
        """Raise unless mask_image is one mask, or one for each prompt, that `encode_mask` can read."""
        if mask_image is None or (isinstance(mask_image, list) and not mask_image):
            raise ValueError("mask_image is missing; give a picture that is white where to paint.")
        masks = single_masks(mask_image)
        if len(masks) not in (1, prompts):
            raise ValueError(
                f"mask_image holds {len(masks)} masks for {prompts} prompts; give one, or one for each prompt."
            )
        for mask in masks:
            as_plane(mask)

    def encode_mask(self, mask_image, batch_size: int, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Where to paint, bool [B, 1, H, W], repeated to the batch."""
        planes = [
            F.interpolate(as_plane(mask)[None, None], size=(height, width), mode="bilinear", antialias=True)
            for mask in single_masks(mask_image)
        ]
        mask = torch.cat(planes).to(device) > 0.5
        return mask.repeat_interleave(batch_size // len(mask), dim=0)

    def latent_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Which latents are painted, bool: those of which any pixel is, so that nothing masked is left as it was."""
        return F.max_pool2d(mask.float(), self.vae_scale_factor) > 0

    def kept_pixels(self, image, clean: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The picture(s) as they come out where nothing is painted, in [0, 1], [B, C, H, W].

        Pixels come out as they went in; an image that came as latents is decoded from `clean`, [B, C, h, w].
        """
        if self.is_latents(image):
            return self.decode(clean, "pt")
        pixels = self.image_pixels(image, height, width)
        return (pixels / 2 + 0.5).clamp(0, 1).repeat_interleave(len(clean) // len(pixels), dim=0)

    def to_output_type(self, images: torch.Tensor, output_type: str) -> Any:
        """Pictures in [0, 1], [B, C, H, W], as the asked type."""
        keep = [False] * len(images)
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=keep)
