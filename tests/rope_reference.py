"""The rotary embedding of a token grid, written down token by token."""

import torch

THETA = 10000.0


def reference_rope(states, positions):
    """Rotate [B, N, H, D] pair by pair: the first half of the pairs by x, the second by y, in absolute coordinates."""
    rotated = torch.empty_like(states)
    for pair in range(states.shape[-1] // 2):
        axis, j = divmod(pair, states.shape[-1] // 4)
        coordinate = torch.tensor([(x, y)[axis] for y, x in positions], dtype=states.dtype)
        angle = (coordinate * THETA ** (-4 * j / states.shape[-1]))[None, :, None]
        even, odd = states[..., 2 * pair], states[..., 2 * pair + 1]
        rotated[..., 2 * pair] = even * angle.cos() - odd * angle.sin()
        rotated[..., 2 * pair + 1] = even * angle.sin() + odd * angle.cos()
    return rotated
