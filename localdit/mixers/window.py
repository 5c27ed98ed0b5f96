"""Window attention: the grid is cut into small rectangles, and tokens attend inside their own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from localdit.mixers.base import TokenMixer, TokenRun
from localdit.models.attention import LocalDiTAttention, attend
from localdit.models.checks import check_bool, check_whole
from localdit.models.rope import grid_positions

# B batch, N tokens of the grid, W windows of one shape, n tokens of one window, G pooled tokens, H heads, D head dim

# On a CPU, query, key and value of so many tokens stay in the cache between projection and attention.
CHUNK_TOKENS = 1024


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
        shapes: the groups, in the order in which they stand in the sequence.
    """

    order: torch.Tensor
    place: torch.Tensor
    shapes: tuple[WindowShape, ...]

    def runs(self, chunk_tokens: int | None) -> Iterator[tuple[int, tuple[WindowShape, ...]]]:
        """Start and window groups of each run: all at once for None, else whole windows of about `chunk_tokens`."""
        start = 0
        if chunk_tokens is None:
            yield start, self.shapes
            return
        for shape in self.shapes:
            windows = max(1, chunk_tokens // shape.tokens)
            for first in range(0, shape.count, windows):
                run = WindowShape(shape.height, shape.width, min(windows, shape.count - first))
                yield start, (run,)
                start += run.count * run.tokens


@dataclass(frozen=True)
class PooledGrid:
    """A grid's tokens, averaged over the cells of a coarse grid.

    Attributes:
        states: the averages, shape [B, G, C].
        centres: row and column of each cell's centre, in tokens of the grid, shape [G, 2].
    """

    states: torch.Tensor
    centres: torch.Tensor


@dataclass(frozen=True)
class WindowRun(TokenRun):
    """Some windows of one shape. Its tensors say how many and how large, so that one graph serves many.

    Attributes:
        positions: row and column of a window's tokens, counted from its corner, shape [n, 2]; with global context,
            which stands outside of it, those of every window on the grid, shape [W, n, 2].
        pooled: the whole grid, where the mixer has global context.
    """

    positions: torch.Tensor
    pooled: PooledGrid | None


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
    orders, shapes = [], []
    for rows, tops in cut_axis(height, window_size, shift).items():
        for columns, lefts in cut_axis(width, window_size, shift).items():
            y = torch.tensor(tops, device=device)[:, None] + torch.arange(rows, device=device)
            x = torch.tensor(lefts, device=device)[:, None] + torch.arange(columns, device=device)
            tokens = y[:, None, :, None] * width + x[None, :, None, :]  # [windows down, windows across, rows, columns]
            orders.append(tokens.flatten())
            shapes.append(WindowShape(rows, columns, len(tops) * len(lefts)))
    order = torch.cat(orders)
    return WindowLayout(order, order.argsort(), tuple(shapes))


@lru_cache(maxsize=64)
def cached_window_layout(height: int, width: int, window_size: int, shift: int, device: torch.device) -> WindowLayout:
    # A tensor born in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return build_window_layout(height, width, window_size, shift, device)


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

    Raises:
        ValueError: for a window, shift or context size out of range, or an unknown schedule.
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
    ):
        super().__init__(num_attention_heads, attention_head_dim, layer, rope_theta)
        check_whole("window_size", window_size)
        check_whole("global_context", global_context, least=0)
        check_bool("relative_position_bias", relative_position_bias)
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
            return self.mix_runs(attn, hidden_states, [run])
        # neither a graph nor a fake tensor may leave its own layout to others
        cacheable = type(hidden_states) is torch.Tensor and not torch.compiler.is_compiling()
        layout = self.layout(grid, hidden_states.device, cacheable)
        pooled = self.pool([hidden_states], grid)
        hidden_states = hidden_states.index_select(1, layout.order)
        mixed = []
        for start, shapes in layout.runs(self.chunk_tokens(hidden_states)):
            runs = list(self.window_runs(layout, start, shapes, grid, pooled))
            stop = start + sum(len(run.tokens) for run in runs)
            mixed.append(self.mix_runs(attn, hidden_states[:, start:stop], runs))
        return torch.cat(mixed, dim=1).index_select(1, layout.place)

    def layout(self, grid: tuple[int, int], device: torch.device, cacheable: bool) -> WindowLayout:
        """The windows of a grid in this layer."""
        layout_of = cached_window_layout if cacheable else build_window_layout
        return layout_of(*grid, self.window_size, self.shift, device)

    def runs(
        self, bands: Iterable[torch.Tensor], grid: tuple[int, int], chunk_tokens: int, device: torch.device
    ) -> Iterator[WindowRun]:
        pooled = self.pool(bands, grid)
        layout = self.layout(grid, device, cacheable=not torch.compiler.is_compiling())
        for start, shapes in layout.runs(chunk_tokens):
            yield from self.window_runs(layout, start, shapes, grid, pooled)

    def window_runs(
        self,
        layout: WindowLayout,
        start: int,
        shapes: tuple[WindowShape, ...],
        grid: tuple[int, int],
        pooled: PooledGrid | None,
    ) -> Iterator[WindowRun]:
        """One run for each shape, from place `start` of the sorted sequence on."""
        for shape in shapes:
            tokens = layout.order[start : start + shape.count * shape.tokens]
            start += len(tokens)
            if pooled is None:
                # RoPE sees differences only, so one table counted from the corner serves every window
                positions = grid_positions(shape.height, shape.width, device=tokens.device)
            else:
                positions = torch.stack((tokens // grid[1], tokens % grid[1]), dim=-1).unflatten(0, (-1, shape.tokens))
            yield WindowRun(tokens, positions, pooled)

    def chunk_tokens(self, hidden_states: torch.Tensor) -> int | None:
        """Tokens per picture in one run, or None for all at once: in training, in a graph, off the CPU."""
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return max(1, CHUNK_TOKENS // max(1, hidden_states.shape[0]))

    def mix_runs(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, runs: list[WindowRun]) -> torch.Tensor:
        """Project the tokens of some runs [B, n, C], attend inside their windows and project back."""
        pooled = runs[0].pooled
        context = None if pooled is None else self.context(attn, pooled)
        states = attn.to_query_key_value(hidden_states)
        if len(runs) == 1:
            return attn.to_output(self.mix_windows(*states, runs[0].positions, context))
        parts = zip(*(state.split([len(run.tokens) for run in runs], dim=1) for state in states), strict=True)
        mixed = [self.mix_windows(*part, run.positions, context) for run, part in zip(runs, parts, strict=True)]
        return attn.to_output(torch.cat(mixed, dim=1))

    def mix_windows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attend inside windows of one shape, [B, W * n, H, D] to [B, W * n, H, D]."""
        tokens = positions.shape[-2]
        query, key, value = (states.unflatten(1, (-1, tokens)) for states in (query, key, value))  # [B, W, n, H, D]
        query, key = self.rotate(positions, query, key)
        if context is not None:
            windows = query.shape[1]
            key, value = (
                torch.cat((own, pooled[:, None].expand(-1, windows, -1, -1, -1)), dim=2)  # [B, W, n + G, H, D]
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
        # first along each row, so that the bands need not be there together
        planes = (band.mT.unflatten(-1, (-1, grid[1])) for band in bands)  # [B, C, some rows, width]
        across = torch.cat([F.adaptive_avg_pool2d(plane, (plane.shape[2], columns)) for plane in planes], dim=2)
        states = F.adaptive_avg_pool2d(across, (rows, columns)).flatten(2).mT
        scale = torch.tensor([side / count for side, count in zip(grid, cells, strict=True)], device=states.device)
        return PooledGrid(states, (grid_positions(*cells, device=states.device) + 0.5) * scale - 0.5)

    def context(self, attn: LocalDiTAttention, pooled: PooledGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, G, H, D] that every window attends to beside its own."""
        _, key, value = attn.to_query_key_value(pooled.states + self.context_embedding)
        (key,) = self.rotate(pooled.centres, key)
        return key, value

    def relative_position_bias(self, positions: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The learned bias of a window's scores, [1, H, n, keys]; pooled keys, which come last, have none."""
        if self.relative_position_bias_table is None:
            return None
        window = positions if positions.ndim == 2 else positions[0]  # [n, 2], alike for all but for where they start
        offsets = window[:, None] - window[None] + self.window_size - 1  # [n, n, 2]
        index = offsets[..., 0] * (2 * self.window_size - 1) + offsets[..., 1]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1).to(dtype)  # [H, n, n]
        return F.pad(bias, (0, keys - len(window)))[None]


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
    shift = shift_schedule[layer % len(shift_schedule)]
    if not isinstance(shift, int) or not 0 <= shift < window_size:
        raise ValueError(
            f"shift {shift!r} in shift_schedule is no whole number in [0, {window_size}), the window's size."
        )
    return shift
