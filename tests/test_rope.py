"""The rotary embedding of a token grid."""

import pytest
import torch

from localdit.models import rope
from localdit.models.rope import grid_positions, rotary_table, rotate
from tests.rope_reference import THETA, reference_rope

HEADS, HEAD_DIM = 2, 8


def test_rotation_keeps_the_length_of_every_channel_pair():
    states = torch.randn(2, 30, HEADS, HEAD_DIM)
    cosine, sine = rotary_table(grid_positions(5, 6), HEAD_DIM, THETA)
    rotated = rotate(states, (cosine[:, None], sine[:, None]))
    assert rotated.shape == states.shape
    lengths, rotated_lengths = (x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (states, rotated))
    torch.testing.assert_close(rotated_lengths, lengths)
    torch.testing.assert_close(rotated[:, 0], states[:, 0])  # the token at (0, 0) is not turned


def test_rotation_is_the_formula():
    positions = [(0, 0), (0, 1), (1, 0), (3, 17), (2.5, 0.25)]
    states = torch.randn(1, len(positions), HEADS, HEAD_DIM)
    cosine, sine = rotary_table(torch.tensor(positions), HEAD_DIM, THETA)
    rotated = rotate(states, (cosine[:, None], sine[:, None]))
    torch.testing.assert_close(rotated, reference_rope(states, positions), rtol=1e-5, atol=1e-5)


def rope_scores(query, key, query_position, key_position):
    positions = torch.tensor([query_position, key_position], dtype=torch.float32)
    query, key = rotate(torch.stack((query, key)), rotary_table(positions, HEAD_DIM, THETA))
    return query @ key


def test_scores_depend_on_differences_of_positions_only():
    query, key = torch.randn(2, HEAD_DIM)
    for offset in [(0, 1), (1, 0), (-3, 5)]:
        scores = [
            rope_scores(query, key, start, (start[0] + offset[0], start[1] + offset[1]))
            for start in [(0, 0), (7, 0), (0, 9), (40, 60)]
        ]
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(rope_scores(query, key, (0, 0), (0, 1)), rope_scores(query, key, (0, 0), (1, 0)))


def test_first_half_of_the_channels_turns_with_x_and_the_second_with_y():
    states = torch.randn(1, HEAD_DIM)
    along_x, along_y = (rotate(states, rotary_table(torch.tensor([p]), HEAD_DIM, THETA)) for p in [(0, 3), (3, 0)])
    half = HEAD_DIM // 2
    assert torch.equal(along_x[:, half:], states[:, half:]) and (along_x[:, :half] != states[:, :half]).any()
    assert torch.equal(along_y[:, :half], states[:, :half]) and (along_y[:, half:] != states[:, half:]).any()


def test_angles_are_exact_for_half_precision_states():
    states = torch.ones(2, HEAD_DIM, dtype=torch.bfloat16)
    table = rotary_table(torch.tensor([[0, 256], [0, 257]]), HEAD_DIM, THETA)
    assert table[0].dtype == torch.float32
    rotated = rotate(states, table)
    assert rotated.dtype == torch.bfloat16
    assert not torch.equal(rotated[0], rotated[1])


@pytest.mark.parametrize("strided", [False, True])
def test_turning_by_complex_numbers_equals_the_products_that_a_graph_is_given(strided, monkeypatch):
    table = [part[:, None] for part in rotary_table(torch.rand(6, 2) * 50, HEAD_DIM, THETA)]
    wide = torch.randn(2, 6, HEADS, 3 * HEAD_DIM)
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(rope, "COMPLEX_DEVICES", devices)
        whole = wide.clone().requires_grad_()
        states = whole[..., HEAD_DIM : 2 * HEAD_DIM] if strided else whole[..., HEAD_DIM : 2 * HEAD_DIM].contiguous()
        turned = rotate(states, table)
        results.append((turned, torch.autograd.grad((turned * torch.arange(HEAD_DIM)).sum(), whole)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
