"""The way to local attention in one kernel of a GPU, for those who have the package triton."""

import importlib
import importlib.util
import os
from typing import Any

import torch

from localdit.models.attention import LocalDiTAttention
from localdit.models.head_norm import HeadRMSNorm

# B batch, N tokens of the grid, C width of a token, G pooled tokens, H heads, D head dim

WIDEST_HEAD = 96


def check_kernel(relative_position_bias: bool) -> None:
    """Make the kernel's operation known to torch, where it can be; raise if something is asked that it does not do."""
    if relative_position_bias:
        raise ValueError("backend='triton' has no relative_position_bias; leave `backend` out, which has.")
    if all(importlib.util.find_spec(package) for package in ("triton", "localdit")):
        # diffusers runs exported code only where whatever it imports by statement is installed
        importlib.import_module("localdit.mixers.local_kernel_op")


def kernel_takes(attn: LocalDiTAttention, hidden_states: torch.Tensor) -> bool:
    """Whether the kernel is known and good for such states: in half precision on CUDA, or in Triton's interpreter.

    But not for heads too wide for the memory that a GPU's programs share, nor where weights lie elsewhere, offloaded,
    since only a call of the norm would fetch its own.
    """
    device = hidden_states.device
    weights_there = not isinstance(attn.norm_q, HeadRMSNorm) or attn.norm_q.weight.device == device
    if not hasattr(torch.ops.localdit, "local_attention") or not weights_there:
        return False
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
    if device.type == "cpu":  # the interpreter multiplies bf16 wrongly
        return os.environ.get("TRITON_INTERPRET") == "1" and dtype in (torch.float32, torch.float16)
    mixer: Any = attn.get_processor()
    narrow = mixer.attention_head_dim <= WIDEST_HEAD
    return narrow and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def mix_by_kernel(
    attn: LocalDiTAttention,
    hidden_states: torch.Tensor,
    grid: tuple[int, int],
    size: int,
    shift: int | None,
    table: tuple[torch.Tensor, torch.Tensor] | None,
    context: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Project [B, N, C], attend inside windows of `size` cut at `shift`, or in squares for None, and project back.

    Args:
        table: cosine and sine [N, 1, D / 2] of the grid's turns, with RoPE.
        context: key and value [B, G, H, D], ready, of tokens that every query attends to beside its own.
    """
    query, key, value = attn.project(hidden_states)
    normed = isinstance(attn.norm_q, HeadRMSNorm)
    mixed, _ = torch.ops.localdit.local_attention(
        *(query, key, value),
        *((attn.norm_q.weight, attn.norm_k.weight) if normed else (None, None)),
        *((state.to(query.dtype) for state in context) if context else (None, None)),
        *(table or (None, None)),
        *(*grid, size, shift or 0, shift is not None),
        attn.norm_q.eps if normed else 0.0,
    )
    return attn.to_output(mixed)
