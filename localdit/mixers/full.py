"""Full attention: every token attends to every token."""

import torch

from localdit.mixers.base import TokenMixer
from localdit.models.attention import attend


class FullAttnProcessor(TokenMixer):
    """Every token attends to every token; the cost grows with the square of their number."""

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return attend(query, key, value, None, self)
