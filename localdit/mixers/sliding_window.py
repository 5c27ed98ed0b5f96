"""Sliding-window attention: every token attends to the square of tokens around it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from localdit.mixers.base import TokenMixer
from localdit.mixers.chunks import chunk_tokens
from localdit.mixers.local_kernel import check_kernel, kernel_takes, mix_by_kernel
from localdit.mixers.sliding_window_flex import attend_by_flex
from localdit.mixers.sliding_window_natten import attend_by_natten, check_natten, natten_takes
from localdit.mixers.tables import kept
from localdit.models.attention import LocalDiTAttention, attend
from localdit.models.checks import check_bool, check_whole

# B batch, N tokens of the grid, T tiles of one kind, n queries of a tile, m keys of a tile, H heads, D head dim

# Queries of so many rows and columns share the keys around them; larger tiles have fewer, but more masked, keys.
TILE = 8

SLIDING_WINDOW_BACKENDS = ("tiles", "flex", "natten", "triton")


@dataclass(frozen=True)
class AxisTile:
    """Neighbouring positions on one axis and the positions that any of them attends to.

    Attributes:
        queries, keys: positions on the axis.
        kept: for each query which of the keys are its own.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    kept: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Tiles:
    """Tiles of the grid that look alike but for their place.

    Attributes:
        queries, keys: row-major tokens, shapes [T, n] and [T, m].
        kept: which keys are a query's own, shape [n, m]; None where all are.
        offsets: row and column of each query less those of each key, in steps of the dilation, shape [n, m, 2].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    kept: torch.Tensor | None
    offsets: torch.Tensor

    def runs(self, tokens: int | None) -> Iterator["Tiles"]:
        """The same tiles, as many at a time as have `tokens` keys together, but at least one; all at once for None."""
        count = len(self.keys) if tokens is None else max(1, tokens // self.keys.shape[1])
        for queries, keys in zip(self.queries.split(count), self.keys.split(count), strict=True):
            yield replace(self, queries=queries, keys=keys)


def neighbours(position: int, length: int, kernel_size: int) -> range:
    """The `kernel_size` positions around one, moved inwards where they would leave the axis (as NATTEN does)."""
    size = min(kernel_size, length)
    start = min(max(position - kernel_size // 2, 0), length - size)
    return range(start, start + size)


def tile_axis(length: int, kernel_size: int, dilation: int) -> list[AxisTile]:
    """Cut an axis into tiles; with a dilation, each of the interleaved axes on its own."""
    tiles = []
    for phase in range(min(dilation, length)):
        places = range(phase, length, dilation)
        for start in range(0, len(places), TILE):
            queries = range(start, min(start + TILE, len(places)))
            own = [neighbours(query, len(places), kernel_size) for query in queries]
            keys = range(own[0].start, own[-1].stop)
            kept = tuple(tuple(key in neighbourhood for key in keys) for neighbourhood in own)
            tiles.append(AxisTile(tuple(places[i] for i in queries), tuple(places[i] for i in keys), kept))
    return tiles


def build_tiles(
    height: int, width: int, kernel_size: int, dilation: int, device: torch.device | None = None
) -> tuple[tuple[Tiles, ...], torch.Tensor]:
    """Tiles of a grid, grouped by look, and the place of each row-major token in the sequence of all their queries."""
    groups: dict[tuple, list[tuple[AxisTile, AxisTile]]] = {}
    rows, columns = tile_axis(height, kernel_size, dilation), tile_axis(width, kernel_size, dilation)
    for pair in itertools.product(rows, columns):
        look = tuple((tile.kept, tuple(key - tile.queries[0] for key in tile.keys)) for tile in pair)
        groups.setdefault(look, []).append(pair)

    def tokens(pairs: list, part: str) -> torch.Tensor:
        """Row-major tokens of each pair's positions, [T, positions]."""
        y, x = (torch.tensor([getattr(pair[axis], part) for pair in pairs], device=device) for axis in (0, 1))
        return (y[:, :, None] * width + x[:, None, :]).flatten(1)

    tiles = []
    for pairs in groups.values():
        row, column = pairs[0]
        row_kept, column_kept = (torch.tensor(tile.kept, dtype=torch.bool, device=device) for tile in (row, column))
        kept = (row_kept[:, None, :, None] & column_kept[None, :, None, :]).flatten(2).flatten(0, 1)  # [n, m]
        queries, keys = tokens(pairs, "queries"), tokens(pairs, "keys")
        places = [torch.stack((part[0] // width, part[0] % width), dim=-1) for part in (queries, keys)]
        offsets = (places[0][:, None] - places[1][None]) // dilation
        everything = all(all(line) for tile in (row, column) for line in tile.kept)
        tiles.append(Tiles(queries, keys, None if everything else kept, offsets))
    order = torch.cat([group.queries.flatten() for group in tiles])
    return tuple(tiles), order.argsort()


def gather(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The states [B, N, H, D] of tokens [T, n], tile by tile: [B * T, n, H, D]."""
    # copies whole rows, and adds gradients up by rows, where indexing by [T, n] goes element by element
    return states.index_select(1, tokens.flatten()).unflatten(1, tokens.shape).flatten(0, 1)


class SlidingWindowAttnProcessor(TokenMixer):
    """Each token attends to the `kernel_size` x `kernel_size` square of tokens around it (arXiv 2204.07143).

    At the border the square moves inwards, so every token has as many keys (all there are, on smaller grids). Queries
    are taken in tiles that share the keys around them, so the cost is linear in the number of tokens.

    Args:
        kernel_size: side of the square, in tokens, at least 1; an odd number has the token in its middle.
        dilation: step between the tokens of the square (arXiv 2209.15001), at least 1.
        relative_position_bias: whether to learn a bias per head and offset inside the square.
        backend: "tiles", dense attention inside tiles of queries, through any of diffusers' attention backends; "flex",
            torch's FlexAttention, for CUDA above all (on a CPU in inference only); "natten", the package of that name,
            without a bias (on a CPU in inference only, and where a side of the grid is shorter than
            `kernel_size * dilation` the tiles take over); "triton", one kernel for norm, RoPE and attention
            in half precision on CUDA, without a bias (anywhere else, without the package triton and with a dilation the
            tiles take over). All give the same.

    Raises:
        ValueError: for a size or step out of range, an unknown backend, or a bias that the backend does not know.
        ImportError: for a backend whose package is missing.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        layer: int,
        rope_theta: float | None,
        *,
        kernel_size: int = 7,
        dilation: int = 1,
        relative_position_bias: bool = False,
        backend: str = "tiles",
    ):
        super().__init__(num_attention_heads, attention_head_dim, layer, rope_theta)
        for name, value in {"kernel_size": kernel_size, "dilation": dilation}.items():
            check_whole(name, value)
        check_bool("relative_position_bias", relative_position_bias)
        if backend not in SLIDING_WINDOW_BACKENDS:
            raise ValueError(f"backend={backend!r} is not known; choose among {list(SLIDING_WINDOW_BACKENDS)}.")
        if backend == "natten":
            check_natten(relative_position_bias)
        if backend == "triton":
            check_kernel(relative_position_bias)
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.backend = backend
        if relative_position_bias:
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros((2 * kernel_size - 1) ** 2, num_attention_heads)
            )
        else:
            self.relative_position_bias_table = None

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.backend == "triton" and self.dilation == 1 and kernel_takes(attn, hidden_states):
            table = self.rotation(grid, hidden_states)
            return mix_by_kernel(attn, hidden_states, grid, self.kernel_size, None, table)
        return super().forward(attn, hidden_states, grid)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        square = (grid, self.kernel_size, self.dilation)
        # torch has no backward of FlexAttention on a CPU, where NATTEN uses it too; the tiles give the same
        forward_only = query.device.type == "cpu" and torch.is_grad_enabled()
        if self.backend == "flex" and not forward_only:
            return attend_by_flex(query, key, value, *square, self.relative_position_bias_table)
        if self.backend == "natten" and natten_takes(*square) and not forward_only:
            return attend_by_natten(query, key, value, *square)
        tiles, place = kept(query, build_tiles, *grid, self.kernel_size, self.dilation, query.device)
        tokens = chunk_tokens(query)
        mixed = [self.mix_tiles(query, key, value, run) for group in tiles for run in group.runs(tokens)]
        return torch.cat(mixed, dim=1).index_select(1, place)

    def mix_tiles(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        """Attend inside tiles of one look; returns their queries' values, [B, T * n, H, D]."""
        query = gather(query, tiles.queries)  # [B * T, n, H, D]
        key, value = gather(key, tiles.keys), gather(value, tiles.keys)  # [B * T, m, H, D]
        mixed = attend(query, key, value, self.attention_mask(tiles, query.dtype), self)
        return mixed.unflatten(0, (-1, len(tiles.queries))).flatten(1, 2)

    def attention_mask(self, tiles: Tiles, dtype: torch.dtype) -> torch.Tensor | None:
        """The tiles' mask, bool [1, 1, n, m], or with a learned bias what is added to the scores, [1, H, n, m]."""
        if self.relative_position_bias_table is None:
            return None if tiles.kept is None else tiles.kept[None, None]
        # offsets of masked keys may leave the table, and count for nothing
        offsets = (tiles.offsets + self.kernel_size - 1).clamp(0, 2 * self.kernel_size - 2)
        index = offsets[..., 0] * (2 * self.kernel_size - 1) + offsets[..., 1]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None].to(dtype)
        return bias if tiles.kept is None else bias.masked_fill(~tiles.kept, float("-inf"))
