"""Sliding-window attention through torch's FlexAttention, which skips the blocks of keys that no query sees."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# B batch, N tokens of the grid, H heads, D head dim


def is_neighbour(query: torch.Tensor, key: torch.Tensor, length: int, kernel_size: int, dilation: int) -> torch.Tensor:
    """Whether a position of an axis is one of the `kernel_size` that another one attends to, moved inwards."""
    phase = query % dilation
    places = (length - phase + dilation - 1) // dilation  # positions of the same phase
    size = places.clamp(max=kernel_size)
    start = (query // dilation - kernel_size // 2).clamp(min=0)
    start = torch.minimum(start, places - size)
    place = key // dilation
    return (key % dilation == phase) & (place >= start) & (place < start + size)


def build_block_mask(height: int, width: int, kernel_size: int, dilation: int, device: torch.device) -> BlockMask:
    """The mask of a grid, row-major, with its empty blocks left out."""

    def mask(batch, head, query, key):
        rows = is_neighbour(query // width, key // width, height, kernel_size, dilation)
        return rows & is_neighbour(query % width, key % width, width, kernel_size, dilation)

    return create_block_mask(mask, None, None, height * width, height * width, device=str(device))


cached_block_mask = lru_cache(maxsize=16)(build_block_mask)


@cache
def compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def bias_by_offset(table: torch.Tensor, width: int, kernel_size: int, dilation: int) -> Callable:
    """What FlexAttention does to a score: add the entry of `table` [(2 k - 1)², H] for the offset of query and key."""
    reach = 2 * kernel_size - 2

    def add_bias(score, batch, head, query, key):
        rows = torch.div(query // width - key // width, dilation, rounding_mode="floor") + kernel_size - 1
        columns = torch.div(query % width - key % width, dilation, rounding_mode="floor") + kernel_size - 1
        # the offsets of masked keys may leave the table, and count for nothing
        return score + table[rows.clamp(0, reach) * (reach + 1) + columns.clamp(0, reach), head]

    return add_bias


def attend_by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    kernel_size: int,
    dilation: int,
    bias_table: torch.Tensor | None,
) -> torch.Tensor:
    """Attend inside the neighbourhoods of [B, N, H, D]; `bias_table` [(2 k - 1)², H] is added by offset."""
    inside_graph = torch.compiler.is_compiling()
    mask_of = build_block_mask if inside_graph else cached_block_mask
    # uncompiled it computes all scores, which is right but slow; compiling for a CPU takes longer than it saves
    flex = compiled_flex_attention() if query.device.type == "cuda" and not inside_graph else flex_attention
    mixed = flex(
        *(states.transpose(1, 2) for states in (query, key, value)),
        score_mod=bias_by_offset(bias_table, grid[1], kernel_size, dilation) if bias_table is not None else None,
        block_mask=mask_of(*grid, kernel_size, dilation, query.device),
    )
    return mixed.transpose(1, 2)
