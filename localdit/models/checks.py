"""What the model and its mixers refuse in their settings."""

import math
from numbers import Integral, Real
from typing import Any


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
