"""Window attention: the grid is cut into small rectangles, and tokens attend inside their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from localdit.mixers.base import TokenMixer
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

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix [B, N, C] window by window: one gather in, one scatter out, and between them no token is moved."""
        # neither a graph nor a fake tensor may leave its own layout to others
        cacheable = type(hidden_states) is torch.Tensor and not torch.compiler.is_compiling()
        layout_of = cached_window_layout if cacheable else build_window_layout
        layout = layout_of(*grid, self.window_size, self.shift, hidden_states.device)
        context = self.pool_context(attn, hidden_states, grid) if self.global_context else None
        positions = grid_positions(*grid, device=hidden_states.device)[layout.order] if context is not None else None
        hidden_states = hidden_states.index_select(1, layout.order)

        mixed = []
        for start, shapes in layout.runs(self.chunk_tokens(hidden_states)):
            stop = start + sum(shape.count * shape.tokens for shape in shapes)
            run_positions = positions[start:stop] if positions is not None else None
            mixed.append(self.mix_run(attn, hidden_states[:, start:stop], shapes, run_positions, context))
        return torch.cat(mixed, dim=1).index_select(1, layout.place)

    def chunk_tokens(self, hidden_states: torch.Tensor) -> int | None:
        """Tokens per picture in one run, or None for all at once: in training, in a graph, off the CPU."""
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return max(1, CHUNK_TOKENS // max(1, hidden_states.shape[0]))

    def mix_run(
        self,
        attn: LocalDiTAttention,
        hidden_states: torch.Tensor,
        shapes: tuple[WindowShape, ...],
        positions: torch.Tensor | None,
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Project, attend and project back a run of whole windows [B, tokens of the run, C]."""
        query, key, value = attn.to_query_key_value(hidden_states)
        mixed, start = [], 0
        for shape in shapes:
            part = slice(start, start + shape.count * shape.tokens)
            start = part.stop
            split = (shape.count, shape.tokens)
            windows = [states[:, part].unflatten(1, split) for states in (query, key, value)]  # [B, W, n, H, D]
            if positions is None:
                # RoPE sees differences only, so one table counted from the corner serves every window.
                window_positions = grid_positions(shape.height, shape.width, device=query.device)
            else:
                window_positions = positions[part].unflatten(0, split)
            mixed.append(self.mix_windows(*windows, shape, window_positions, context).flatten(1, 2))
        return attn.to_output(torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0])

    def mix_windows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shape: WindowShape,
        positions: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attend inside windows of one shape, [B, W, n, H, D] to [B, W, n, H, D]."""
        query, key = self.rotate(positions, query, key)
        if context is not None:
            windows = query.shape[1]
            key, value = (
                torch.cat((own, pooled[:, None].expand(-1, windows, -1, -1, -1)), dim=2)  # [B, W, n + G, H, D]
                for own, pooled in zip((key, value), context, strict=True)
            )
        bias = self.relative_position_bias(shape, key.shape[2], query.dtype)
        mixed = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias, self)
        return mixed.unflatten(0, query.shape[:2])

    def pool_context(
        self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, G, H, D] of the grid's tokens [B, N, C], averaged over a coarse grid of cells."""
        cells = min(self.global_context, grid[0]), min(self.global_context, grid[1])
        planes = hidden_states.mT.unflatten(-1, grid)  # [B, C, height, width]
        pooled = F.adaptive_avg_pool2d(planes, cells).flatten(2).mT  # [B, G, C]
        _, key, value = attn.to_query_key_value(pooled + self.context_embedding)
        # a cell stands at its centre, in tokens of the grid
        scale = torch.tensor([side / count for side, count in zip(grid, cells, strict=True)], device=key.device)
        centres = (grid_positions(*cells, device=key.device) + 0.5) * scale - 0.5
        (key,) = self.rotate(centres, key)
        return key, value

    def relative_position_bias(self, shape: WindowShape, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The learned bias of a window's scores, [1, H, n, keys]; pooled keys, which come last, have none."""
        if self.relative_position_bias_table is None:
            return None
        positions = grid_positions(shape.height, shape.width, device=self.relative_position_bias_table.device)
        offsets = positions[:, None] - positions[None] + self.window_size - 1  # [n, n, 2]
        index = offsets[..., 0] * (2 * self.window_size - 1) + offsets[..., 1]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1).to(dtype)  # [H, n, n]
        return F.pad(bias, (0, keys - shape.tokens))[None]


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
