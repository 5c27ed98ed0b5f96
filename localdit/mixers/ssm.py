"""The DiffuSSM layer: a two-sided state space model reads the tokens in raster order, and there is no attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from localdit.mixers.base import TokenMixer
from localdit.models.attention import LocalDiTAttention
from localdit.models.checks import check_whole

SCANS = ("rows", "alternating")

# B batch, N tokens, M positions per token, L = N * M positions, C width, S complex states of a channel


def transpose(states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens [B, N, C], row-major on `grid`, as those of the transposed grid."""
    return states.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


class S4DKernel(nn.Module):
    """The convolution kernels of a bidirectional diagonal state space model (S4D, arXiv 2206.11893), one per channel.

    A channel with the states' eigenvalues a_s, step dt and read-outs c_s answers an impulse, after l positions, with
    2 Re sum_s c_s (exp(dt a_s) - 1) / a_s exp(dt a_s l), which is the zero-order hold of x' = a x + u. The two
    directions have read-outs of their own and share the rest.

    Args:
        channels: C.
        state_size: 2 S, the number of real states.
        min_step, max_step: range of dt, drawn uniformly in its logarithm.
    """

    def __init__(self, channels: int, state_size: int, min_step: float = 1e-3, max_step: float = 0.1):
        super().__init__()
        states = state_size // 2
        low, high = math.log(min_step), math.log(max_step)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(channels))
        # S4D-Lin: a_s = -1/2 + i pi s
        self.log_decay = nn.Parameter(torch.full((channels, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).float().repeat(channels, 1))
        # of the two directions, real and imaginary parts of CN(0, 1)
        self.readout = nn.Parameter(math.sqrt(0.5) * torch.randn(2, channels, states, 2))

    def forward(self, length: int) -> torch.Tensor:
        """The answers to an impulse after 0, ..., length - 1 positions in both directions, fp32 [2, C, length]."""
        step = self.log_step.float().exp().unsqueeze(-1)
        eigenvalue = torch.complex(-self.log_decay.float().exp(), self.frequency.float())  # [C, S]
        readout = torch.view_as_complex(self.readout.float().contiguous())
        weight = 2 * readout * (torch.exp(step * eigenvalue) - 1) / eigenvalue  # [2, C, S]

        def powers(exponent: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """exp(exponent l), [C, positions, S]: by size and angle, which a CPU computes faster."""
            parts = (exponent.real, exponent.imag)
            size, angle = (part.unsqueeze(1) * positions.unsqueeze(-1) for part in parts)
            return torch.polar(size.exp(), angle)

        # exp(dt a l) with l = i * block + j is an outer product, so memory grows with the root of the length;
        # Re(x y) is the product of the parts of x with those of the conjugate of y
        block = math.ceil(length**0.5)
        positions = torch.arange(block, device=step.device)
        outer = weight.transpose(0, 1).unsqueeze(2) * powers(step * eigenvalue, positions * block).unsqueeze(1)
        inner = powers((step * eigenvalue).conj(), positions)
        outer, inner = (torch.view_as_real(part).flatten(-2) for part in (outer, inner))
        answers = outer.flatten(1, 2) @ inner.mT  # [C, 2 block, block]
        return answers.unflatten(1, (2, -1)).flatten(-2)[..., :length].transpose(0, 1)


class CircularConvolution(torch.autograd.Function):
    """Convolve signals [B, C, L], each channel with its own circle [C, 2 L] of answers; the first L of each circle.

    Torch's gradient of an FFT of real numbers takes one of complex numbers. That of a convolution is a correlation, for
    which FFTs of real numbers do; and it keeps the signals, where torch keeps both spectra.

    Returns:
        The answers [B, C, L], where signal l is heard by position m with weight circle[(m - l) mod 2 L].
    """

    @staticmethod
    def forward(signal: torch.Tensor, circle: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = circle.shape[-1]
        spectrum = torch.fft.rfft(signal, n=length) * torch.fft.rfft(circle)
        return torch.fft.irfft(spectrum, n=length)[..., : signal.shape[-1]]

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        signal, circle = ctx.saved_tensors
        length = circle.shape[-1]
        spectrum = torch.fft.rfft(gradient, n=length)
        by_signal = torch.fft.irfft(spectrum * torch.fft.rfft(circle).conj(), n=length)[..., : signal.shape[-1]]
        by_circle = torch.fft.irfft((spectrum * torch.fft.rfft(signal, n=length).conj()).sum(0), n=length)
        return by_signal, by_circle


class BidirectionalSSMProcessor(TokenMixer):
    """The gated, hourglass-shaped layer of DiffuSSM (arXiv 2311.18257), in the place of attention.

    Each token becomes `hourglass_ratio` positions of a longer sequence; a bidirectional S4D runs along it, and the
    positions of a token are brought together again and gated by the token itself. Nothing depends on the number of
    tokens, so any grid runs. Time is N log N and memory linear.

    It takes its projections from the layer's attention: `to_v` is the paper's W0, `to_q` W1, `to_k` W2 and `to_out` W3;
    with `qk_norm` both factors of the gate are normalised before their activation. The rotary embedding has no place.

    Args:
        state_size: real states of a channel, an even number of at least 2.
        hourglass_ratio: M, positions per token, at least 1.
        scan: "rows" reads row by row, as the paper does; "alternating" column by column in every other layer, where
            tokens above each other are neighbours.

    Raises:
        ValueError: for a size out of range, or an unknown scan.
    """

    slow_parameters = ("kernel.log_step", "kernel.log_decay", "kernel.frequency")

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        layer: int,
        rope_theta: float | None,
        *,
        state_size: int = 64,
        hourglass_ratio: int = 2,
        scan: str = "rows",
    ):
        super().__init__(num_attention_heads, attention_head_dim, layer, rope_theta)
        check_whole("state_size", state_size, least=2)
        if state_size % 2:
            raise ValueError(f"state_size={state_size} must be even, since states come in conjugate pairs.")
        check_whole("hourglass_ratio", hourglass_ratio)
        if scan not in SCANS:
            raise ValueError(f"scan={scan!r} is not known; choose among {list(SCANS)}.")
        width = num_attention_heads * attention_head_dim
        self.hourglass_ratio = hourglass_ratio
        self.by_columns = scan == "alternating" and layer % 2 == 1
        self.up = nn.Linear(width, hourglass_ratio * width)
        self.kernel = S4DKernel(width, state_size)
        self.skip = nn.Parameter(torch.randn(width))
        self.down = nn.Linear(hourglass_ratio * width, width)

    def forward(self, attn: LocalDiTAttention, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix the tokens of [B, N, C], row-major on `grid`."""
        if self.by_columns:
            hidden_states = transpose(hidden_states, grid)
        positions = (hidden_states.shape[1] * self.hourglass_ratio, hidden_states.shape[2])
        expanded = F.gelu(self.up(F.gelu(attn.to_v(hidden_states)))).unflatten(-1, (self.hourglass_ratio, -1))
        read = self.convolve(expanded.reshape(-1, *positions))  # [B, L, C]
        read = F.gelu(self.down(read.unflatten(1, (-1, self.hourglass_ratio)).flatten(2)))  # [B, N, C]
        gate = attn.norm_q(attn.to_heads(attn.to_q(hidden_states)))
        gated = attn.norm_k(attn.to_heads(attn.to_k(read)))
        mixed = attn.to_output(F.gelu(gated) * F.gelu(gate))
        return transpose(mixed, (grid[1], grid[0])) if self.by_columns else mixed

    def convolve(self, states: torch.Tensor) -> torch.Tensor:
        """Run the state space model over [B, L, C] from both ends; a position counts once."""
        length = states.shape[1]
        if not len(states):  # of which a CPU's FFT makes an error
            return states
        with torch.autocast(states.device.type, enabled=False):
            forward, backward = self.kernel(length)
            now = forward[:, :1] + self.skip.float().unsqueeze(-1)
            # position l hears l - m from the front and m - l - 1 from the back: a circle of twice the length
            circle = torch.cat((now, forward[:, 1:], backward.flip(-1)), dim=-1)  # [C, 2 L]
            answer = CircularConvolution.apply(states.float().mT, circle)
        return answer.mT.to(states.dtype)
