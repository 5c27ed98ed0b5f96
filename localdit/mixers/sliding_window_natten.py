"""Sliding-window attention through NATTEN's fused kernels (arXiv 2403.04690), for those who have the package."""

import importlib
import importlib.util

import torch

# B batch, N tokens of the grid, H heads, D head dim


def check_natten(relative_position_bias: bool) -> None:
    """Raise unless the package is there, and nothing is asked of it that it does not do."""
    if importlib.util.find_spec("natten") is None:
        raise ImportError(
            "backend='natten' needs the package natten, which is not installed; install it (its page says how for your "
            "CUDA), or set backend='tiles', which gives the same."
        )
    if relative_position_bias:
        raise ValueError("backend='natten' has no relative_position_bias; set backend='tiles' or 'flex'.")


def natten_takes(grid: tuple[int, int], kernel_size: int, dilation: int) -> bool:
    """Whether a grid is wide enough: NATTEN wants a whole dilated neighbourhood, and of more than one token."""
    return kernel_size > 1 and min(grid) >= kernel_size * dilation


def attend_by_natten(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    kernel_size: int,
    dilation: int,
) -> torch.Tensor:
    """Attend inside the neighbourhoods of [B, N, H, D]."""
    # diffusers runs exported code only where whatever it imports by statement is installed
    na2d = importlib.import_module("natten").na2d
    query, key, value = (states.unflatten(1, grid) for states in (query, key, value))
    return na2d(query, key, value, kernel_size=kernel_size, dilation=dilation).flatten(1, 2)
