"""Window attention: the grid is cut into small rectangles, and tokens attend inside their own."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from localdit.mixers.base import TokenMixer, TokenRun
from localdit.mixers.chunks import chunk_tokens
from localdit.mixers.local_kernel import check_kernel, kernel_takes, mix_by_kernel
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
        shapes: the groups, in the order in which they stand in the sequence.
    """

    order: torch.Tensor
    place: torch.Tensor
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
        centres: row and column of each cell's centre, in tokens of the grid, shape [G, 2].
    """

    states: torch.Tensor
    centres: torch.Tensor


@dataclass(frozen=True)
class WindowRun(TokenRun):
    """Some windows. Its tensors say how many and how large, so that one graph serves many.

    Attributes:
        positions: for each shape of windows, row and column of their tokens, shape [W, n, 2]. They are counted from the
            window's corner, or with global context, which stands outside of it, on the grid.
        pooled: the whole grid, where the mixer has global context.
    """

    positions: tuple[torch.Tensor, ...]
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
        if self.backend == "triton" and kernel_takes(hidden_states):
            context = None if pooled is None else self.context(attn, pooled)
            return mix_by_kernel(attn, hidden_states, grid, self.window_size, self.shift, self.rope_theta, context)
        # neither a graph nor a fake tensor may leave its own layout to others
        cacheable = type(hidden_states) is torch.Tensor and not torch.compiler.is_compiling()
        layout = self.layout(grid, hidden_states.device, cacheable)
        runs = layout.runs(chunk_tokens(hidden_states))
        runs = self.window_runs(layout, runs, grid, pooled)
        mixed = [self.mix_run(attn, hidden_states.index_select(1, run.tokens), run) for run in runs]
        return torch.cat(mixed, dim=1).index_select(1, layout.place)

    def layout(self, grid: tuple[int, int], device: torch.device, cacheable: bool) -> WindowLayout:
        """The windows of a grid in this layer."""
        layout_of = cached_window_layout if cacheable else build_window_layout
        return layout_of(*grid, self.window_size, self.shift, device)

    def runs(
        self,
        bands: Iterable[torch.Tensor],
        grid: tuple[int, int],
        chunk_tokens: int,
        device: torch.device,
        alike: bool = False,
    ) -> Iterator[WindowRun]:
        layout = self.layout(grid, device, cacheable=not torch.compiler.is_compiling())
        return self.window_runs(layout, layout.runs(chunk_tokens, alike), grid, self.pool(bands, grid))

    def window_runs(
        self,
        layout: WindowLayout,
        runs: Iterable[tuple[WindowShape, ...]],
        grid: tuple[int, int],
        pooled: PooledGrid | None,
    ) -> Iterator[WindowRun]:
        """The windows of a grid, run by run."""
        start = 0
        for shapes in runs:
            tokens = layout.order[start : start + sum(shape.count * shape.tokens for shape in shapes)]
            start += len(tokens)
            if pooled is None:
                # RoPE sees differences only, and in the same positions all windows of a shape are alike
                corners = [grid_positions(shape.height, shape.width, device=tokens.device) for shape in shapes]
                positions = [own.expand(shape.count, -1, -1) for own, shape in zip(corners, shapes, strict=True)]
            else:
                places = torch.stack((tokens // grid[1], tokens % grid[1]), dim=-1)
                parts = places.split([shape.count * shape.tokens for shape in shapes])
                positions = [own.unflatten(0, (shape.count, -1)) for own, shape in zip(parts, shapes, strict=True)]
            yield WindowRun(tokens, tuple(positions), pooled)

    def mix_run(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, run: WindowRun) -> torch.Tensor:
        """Project the tokens of a run [B, n, C], attend inside their windows and project back."""
        context = None if run.pooled is None else self.context(attn, run.pooled)
        table = self.rotation(torch.cat([positions.flatten(0, 1) for positions in run.positions]))
        states = attn.to_query_key_value(hidden_states, table)
        tokens = [positions.shape[:2].numel() for positions in run.positions]
        parts = zip(*(state.split(tokens, dim=1) for state in states), strict=True)
        mixed = [
            self.mix_windows(*part, positions, context) for part, positions in zip(parts, run.positions, strict=True)
        ]
        return attn.to_output(mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1))

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
        across = torch.cat([average(band.unflatten(1, (-1, grid[1])), columns) for band in bands], dim=1)
        states = average(across.flatten(2), rows).unflatten(-1, (columns, -1)).flatten(1, 2)
        scale = torch.tensor([side / count for side, count in zip(grid, cells, strict=True)], device=states.device)
        return PooledGrid(states, (grid_positions(*cells, device=states.device) + 0.5) * scale - 0.5)

    def context(self, attn: LocalDiTAttention, pooled: PooledGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, G, H, D] that every window attends to beside its own."""
        return attn.to_key_value(pooled.states + self.context_embedding, self.rotation(pooled.centres))

    def relative_position_bias(self, positions: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The learned bias of a window's scores, [1, H, n, keys]; pooled keys, which come last, have none."""
        if self.relative_position_bias_table is None:
            return None
        window = positions[0]  # [n, 2], alike for all windows but for where they start
        offsets = window[:, None] - window[None] + self.window_size - 1  # [n, n, 2]
        index = offsets[..., 0] * (2 * self.window_size - 1) + offsets[..., 1]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1).to(dtype)  # [H, n, n]
        return F.pad(bias, (0, keys - len(window)))[None]


def average(states: torch.Tensor, cells: int) -> torch.Tensor:
    """The means over the cells of an axis, [..., length, C] to [..., cells, C]; uneven ones share what both reach.

    Torch's adaptive pooling, which wants channels first, copies a picture to turn it; a product with 0 and 1 does not.
    """
    length = states.shape[-2]
    places, cell = torch.arange(length, device=states.device), torch.arange(cells, device=states.device).unsqueeze(-1)
    inside = (places >= cell * length // cells) & (places * cells < (cell + 1) * length)  # [cells, length]
    return inside.to(states.dtype) @ states / inside.sum(-1, keepdim=True)


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
