"""Window attention: the grid is cut into small rectangles, and tokens attend inside their own."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from localdit.mixers.base import TokenMixer, TokenRun, rotation
from localdit.mixers.chunks import chunk_tokens
from localdit.mixers.local_kernel import check_kernel, kernel_takes, mix_by_kernel
from localdit.mixers.tables import kept
from localdit.models.attention import LocalDiTAttention, attend
from localdit.models.checks import check_bool, check_whole
from localdit.models.rope import grid_positions

# B batch, N tokens of the grid, W windows of one shape, n tokens of one window, G pooled tokens, H heads, D head dim

WINDOW_BACKENDS = ("dense", "triton")


@dataclass(frozen=True)
class WindowShape:
    """So many windows of one height and width, in tokens."""

    height: int
    width: int
    count: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class WindowLayout:
    """A grid's tokens sorted by window, the windows grouped by shape.

    Attributes:
        order: the row-major token at each place of the sorted sequence, shape [N].
        place: the inverse of `order`, shape [N].
        positions: row and column of each of the sequence's tokens on the grid, shape [N, 2].
        own_positions: the same, counted from the corner of the token's window.
        own_places: the same as the row-major token of a whole window, shape [N].
        shapes: the groups, in the order in which they stand in the sequence.
    """

    order: torch.Tensor
    place: torch.Tensor
    positions: torch.Tensor
    own_positions: torch.Tensor
    own_places: torch.Tensor
    shapes: tuple[WindowShape, ...]

    def runs(self, chunk_tokens: int | None, alike: bool = False) -> Iterator[tuple[WindowShape, ...]]:
        """Window groups of each run, in order: all at once for None, else whole windows of at most `chunk_tokens`.

        With `alike` a run has windows of one shape only.
        """
        if chunk_tokens is None:
            yield self.shapes
            return
        for shapes in [(shape,) for shape in self.shapes] if alike else [self.shapes]:
            yield from cut_into_runs(shapes, chunk_tokens)


@dataclass(frozen=True)
class PooledGrid:
    """A grid's tokens, averaged over the cells of a coarse grid.

    Attributes:
        states: the averages, shape [B, G, C].
        table: cosine and sine [G, 1, D / 2] of the turns of their keys, with RoPE.
    """

    states: torch.Tensor
    table: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class WindowRun(TokenRun):
    """Some windows. Its tensors say how many and how large, so that one graph serves many.

    Attributes:
        positions: for each shape of windows, row and column of their tokens, shape [W, n, 2]. They are counted from the
            window's corner, or with global context, which stands outside of it, on the grid.
        table: cosine and sine [n, 1, D / 2] of all tokens' turns, with RoPE.
        pooled: the whole grid, where the mixer has global context.
    """

    positions: tuple[torch.Tensor, ...]
    table: tuple[torch.Tensor, torch.Tensor] | None
    pooled: PooledGrid | None


def cut_into_runs(shapes: tuple[WindowShape, ...], chunk_tokens: int) -> Iterator[tuple[WindowShape, ...]]:
    """Groups of windows of at most `chunk_tokens` tokens, but at least a window.

    They are of about the same size, since a matrix product of few tokens takes as long to begin as one of many.
    """
    total = sum(shape.count * shape.tokens for shape in shapes)
    even = math.ceil(total / math.ceil(total / chunk_tokens)) + max(shape.tokens for shape in shapes) - 1
    room = length = min(chunk_tokens, even)
    run: list[WindowShape] = []
    for shape in shapes:
        left = shape.count
        while left:
            fitting = max(room // shape.tokens, int(not run))
            if count := min(left, fitting):
                run.append(WindowShape(shape.height, shape.width, count))
                left, room = left - count, room - count * shape.tokens
            if left:
                yield tuple(run)
                run, room = [], length
    yield tuple(run)


def cut_axis(length: int, window_size: int, shift: int) -> dict[int, list[int]]:
    """Cut an axis at shift, shift + window_size, ...; the pieces' starts, by their size (at most three sizes)."""
    cuts = [0, *range(shift or window_size, length, window_size), length]
    pieces: dict[int, list[int]] = {}
    for start, stop in zip(cuts, cuts[1:], strict=False):
        pieces.setdefault(stop - start, []).append(start)
    return pieces


