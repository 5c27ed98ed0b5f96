"""LoRA: small trainable matrices beside the frozen ones of a pipeline, saved alone."""

from pathlib import Path

import torch

from config import LoraConfig, TrainConfig
from localdit import LocalDiTTransformer2DModel
from train.components import Networks

FOLDER = "lora"  # in output_dir


def check_lora(config: TrainConfig) -> None:
    """Raise where adapters were asked for that could not be trained."""
    if not config.lora.rank:
        return
    if config.pretrained is None:
        raise ValueError("lora.rank needs a model to adapt; name its pipeline by pretrained.")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("lora.rank needs the package peft; pip install peft.") from error


def add_lora(networks: Networks, config: LoraConfig) -> None:
    """Freeze the networks and put adapters beside the transformer's layers that `target_modules` names.

    Raises:
        ValueError: where no layer has such a name.
    """
    import peft

    transformer = networks.denoiser.transformer
    networks.denoiser.requires_grad_(False)
    try:
        transformer.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha if config.alpha is not None else config.rank,  # pyright: ignore
                lora_dropout=config.dropout,
                target_modules=list(config.target_modules),
                use_dora=config.use_dora,
            )
        )
    except ValueError as error:
        layers = {name.rpartition("transformer_blocks.")[2].partition(".")[2] for name, _ in linear_layers(transformer)}
        raise ValueError(
            f"lora.target_modules={list(config.target_modules)} name no layer of the transformer; choose among "
            f"{sorted(layers)} or the ends of such names."
        ) from error


def linear_layers(transformer: LocalDiTTransformer2DModel) -> list[tuple[str, torch.nn.Module]]:
    """The linear layers of the blocks."""
    named = transformer.named_modules()
    return [(name, part) for name, part in named if "blocks." in name and isinstance(part, torch.nn.Linear)]


def save_lora(transformer: LocalDiTTransformer2DModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapters, with their settings, as `load_lora_weights` reads them."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    from localdit import LocalDiTPipeline

    layers = {name: tensor.to(dtype).cpu() for name, tensor in get_peft_model_state_dict(transformer).items()}
    LocalDiTPipeline.save_lora_weights(folder, layers, **_collate_lora_metadata({"transformer": transformer}))
