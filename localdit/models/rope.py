"""Two-dimensional rotary position embedding of a token grid."""

import torch

# S any leading shape, D head dim

COMPLEX_DEVICES = ("cpu", "cuda")


def grid_positions(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Row and column of every token of a grid, row-major.

    Returns:
        Integer positions (y, x), shape [height * width, 2].
    """
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that rotate the channel pairs of a head (RoPE, arXiv 2104.09864), half of the pairs per axis.

    The first half of the pairs turns with x, the second with y, by `position * theta ** (-4 j / head_dim)`.

    Args:
        positions: (y, x) of each token, in tokens, shape [S, 2]; fractions are allowed.
        head_dim: channels of one head, a multiple of 4.
        theta: base of the geometric series of frequencies.

    Returns:
        Cosine and sine, fp32, each of shape [S, head_dim / 2].
    """
    # fp32, because bf16 cannot tell position 257 from position 256
    exponents = torch.arange(0, head_dim, 4, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    angles = positions.float().flip(-1).unsqueeze(-1) * frequencies  # [S, 2, D / 4], x before y
    angles = angles.flatten(-2)  # [S, D / 2]
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Turn the adjacent channel pairs (0, 1), (2, 3), ... of `states` by the angles of `table`.

    Args:
        states: queries or keys, shape [..., D].
        table: cosine and sine, each broadcastable to [..., D / 2]; None leaves the states as they are.

    Returns:
        The rotated states, computed in fp32, in the shape and dtype of `states`.
    """
    if table is None:
        return states
    cosine, sine = table
    pairs = states.float().unflatten(-1, (-1, 2))
    if pairs.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        # a turn is a product of complex numbers: one pass over the memory instead of seven
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cosine, sine)
        return torch.view_as_real(turned).flatten(-2).to(states.dtype)
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(states.dtype)
