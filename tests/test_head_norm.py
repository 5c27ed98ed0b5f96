"""What makes heads of queries and keys ready: an RMSNorm and a turn, in few passes where no gradient is asked for."""

import pytest
import torch
from torch import nn

from localdit.models.head_norm import HeadNorm, HeadRMSNorm
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


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_norm_and_turn(turns, dtype):
    norm, wide = norm_with_gains(dtype), torch.randn(2, 20, HEADS, 2 * HEAD_DIM).to(dtype).requires_grad_()
    sent = torch.randn(2, 20, HEAD_DIM, HEADS).mT.to(dtype)  # strided, as it comes from attention
    inputs, states = (wide, norm.weight), wide[..., HEAD_DIM:]
    expected = torch.autograd.grad(reference(norm, states, turns).to(dtype), inputs, sent)
    found = torch.autograd.grad(norm(states, table() if turns else None), inputs, sent)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **close)


def test_gradients_of_gradients_are_those_of_norm_and_turn():
    norm, states = norm_with_gains(), torch.randn(1, 20, HEADS, HEAD_DIM, requires_grad=True)
    sent = torch.randn(1, 20, HEADS, HEAD_DIM, requires_grad=True)

    def twice(made):
        first = torch.autograd.grad(made, (states, norm.weight), sent, create_graph=True)
        return torch.autograd.grad(sum(part.sin().sum() for part in first), (states, norm.weight, sent))

    for one, other in zip(twice(norm(states, table())), twice(reference(norm, states, True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen, second_order):
    norm, states = norm_with_gains(), torch.randn(2, 20, HEADS, HEAD_DIM, requires_grad=True)
    learns = {"states": norm.weight, "weight": states}[frozen]
    {"states": states, "weight": norm.weight}[frozen].requires_grad_(False)
    expected = torch.autograd.grad(reference(norm, states, True).sin().sum(), learns)
    found = torch.autograd.grad(norm(states, table()).sin().sum(), learns, create_graph=second_order)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_a_norm_heads_are_turned_alone():
    states = torch.randn(2, 20, HEADS, HEAD_DIM)
    assert torch.equal(HeadNorm()(states), states)
    assert torch.equal(HeadNorm()(states, table()), rotate(states, table()))


@pytest.mark.parametrize("learns", [False, True])
def test_what_the_few_passes_cannot_do_torch_does(learns):
    plain = nn.RMSNorm(HEAD_DIM, eps=1e-3)
    for norm, states in (
        (norm_with_gains(), torch.randn(2, 20, HEAD_DIM, HEADS).mT),  # no two channels lie side by side
        (norm_with_gains(torch.float64), torch.randn(2, 20, HEADS, HEAD_DIM, dtype=torch.float64)),
        (HeadRMSNorm(HEAD_DIM, eps=1e-3, elementwise_affine=False), torch.randn(2, 20, HEADS, HEAD_DIM)),
    ):
        plain.to(states.dtype).weight = nn.Parameter(torch.ones(HEAD_DIM) if norm.weight is None else norm.weight)
        with torch.set_grad_enabled(learns):
            torch.testing.assert_close(norm(states, table()), rotate(plain(states), table()))
