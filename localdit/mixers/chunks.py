"""How many tokens a mixer takes at a time on a CPU, so that what it computes of them stays in the cache."""

import torch

CHUNK_TOKENS = 2048


def chunk_tokens(hidden_states: torch.Tensor) -> int | None:
    """Tokens per picture of [B, N, ...] in one chunk, or None for all at once: in training, in a graph, off the CPU."""
    if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return max(1, CHUNK_TOKENS // max(1, hidden_states.shape[0]))
