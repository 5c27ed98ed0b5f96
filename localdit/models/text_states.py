"""A text's keys and values, which do not depend on the timestep: computed once, read in every step."""

import torch

from localdit.models.attention import LocalDiTAttention

# B batch, L text tokens, C width of a token, H heads, D head dim


class TextStates:
    """A projected text, and what each cross-attention has made of it.

    Args:
        source: the text encoder's states that it was projected from, [B, L, caption_channels].
        states: the projected text, [B, L, C].
    """

    def __init__(self, source: torch.Tensor, states: torch.Tensor):
        self.source = source
        self.states = states
        self.key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def key_value(self, attn: LocalDiTAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, L, H, D] of one cross-attention."""
        if id(attn) not in self.key_values:
            self.key_values[id(attn)] = attn.to_key_value(self.states)
        return self.key_values[id(attn)]
