"""What the model and its mixers refuse in their settings."""

import math
from numbers import Integral, Real
from typing import Any

import torch

FEED_FORWARDS = ("mlp", "mix_ffn")
QK_NORMS = ("rms_norm", None)

# what diffusers' FeedForward knows
ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `least`; True and False are none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_real(name: str, value: Any, above: float = 0.0) -> None:
    """Raise a ValueError unless `value` is a finite number above `above`; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool) or not above < float(value) < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number above {above:g}.")


def check_bool(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_settings(config: dict[str, Any]) -> None:
    """Raise a ValueError for a setting that is by itself out of range or not known."""
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size"):
        check_whole(name, config[name])
    for name in ("out_channels", "caption_channels", "num_classes"):
        if config[name] is not None:
            check_whole(name, config[name])
    check_real("norm_eps", config["norm_eps"])
    check_real("qk_norm_eps", config["qk_norm_eps"])
    if config["interpolation_scale"] is not None:
        check_real("interpolation_scale", config["interpolation_scale"])
    check_bool("attention_bias", config["attention_bias"])
    check_bool("attention_residual", config["attention_residual"])
    if config["use_additional_conditions"] is not None:
        check_bool("use_additional_conditions", config["use_additional_conditions"])
    dropout = config["dropout"]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is outside [0, 1).")
    check_real("mlp_ratio", config["mlp_ratio"])
    choices = {"activation_fn": ACTIVATIONS, "feed_forward": FEED_FORWARDS, "qk_norm": QK_NORMS}
    for name, known in choices.items():
        if config[name] not in known:
            raise ValueError(f"{name}={config[name]!r} is not known; choose among {list(known)}.")


def check_sizes(
    dim: int,
    sample_size: int,
    patch_size: int,
    caption_channels: int | None,
    num_classes: int | None,
    use_additional_conditions: bool,
    mlp_ratio: float,
) -> None:
    """Raise a ValueError where settings that are right by themselves do not go together; `dim` is a token's width."""
    if dim % 4:
        raise ValueError(
            f"num_attention_heads * attention_head_dim = {dim} is not a multiple of 4, as the sin-cos positions need."
        )
    if sample_size % patch_size:
        raise ValueError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}.")
    if caption_channels and num_classes:
        raise ValueError(
            f"caption_channels={caption_channels} and num_classes={num_classes} exclude each other; set one to None."
        )
    if use_additional_conditions and dim % 3:
        raise ValueError(
            f"use_additional_conditions splits the width {dim} into three; choose a width that is a multiple of 3, "
            "or use_additional_conditions=False."
        )
    if mlp_ratio * dim < 1:
        raise ValueError(
            f"mlp_ratio={mlp_ratio} of the width {dim} leaves the feed-forward no channel; give at least 1 / {dim}."
        )


def check_labels(class_labels: Any, batch_size: int, num_classes: int) -> None:
    """Raise a ValueError unless these are labels for a batch, in [0, num_classes]."""
    wanted = f"give a tensor of shape [batch] with labels 0 to {num_classes - 1}, or {num_classes} for no label"
    if class_labels is None:
        raise ValueError(f"class_labels is missing; {wanted}.")
    if not isinstance(class_labels, torch.Tensor) or class_labels.dtype not in (torch.int32, torch.int64):
        what = class_labels.dtype if isinstance(class_labels, torch.Tensor) else type(class_labels).__name__
        raise ValueError(f"class_labels is of type {what}, not of whole numbers; {wanted}.")
    if class_labels.shape not in ((), (1,), (batch_size,)):
        raise ValueError(f"class_labels has shape {list(class_labels.shape)} for {batch_size} pictures; {wanted}.")
    # on an accelerator it would have to be waited for, and a graph does not know them
    if class_labels.device.type != "cpu" or type(class_labels) is not torch.Tensor or torch.compiler.is_compiling():
        return
    if outside := [label for label in class_labels.flatten().tolist() if not 0 <= label <= num_classes]:
        raise ValueError(f"class_labels holds {outside[0]}; {wanted}.")
