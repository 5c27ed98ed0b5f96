"""The networks that a run leaves as they are, autoencoder and text encoder: where they lie, and loading them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from config import TextEncoderConfig, TrainConfig

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer.json", "spiece.model")


def load_vae(source: str | Path | None) -> AutoencoderKL | None:
    """The autoencoder of a folder or Hub id, in fp32, or None for a model that works on pixels."""
    if source is None:
        return None
    try:
        return AutoencoderKL.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(
            f"vae={str(source)!r} holds no autoencoder; train one with python -m train.autoencoder, or name its folder."
        ) from error


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The latents [B, C, h, w] that a transformer works on, of pixels [B, 3, H, W] in [-1, 1]."""
    latents = vae.encode(pixels).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def vae_skeleton(source: str | Path | None) -> AutoencoderKL | None:
    """The autoencoder's sizes without its weights, which take no memory on the meta device."""
    if source is None:
        return None
    with init_empty_weights():
        return AutoencoderKL.from_config(AutoencoderKL.load_config(source))  # pyright: ignore


def load_text_encoder(config: TextEncoderConfig) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    """The tokenizer and the T5 encoder, in fp32, of a pipeline's folder or of a T5's folder or Hub id."""
    tokenizer, folders = load_tokenizer(config), text_folders(str(config.pretrained))
    try:
        return tokenizer, T5EncoderModel.from_pretrained(folders[1], dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _no_text_encoder(config, error) from error


def load_tokenizer(config: TextEncoderConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, set to the config's length."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_folders(str(config.pretrained))[0])
    except (OSError, ValueError) as error:
        raise _no_text_encoder(config, error) from error
    tokenizer.model_max_length = config.max_sequence_length
    return tokenizer


def text_width(config: TextEncoderConfig) -> int:
    """The width D of the encoder's states, without loading it."""
    return T5Config.from_pretrained(text_folders(str(config.pretrained))[1]).d_model


def text_folders(source: str) -> tuple[str, str]:
    """Where the tokenizer and the T5 encoder are: in two folders of a pipeline, or both in one place."""
    folders = (Path(source) / "tokenizer", Path(source) / "text_encoder")
    return (str(folders[0]), str(folders[1])) if all(folder.is_dir() for folder in folders) else (source, source)


def _no_text_encoder(config: TextEncoderConfig, error: Exception) -> ValueError:
    return ValueError(
        f"text_encoder.pretrained={config.pretrained!r} holds no T5 encoder with its tokenizer "
        f"({str(error).splitlines()[0]}); name its folder or Hub id, or train one with python -m train.text_encoder."
    )


def on_disk(config: TrainConfig) -> TrainConfig:
    """The config with `vae` and `text_encoder.pretrained` as folders, also where `pretrained` or Hub ids name them.

    Raises:
        ValueError: where the text encoder is not a frozen one that lies somewhere.
    """
    vae, text = config.vae, config.text_encoder
    if config.pretrained is not None:
        pipeline = local_folder(config.pretrained)
        vae = str(pipeline / "vae") if (pipeline / "vae").is_dir() else None
        text = replace(text, pretrained=str(pipeline))
        if (pipeline / "tokenizer").is_dir():  # a pipeline's texts are as long as its own tokenizer makes them
            own = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
            text = replace(text, max_sequence_length=own.model_max_length)
    elif vae is not None:
        vae = str(local_folder(vae))
    if config.pretrained is not None or config.model.caption_channels is not None:
        if not text.frozen or text.pretrained is None:
            raise ValueError(
                "What is computed beforehand needs a text encoder that stays as it is; set text_encoder.frozen to true "
                "and text_encoder.pretrained to its folder."
            )
        text = replace(text, pretrained=str(local_folder(text.pretrained)))
    return replace(config, vae=vae, text_encoder=text)


def local_folder(source: str) -> Path:
    """A folder, or the local copy of a repository of the Hub, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.safetensors"]))


def digest(folder: str | Path, patterns: tuple[str, ...] = WEIGHTS) -> str:
    """The SHA-256 of the weights (or other files) in a folder, whatever the folder is called."""
    files = sorted({file for pattern in patterns for file in Path(folder).glob(pattern)})
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
