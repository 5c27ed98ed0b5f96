"""A whole pipeline from one file in the released LocalDiT's format."""

import os
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from transformers import AutoTokenizer, T5EncoderModel

# What the released LocalDiT was trained and is sampled with, beside its transformer.
RELEASED_TEXT_ENCODER = "google/flan-t5-xxl"
RELEASED_VAE = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"  # its folder "vae"
RELEASED_CALL_DEFAULTS = {
    "height": 768,
    "width": 1024,
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "strength": 0.8,
    "max_sequence_length": 120,
    "aspect_ratio": "width/height",
}
COMPONENTS = ("tokenizer", "text_encoder", "vae", "scheduler")


class LocalDiTSingleFileMixin:
    """Loading of a released checkpoint, with the components that it was trained and is sampled with."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        *,
        config: str | os.PathLike | dict[str, Any] | None = None,
        global_branch: str = "expected",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        """Assemble the pipeline of a checkpoint in the released LocalDiT's format.

        Args:
            pretrained_model_link_or_path, config, global_branch: as in `LocalDiTTransformer2DModel.from_single_file`.
            dtype, torch_dtype: of all weights; fp32 by default.
            kwargs: `tokenizer`, `text_encoder`, `vae` and `scheduler` where they are at hand (None for the first three
                does without); the others are those of the release, the first three from the Hub: google/flan-t5-xxl
                (9.5 GB in bf16) and the SDXL VAE. And what loading from the Hub takes: `cache_dir`, `token`,
                `local_files_only`, `force_download`, `proxies`, `revision` (of the checkpoint's link).

        Raises:
            ValueError: as the transformer's own `from_single_file`, and where a component cannot be had from the Hub.
        """
        dtype = dtype or torch_dtype or torch.float32
        components = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
        transformer = cls.__init__.__annotations__["transformer"].from_single_file(
            pretrained_model_link_or_path, config=config, global_branch=global_branch, dtype=dtype, **kwargs
        )
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        makers = {
            "tokenizer": lambda: AutoTokenizer.from_pretrained(RELEASED_TEXT_ENCODER, **kwargs),
            "text_encoder": lambda: T5EncoderModel.from_pretrained(RELEASED_TEXT_ENCODER, dtype=dtype, **kwargs),
            "vae": lambda: AutoencoderKL.from_pretrained(RELEASED_VAE, subfolder="vae", torch_dtype=dtype, **kwargs),
            # PixArt-Sigma's, which the release is sampled with: DPM-Solver++ of second order on linear betas
            "scheduler": lambda: DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2),
        }
        for name in (name for name in COMPONENTS if name not in components):
            try:
                components[name] = makers[name]()
            except OSError as error:
                source = RELEASED_VAE if name == "vae" else RELEASED_TEXT_ENCODER
                raise ValueError(
                    f"{name} was not given and {source} cannot be loaded from the Hub "
                    f"({str(error).splitlines()[0]}); give {name}=, or {name}=None to do without."
                ) from error
        for name, component in components.items():
            if isinstance(component, str | os.PathLike):
                raise TypeError(f"{name}={component!r} is no component; load it with from_pretrained, and give that.")
        call_defaults = RELEASED_CALL_DEFAULTS
        if components["vae"] is None:  # these sizes are of pixels, and without a VAE there are latents only
            call_defaults = {name: value for name, value in call_defaults.items() if name not in ("height", "width")}
        return cls(**components, transformer=transformer, call_defaults=call_defaults)