def build_window_layout(
    height: int, width: int, window_size: int, shift: int, device: torch.device | None = None
) -> WindowLayout:
    """Sort the tokens of a grid by shifted window.

    Cutting the axes at the shift is the same as rolling the grid and masking what wrapped around (Swin, arXiv
    2103.14030), without the roll, the padding and the mask: windows at the border are simply smaller.
    """
    orders, own_positions, shapes = [], [], []
    for rows, tops in cut_axis(height, window_size, shift).items():
        for columns, lefts in cut_axis(width, window_size, shift).items():
            y = torch.tensor(tops, device=device)[:, None] + torch.arange(rows, device=device)
            x = torch.tensor(lefts, device=device)[:, None] + torch.arange(columns, device=device)
            tokens = y[:, None, :, None] * width + x[None, :, None, :]  # [windows down, windows across, rows, columns]
            orders.append(tokens.flatten())
            own_positions.append(grid_positions(rows, columns, device).repeat(len(tops) * len(lefts), 1))
            shapes.append(WindowShape(rows, columns, len(tops) * len(lefts)))
    order = torch.cat(orders)
    positions = torch.stack((order // width, order % width), dim=-1)
    own = torch.cat(own_positions)
    return WindowLayout(order, order.argsort(), positions, own, own[:, 0] * window_size + own[:, 1], tuple(shapes))


class WindowAttnProcessor(TokenMixer):
    """Tokens attend inside their own window; the windows shift from layer to layer, so that they meet.

    Any grid runs: the windows at its border are smaller, and nothing is padded.

    Args:
        window_size: height and width of a window, in tokens, at least 1.
        shift_schedule: `"swin"` alternates 0 and `window_size // 2` (arXiv 2103.14030), `"cyclic"` takes
            `layer % window_size` (the released LocalDiT), `"none"` never shifts; or a sequence of shifts, tiled.
        relative_position_bias: whether to learn a bias per head and offset inside the window (arXiv 2103.14030).
        global_context: side G' of the grid of pooled tokens that every window attends to beside its own tokens, so
            that a change anywhere reaches everywhere within one layer; the cost is linear, n + G'² keys a token.
            0 for none.
        backend: "dense", dense attention inside the windows, through any of diffusers' attention backends; or "triton",
            one kernel for norm, RoPE and attention in half precision on CUDA, without a bias (anywhere else, without
            the package triton and in streamed blocks the dense way takes over). Both give the same.

    Raises:
        ValueError: for a window, shift or context size out of range, an unknown schedule or backend, or a bias that the
            backend does not know.
    """

    local = True

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        layer: int,
        rope_theta: float | None,
        *,
        window_size: int = 4,
        shift_schedule: str | tuple[int, ...] = "swin",
        relative_position_bias: bool = False,
        global_context: int = 0,
        backend: str = "dense",
    ):
        super().__init__(num_attention_heads, attention_head_dim, layer, rope_theta)
        check_whole("window_size", window_size)
        check_whole("global_context", global_context, least=0)
        check_bool("relative_position_bias", relative_position_bias)
        if backend not in WINDOW_BACKENDS:
            raise ValueError(f"backend={backend!r} is not known; choose among {list(WINDOW_BACKENDS)}.")
        if backend == "triton":
            check_kernel(relative_position_bias)
        self.backend = backend
        self.window_size = window_size
        self.shift = scheduled_shift(shift_schedule, layer, window_size)
        self.global_context = global_context
        if relative_position_bias:
            offsets = (2 * window_size - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_attention_heads))
        else:
            self.relative_position_bias_table = None
        if global_context:
            # tells a pooled token from a token of the window
            self.context_embedding = nn.Parameter(torch.zeros(num_attention_heads * attention_head_dim))

    def forward(
        self,
        attn: LocalDiTAttention,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        run: WindowRun | None = None,
    ) -> torch.Tensor:
        """Mix [B, N, C] window by window: one gather in, one scatter out, and between them no token is moved.

        Or mix the windows of one `run`, [B, n, C].
        """
        if run is not None:
            return self.mix_run(attn, hidden_states, run)
        pooled = self.pool([hidden_states], grid)
        if self.backend == "triton" and kernel_takes(attn, hidden_states):
            table = self.rotation(grid, hidden_states)
            context = None if pooled is None else self.context(attn, pooled)
            return mix_by_kernel(attn, hidden_states, grid, self.window_size, self.shift, table, context)
        layout = self.layout(grid, hidden_states)
        runs = self.window_runs(layout, layout.runs(chunk_tokens(hidden_states)), grid, pooled, hidden_states)
        mixed = [self.mix_run(attn, hidden_states.index_select(1, run.tokens), run) for run in runs]
        return joined(mixed).index_select(1, layout.place)

    def layout(self, grid: tuple[int, int], states: torch.Tensor) -> WindowLayout:
        """The windows of a grid in this layer."""
        return kept(states, build_window_layout, *grid, self.window_size, self.shift, states.device)

    def runs(
        self,
        bands: Iterable[torch.Tensor],
        grid: tuple[int, int],
        chunk_tokens: int,
        states: torch.Tensor,
        alike: bool = False,
    ) -> Iterator[WindowRun]:
        layout = self.layout(grid, states)
        return self.window_runs(layout, layout.runs(chunk_tokens, alike), grid, self.pool(bands, grid), states)

    def window_runs(
        self,
        layout: WindowLayout,
        runs: Iterable[tuple[WindowShape, ...]],
        grid: tuple[int, int],
        pooled: PooledGrid | None,
        states: torch.Tensor,
    ) -> Iterator[WindowRun]:
        """The windows of a grid, run by run."""
        # RoPE sees differences only, and counted from the corner all windows of a shape are alike
        from_corner = pooled is None
        positions = layout.own_positions if from_corner else layout.positions
        places = layout.own_places if from_corner else layout.order
        turns = self.rotation((self.window_size, self.window_size) if from_corner else grid, states)
        start = 0
        for shapes in runs:
            lengths = [shape.count * shape.tokens for shape in shapes]
            own = slice(start, start := start + sum(lengths))
            parts = zip(positions[own].split(lengths), shapes, strict=True)
            table = (
                None
                if turns is None
                else (turns[0].index_select(0, places[own]), turns[1].index_select(0, places[own]))
            )
            yield WindowRun(
                tokens=layout.order[own],
                positions=tuple(part.unflatten(0, (shape.count, -1)) for part, shape in parts),
                table=table,
                pooled=pooled,
            )

    def mix_run(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, run: WindowRun) -> torch.Tensor:
        """Project the tokens of a run [B, n, C], attend inside their windows and project back."""
        context = None if run.pooled is None else self.context(attn, run.pooled)
        states = attn.to_query_key_value(hidden_states, run.table)
        tokens = [positions.shape[:2].numel() for positions in run.positions]
        parts = zip(*(state.split(tokens, dim=1) for state in states), strict=True)
        mixed = [
            self.mix_windows(*part, positions, context) for part, positions in zip(parts, run.positions, strict=True)
        ]
        return attn.to_output(joined(mixed))

    def mix_windows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attend inside windows of one shape, at `positions` [W, n, 2]: [B, W * n, H, D] to [B, W * n, H, D]."""
        windows = positions.shape[:2]
        query, key, value = (states.unflatten(1, windows) for states in (query, key, value))  # [B, W, n, H, D]
        if context is not None:
            key, value = (
                torch.cat((own, pooled[:, None].expand(-1, windows[0], -1, -1, -1)), dim=2)  # [B, W, n + G, H, D]
                for own, pooled in zip((key, value), context, strict=True)
            )
        bias = self.relative_position_bias(positions, key.shape[2], query.dtype)
        mixed = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias, self)
        return mixed.unflatten(0, query.shape[:2]).flatten(1, 2)

    def pool(self, bands: Iterable[torch.Tensor], grid: tuple[int, int]) -> PooledGrid | None:
        """Average the grid's tokens, given some rows [B, n, C] at a time; None without global context."""
        if not self.global_context:
            return None
        rows, columns = cells = min(self.global_context, grid[0]), min(self.global_context, grid[1])
        # first along each row, so that the bands need not be there together: [B, some rows, columns, C]
        across = joined([average(band.unflatten(1, (-1, grid[1])), columns) for band in bands])
        states = average(across.flatten(2), rows).unflatten(-1, (columns, -1)).flatten(1, 2)
        if self.rope_theta is None:
            return PooledGrid(states, None)
        turn = (*grid, *cells, self.attention_head_dim, self.rope_theta, states.device)
        return PooledGrid(states, kept(states, pooled_rotation, *turn))

    def context(self, attn: LocalDiTAttention, pooled: PooledGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, G, H, D] that every window attends to beside its own."""
        return attn.to_key_value(pooled.states + self.context_embedding, pooled.table)

    def relative_position_bias(self, positions: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The learned bias of a window's scores, [1, H, n, keys]; pooled keys, which come last, have none."""
        if self.relative_position_bias_table is None:
            return None
        window = positions[0]  # [n, 2], alike for all windows but for where they start
        offsets = window[:, None] - window[None] + self.window_size - 1  # [n, n, 2]
        index = offsets[..., 0] * (2 * self.window_size - 1) + offsets[..., 1]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1).to(dtype)  # [H, n, n]
        return F.pad(bias, (0, keys - len(window)))[None]


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [B, n, ...] of a sequence, one after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def pooled_rotation(
    height: int, width: int, rows: int, columns: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [G, 1, D / 2] that turn the states of a grid's cells, by their centres."""
    scale = torch.tensor((height / rows, width / columns), device=device)
    return rotation((grid_positions(rows, columns, device) + 0.5) * scale - 0.5, head_dim, theta)


def average(states: torch.Tensor, cells: int) -> torch.Tensor:
    """The means over the cells of an axis, [..., length, C] to [..., cells, C]; uneven ones share what both reach.

    Torch's adaptive pooling, which wants channels first, copies a picture to turn it; a product with 0 and 1 does not.
    """
    inside, counts = kept(states, cells_of_axis, states.shape[-2], cells, states.dtype, states.device)
    return inside @ states / counts


def cells_of_axis(
    length: int, cells: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a place of an axis is in a cell, else 0, [cells, length]; and how many are in each, [cells, 1]."""
    places, cell = torch.arange(length, device=device), torch.arange(cells, device=device).unsqueeze(-1)
    inside = (places >= cell * length // cells) & (places * cells < (cell + 1) * length)
    return inside.to(dtype), inside.sum(-1, keepdim=True)


def scheduled_shift(shift_schedule: str | tuple[int, ...], layer: int, window_size: int) -> int:
    """The shift of the windows in the `layer`-th window layer, in tokens, within [0, window_size)."""
    if shift_schedule == "swin":
        return window_size // 2 if layer % 2 else 0
    if shift_schedule == "cyclic":
        return layer % window_size
    if shift_schedule == "none":
        return 0
    if not isinstance(shift_schedule, tuple | list) or not shift_schedule:
        raise ValueError(
            f"shift_schedule={shift_schedule!r} is not known; choose 'swin', 'cyclic', 'none' or a sequence of shifts."
        )
    for shift in shift_schedule:
        if not isinstance(shift, int) or isinstance(shift, bool) or not 0 <= shift < window_size:
            raise ValueError(
                f"shift {shift!r} in shift_schedule is no whole number in [0, {window_size}), the window's size."
            )
    return shift_schedule[layer % len(shift_schedule)]
