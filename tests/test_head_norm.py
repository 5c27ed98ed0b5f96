"""What makes heads of queries and keys ready: an RMSNorm and a turn, in few passes where no gradient is asked for."""

import pytest
import torch
from torch import nn

from localdit.models.attention import HeadNorm, HeadRMSNorm
from localdit.models.rope import grid_positions, rotary_table, rotate
from tests.rope_reference import THETA, reference_rope

HEADS, HEAD_DIM, GRID = 3, 16, (4, 5)


def table():
    return tuple(part.unsqueeze(-2) for part in rotary_table(grid_positions(*GRID), HEAD_DIM, THETA))


def norm_with_gains(dtype=torch.float32) -> HeadRMSNorm:
    norm = HeadRMSNorm(HEAD_DIM, eps=1e-3)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm.to(dtype)


def reference(norm, states, turns):
    """The formula of the norm in fp32, token by token turned by the reference."""
    exact = states.float()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.float()
    places = [tuple(place) for place in grid_positions(*GRID).tolist()]
    return reference_rope(normed, places) if turns else normed


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_without_gradients_the_few_passes_give_what_norm_and_turn_give(strided, turns):
    norm, wide = norm_with_gains(), torch.randn(2, 20, HEADS, 3 * HEAD_DIM)
    states = wide[..., HEAD_DIM : 2 * HEAD_DIM] if strided else wide[..., :HEAD_DIM].contiguous()
    before = states.clone()
    with torch.no_grad():
        found = norm(states, table() if turns else None)
    assert torch.equal(states, before)  # whoever else holds the projection's output finds it as it was
    torch.testing.assert_close(found, reference(norm, states, turns), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, norm(states, table() if turns else None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    norm, states = norm_with_gains(dtype), torch.randn(2, 20, HEADS, HEAD_DIM).to(dtype)
    with torch.no_grad():
        found = norm(states, table())
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference(norm, states, turns=True).to(dtype))


def test_gradients_are_those_of_norm_and_turn():
    norm, states = norm_with_gains(), torch.randn(2, 20, HEADS, HEAD_DIM, requires_grad=True)
    inputs = (states, norm.weight)
    weights = torch.arange(HEAD_DIM)
    expected = torch.autograd.grad((reference(norm, states, turns=True) * weights).sum(), inputs)
    found = torch.autograd.grad((norm(states, table()) * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_without_a_norm_heads_are_turned_alone():
    states = torch.randn(2, 20, HEADS, HEAD_DIM)
    assert torch.equal(HeadNorm()(states), states)
    assert torch.equal(HeadNorm()(states, table()), rotate(states, table()))
