"""The token mixers by name."""

import inspect
from collections.abc import Sequence

from localdit.mixers.base import TokenMixer
from localdit.mixers.full import FullAttnProcessor
from localdit.mixers.linear import LinearAttnProcessor
from localdit.mixers.sliding_window import SlidingWindowAttnProcessor
from localdit.mixers.ssm import BidirectionalSSMProcessor
from localdit.mixers.window import WindowAttnProcessor

MIXERS: dict[str, type[TokenMixer]] = {
    "full": FullAttnProcessor,
    "linear": LinearAttnProcessor,
    "sliding_window": SlidingWindowAttnProcessor,
    "ssm": BidirectionalSSMProcessor,
    "window": WindowAttnProcessor,
}


def mixer_option_names(name: str) -> list[str]:
    """The options of a mixer: the keyword-only arguments of its class."""
    parameters = inspect.signature(MIXERS[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def options_of_layer(mixer_options: dict[str, dict | list[dict]], name: str, layer: int) -> dict:
    """The options of the `layer`-th layer of the mixer `name`; a list of options is tiled over these layers."""
    options = mixer_options.get(name, {})
    return options if isinstance(options, dict) else options[layer % len(options)]


def mixer_names(token_mixers: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, in their order, as a tuple; raises a ValueError where they are no names."""
    names = (token_mixers,) if isinstance(token_mixers, str) else token_mixers
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"token_mixers={token_mixers!r} is neither a name nor a list of names; choose among {sorted(MIXERS)}."
        )
    return tuple(names)


def check_mixers(token_mixers: tuple[str, ...], mixer_options: dict[str, dict | list[dict]]) -> None:
    """Raise a ValueError that lists what is known where a mixer or one of its options is not.

    Args:
        token_mixers: names, tiled over the layers.
        mixer_options: for each mixer name its options by name, or a list of such options.
    """
    if not token_mixers:
        raise ValueError(f"token_mixers is empty; name at least one of {sorted(MIXERS)}.")
    if not isinstance(mixer_options, dict):
        raise ValueError(f"mixer_options={mixer_options!r} is not a dictionary that holds each mixer's options.")
    for name in (*token_mixers, *mixer_options):
        if name not in MIXERS:
            raise ValueError(f"token mixer {name!r} is not known; choose among {sorted(MIXERS)}.")
    for name, options in mixer_options.items():
        every = list(options) if isinstance(options, list | tuple) else [options]
        if not every or not all(isinstance(one, dict) for one in every):
            raise ValueError(
                f"mixer_options[{name!r}]={options!r} is not a dictionary of options by name, nor a list of such, "
                "one for each layer."
            )
        known = mixer_option_names(name)
        unknown = sorted({option for one in every for option in one} - set(known))
        if unknown:
            raise ValueError(f"mixer_options[{name!r}] has unknown option(s) {unknown}; {name!r} knows {known}.")
