"""Linear attention: the keys and values of all tokens are summed once, and every query reads the sum."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from localdit.mixers.base import TokenMixer
from localdit.models.attention import LocalDiTAttention
from localdit.models.rope import grid_positions, rotate

# B batch, N tokens, H heads, D head dim

# non-negative, so that a token's weights over the others can be made to sum to one
FEATURE_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "elu": lambda states: F.elu(states) + 1,
    "softmax": lambda states: states.softmax(-1),
}

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
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is not known; choose among {sorted(FEATURE_MAPS)}.")
        self.feature_map = feature_map

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return attn.to_output(self.mix(*attn.to_query_key_value(hidden_states), grid))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            features = FEATURE_MAPS[self.feature_map]
            query, key = features(query.float()), features(key.float())
            # means, not sums: the result is the same, and no longer sequence can make them larger
            weight = torch.einsum("bnhd,bhd->bnh", query, key.mean(dim=1))
            table = self.rotation(grid_positions(*grid, device=query.device))
            query, key = rotate(query, table), rotate(key, table)
            state = torch.einsum("bnhd,bnhe->bhde", key, value.float()) / key.shape[1]  # [B, H, D, D]
            mixed = torch.einsum("bnhd,bhde->bnhe", query, state) / (weight + EPSILON).unsqueeze(-1)
        return mixed.to(value.dtype)
