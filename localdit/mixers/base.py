"""The contract a token mixer signs: image tokens in, image tokens out, the grid as an argument."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from localdit.mixers.tables import kept
from localdit.models.attention import LocalDiTAttention
from localdit.models.checks import check_real
from localdit.models.rope import grid_positions, rotary_table

# B batch, N tokens (grid height * grid width), H heads, D head dim


@dataclass(frozen=True)
class TokenRun:
    """Tokens that a mixer takes by themselves.

    Attributes:
        tokens: which of the row-major tokens, in the order in which they are given, shape [n].
    """

    tokens: torch.Tensor


def rotation(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [N, 1, D / 2] that turn states [B, N, H, D] at `positions` [N, 2], all heads by one angle."""
    cosine, sine = rotary_table(positions, head_dim, theta)
    return cosine.unsqueeze(1), sine.unsqueeze(1)


def grid_rotation(
    height: int, width: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [N, 1, D / 2] that turn the states [B, N, H, D] of a grid."""
    return rotation(grid_positions(height, width, device), head_dim, theta)


class TokenMixer(nn.Module):
    """Owns what all mixers share (projections, norms, RoPE, output); a subclass says who attends to whom.

    A subclass writes `mix`. Its own settings are keyword-only arguments of its `__init__`, which become its
    `mixer_options`; what it learns are `nn.Parameter`s, which the optimizer and the checkpoint then both see.

    Args:
        num_attention_heads: H.
        attention_head_dim: D.
        layer: how many layers before this one carry the same mixer (shift schedules count by it).
        rope_theta: base of the rotary embedding, or None for none.
    """

    # names of parameters that the optimizer is to move slowly and without weight decay
    slow_parameters: tuple[str, ...] = ()
    # whether tokens meet in small sets only, so that `runs` can name them and `forward` take one
    local: bool = False

    _attention_backend = None
    _parallel_config = None

    def __init__(self, num_attention_heads: int, attention_head_dim: int, layer: int, rope_theta: float | None):
        super().__init__()
        if rope_theta is not None:
            check_real("rope_theta", rope_theta)
        if rope_theta is not None and attention_head_dim % 4:
            raise ValueError(
                f"attention_head_dim={attention_head_dim} is not a multiple of 4, which the two-dimensional rotary "
                "embedding needs (two axes, channels in pairs); choose a multiple of 4 or rope_theta=None."
            )
        self.num_attention_heads = num_attention_heads
        self.attention_head_dim = attention_head_dim
        self.layer = layer
        self.rope_theta = rope_theta

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix the tokens of [B, N, C], row-major on `grid` = (height, width) with N = height * width."""
        table = self.rotation(grid, hidden_states)
        return attn.to_output(self.mix(*attn.to_query_key_value(hidden_states, table), grid))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the mixed values [B, N, H, D] of query, key and value [B, N, H, D]."""
        raise NotImplementedError

    def runs(
        self,
        bands: Iterable[torch.Tensor],
        grid: tuple[int, int],
        chunk_tokens: int,
        states: torch.Tensor,
        alike: bool = False,
    ) -> Iterator[TokenRun]:
        """Runs of about `chunk_tokens` of the grid's tokens, of which none meets a token of another run.

        A local mixer's `forward` takes such a run as its last argument, beside the tokens [B, n, C] that it names.

        Args:
            bands: all tokens of the grid, some rows [B, n, C] at a time, for a mixer that sums them up beforehand.
            grid: (height, width) in tokens.
            chunk_tokens: tokens of a run, of each picture.
            states: of the tokens, of which the device counts.
            alike: make runs that differ in numbers only, so that one compiled graph serves many of them.
        """
        raise NotImplementedError

    def rotation(self, grid: tuple[int, int], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine [N, 1, D / 2] that turn the states [B, N, H, D] of a grid, with RoPE."""
        if self.rope_theta is None:
            return None
        return kept(states, grid_rotation, *grid, self.attention_head_dim, self.rope_theta, states.device)
