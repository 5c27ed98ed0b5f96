"""What makes the heads of queries and keys ready for attention: a norm, and a turn by their position."""

import torch
from torch import nn

from localdit.models.rope import rotate

# S any leading shape, H heads, D head dim

Table = tuple[torch.Tensor, torch.Tensor]


class HeadNorm(nn.Module):
    """Makes heads [..., H, D] of queries or keys ready for attention: leaves them as they are, and turns them."""

    def forward(self, states: torch.Tensor, table: Table | None = None) -> torch.Tensor:
        """Turn [..., H, D] by a rotary table, cosine and sine broadcastable to [..., H, D / 2]; None turns nothing."""
        return rotate(states, table)


class HeadRMSNorm(nn.RMSNorm):
    """As `HeadNorm`, after an RMSNorm over each head.

    Torch's RMSNorm takes a CPU seven passes over the memory, the turn another, in half precision both go to fp32 and
    back, and their gradient takes twice as many. Four passes over one fp32 copy do, and eight for the gradient.
    """

    def forward(self, x: torch.Tensor, table: Table | None = None) -> torch.Tensor:
        if self.eps is None or self.weight is None or not few_passes_do(x):
            return rotate(super().forward(x), table)
        turn = None if table is None else torch.complex(*table)
        if not torch.is_grad_enabled():
            return norm_and_turn(x, self.weight, turn, self.eps)[0]
        return NormAndTurn.apply(x, self.weight, turn, self.eps)[0]


def few_passes_do(states: torch.Tensor) -> bool:
    """Whether to compute by hand: on a CPU, in fp32 or less, of heads that lie whole; a compiler fuses by itself."""
    by_hand = states.device.type == "cpu" and not torch.compiler.is_compiling()
    return by_hand and states.dtype != torch.float64 and states.stride(-1) == 1


def norm_and_turn(
    states: torch.Tensor, weight: torch.Tensor, turn: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise heads [..., H, D], weigh their channels by [D], and turn them by complex numbers [..., H, D / 2].

    Returns:
        The heads in their own dtype, and what each was multiplied by for the norm, fp32 [..., H, 1].
    """
    exact = states.float()
    square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
    scale = square.div_(states.shape[-1]).add_(eps).rsqrt_()
    exact = torch.mul(exact, scale, out=None if exact is states else exact)
    exact.mul_(weight.float())  # factors of two dtypes take twice the time
    if turn is not None:
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turn)
    return exact.to(states.dtype), scale


class NormAndTurn(torch.autograd.Function):
    """`norm_and_turn` with a gradient of its own: of the heads only the norms are kept, and the rest made anew."""

    @staticmethod
    def forward(states, weight, turn, eps):
        return norm_and_turn(states, weight, turn, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, weight, turn, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(states, weight, turn, output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        states, weight, turn, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone asks for the gradient of this gradient
            return *plain_gradient(states, weight, turn, ctx.eps, gradient), None, None
        unit, turned = states.float() * scale, turned_back(gradient, turn)
        product = turned * unit
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        with torch.autocast("cpu", enabled=False):
            longer = (product @ weight.float()).unsqueeze(-1).div_(-states.shape[-1])
        # a head gets no longer, whatever it is multiplied by
        of_states = torch.mul(turned, weight.float(), out=product).addcmul_(unit, longer).mul_(scale)
        return of_states.to(states.dtype), of_weight, None, None


def turned_back(gradient: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """The gradient [..., H, D] of what was turned by complex numbers, in fp32."""
    if turn is None:
        return gradient.float()
    pairs = torch.view_as_complex(gradient.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.conj()).flatten(-2)


def plain_gradient(
    states: torch.Tensor, weight: torch.Tensor, turn: torch.Tensor | None, eps: float, gradient: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `norm_and_turn` by torch's own operations, which can be differentiated further."""
    exact = states.float()
    normed = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    if turn is not None:
        normed = torch.view_as_real(torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous()) * turn)
    made = normed.reshape(states.shape).to(states.dtype)
    asked = [tensor for tensor in (states, weight) if tensor.requires_grad]
    found = iter(torch.autograd.grad(made, asked, gradient, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in (states, weight))
