"""Linear attention: the keys and values of all tokens are summed once, and every query reads the sum."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from localdit.mixers.base import TokenMixer
from localdit.mixers.chunks import chunk_tokens
from localdit.models.attention import LocalDiTAttention
from localdit.models.rope import rotate

# B batch, N tokens, H heads, D head dim

# non-negative, so that a token's weights over the others can be made to sum to one
FEATURE_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "elu": lambda states: F.elu(states) + 1,
    "softmax": lambda states: states.softmax(-1),
}

# sums are taken of a chunk by pieces: in fp32 they take more room than its projections, which want to be long
PIECES = 4

EPSILON = 1e-6  # a query that shares no feature with any key gets zeros, not a division by zero


class LinearAttnProcessor(TokenMixer):
    """Normalised kernel attention f(q) (f(K)^T V) / (f(q) sum f(k)) (arXiv 2006.16236), linear in the tokens.

    Every token sees every token. The rotary embedding turns the features in the numerator and leaves the denominator
    alone (arXiv 2104.09864, section 3.3), so that it stays positive. Sums are taken in fp32 whatever the precision.

    Args:
        feature_map: f. "relu" as in SANA (arXiv 2410.10629), "elu" for elu(x) + 1 (arXiv 2006.16236), or "softmax" over
            the channels of a head (arXiv 1812.01243).

    Raises:
        ValueError: for an unknown feature map.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        layer: int,
        rope_theta: float | None,
        *,
        feature_map: str = "relu",
    ):
        super().__init__(num_attention_heads, attention_head_dim, layer, rope_theta)
        if feature_map not in list(FEATURE_MAPS):  # what was given need not be hashable
            raise ValueError(f"feature_map={feature_map!r} is not known; choose among {sorted(FEATURE_MAPS)}.")
        self.feature_map = feature_map

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix [B, N, C]: at once, or chunk by chunk, once to sum up keys and values and once to read the sums."""
        tokens, length = hidden_states.shape[1], chunk_tokens(hidden_states)
        if length is None or length >= tokens:
            return attn.to_output(self.mix(*attn.to_query_key_value(hidden_states), grid))
        piece = max(1, length // PIECES)
        table = self.rotation(grid, hidden_states)
        tables = [
            None if table is None else (table[0][at : at + piece], table[1][at : at + piece])
            for at in range(0, tokens, piece)
        ]
        queries: list[torch.Tensor] = []
        weight = state = torch.zeros((), device=hidden_states.device)
        for chunk in hidden_states.split(piece * PIECES, dim=1):
            query, key, value = (states.split(piece, dim=1) for states in attn.to_query_key_value(chunk))
            for own in zip(key, value, tables[len(queries) :], strict=False):
                more = self.sums(*own, tokens)
                weight, state = weight + more[0], state + more[1]
            queries += query
        mixed = [self.read(*own, weight, state) for own in zip(queries, tables, strict=True)]
        return attn.to_output(torch.cat(mixed, dim=1))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        table = self.rotation(grid, query)
        return self.read(query, table, *self.sums(key, value, table, key.shape[1]))

    def sums(
        self, key: torch.Tensor, value: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What some keys and values [B, n, H, D] add to the sums of all `tokens`.

        Returns:
            The features [B, H, D], and the turned features times the values [B, H, D, D], both over `tokens`: means do
            not grow with the sequence, and the result is the same.
        """
        with torch.autocast(key.device.type, enabled=False):
            key = FEATURE_MAPS[self.feature_map](key.float())
            weight = key.sum(dim=1) / tokens
            return weight, torch.einsum("bnhd,bnhe->bhde", rotate(key, table), value.float()) / tokens

    def read(
        self,
        query: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor] | None,
        weight: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """The mixed values [B, n, H, D] of some queries [B, n, H, D], from the sums of all tokens."""
        with torch.autocast(query.device.type, enabled=False):
            features = FEATURE_MAPS[self.feature_map](query.float())
            share = torch.einsum("bnhd,bhd->bnh", features, weight) + EPSILON
            mixed = torch.einsum("bnhd,bhde->bnhe", rotate(features, table), state) / share.unsqueeze(-1)
        return mixed.to(query.dtype)
