"""What the model and its mixers refuse in their settings."""

import math
from numbers import Integral, Real
from typing import Any

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
