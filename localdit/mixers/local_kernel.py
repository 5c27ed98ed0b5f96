"""The way to local attention in one kernel of a GPU, for those who have the package triton."""

import importlib
import importlib.util
import os

import torch

from localdit.models.attention import LocalDiTAttention
from localdit.models.head_norm import HeadRMSNorm

# B batch, N tokens of the grid, C width of a token, G pooled tokens, H heads, D head dim


def check_kernel(relative_position_bias: bool) -> None:
    """Make the kernel's operation known to torch, where it can be; raise if something is asked that it does not do."""
    if relative_position_bias:
        raise ValueError("backend='triton' has no relative_position_bias; leave `backend` out, which has.")
    if all(importlib.util.find_spec(package) for package in ("triton", "localdit")):
        # diffusers runs exported code only where whatever it imports by statement is installed
        importlib.import_module("localdit.mixers.local_kernel_op")


def kernel_takes(hidden_states: torch.Tensor) -> bool:
    """Whether the kernel is known and good for such states: in half precision on CUDA, or in Triton's interpreter."""
    if not hasattr(torch.ops.localdit, "local_attention"):
        return False
    if hidden_states.device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return hidden_states.device.type == "cuda" and hidden_states.dtype in (torch.bfloat16, torch.float16)


def mix_by_kernel(
    attn: LocalDiTAttention,
    hidden_states: torch.Tensor,
    grid: tuple[int, int],
    size: int,
    shift: int | None,
    rope_theta: float | None,
    context: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Project [B, N, C], attend inside windows of `size` cut at `shift`, or in squares for None, and project back.

    Args:
        context: key and value [B, G, H, D], ready, of tokens that every query attends to beside its own.
    """
    normed = isinstance(attn.norm_q, HeadRMSNorm)
    mixed, _ = torch.ops.localdit.local_attention(
        *attn.project(hidden_states),
        *((attn.norm_q.weight, attn.norm_k.weight) if normed else (None, None)),
        *(context or (None, None)),
        *(*grid, size, shift or 0, shift is not None),
        rope_theta,
        attn.norm_q.eps if normed else 0.0,
    )
    return attn.to_output(mixed)
