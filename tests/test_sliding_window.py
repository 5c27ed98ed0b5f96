"""Sliding-window attention equals dense attention under a mask, forward and backward, on any grid."""

import itertools
import sys
import types

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from localdit.mixers import MIXERS
from localdit.mixers import sliding_window as module
from localdit.mixers.sliding_window import SlidingWindowAttnProcessor, build_tiles, neighbours
from localdit.mixers.tables import _made_once
from localdit.models.attention import LocalDiTAttention

HEADS, HEAD_DIM = 2, 8
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRIDS = [(1, 1), (1, 7), (3, 5), (8, 8), (9, 17)]


def make(rope_theta=None, **options) -> SlidingWindowAttnProcessor:
    mixer = SlidingWindowAttnProcessor(HEADS, HEAD_DIM, 0, rope_theta, **options)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


def own_positions(position: int, length: int, kernel_size: int, dilation: int) -> set[int]:
    """The positions of an axis that one attends to: those of its own phase, nearest first, moved inwards."""
    phase = [other for other in range(length) if other % dilation == position % dilation]
    place, size = phase.index(position), min(kernel_size, len(phase))
    start = max(0, min(place - kernel_size // 2, len(phase) - size))
    return set(phase[start : start + size])


def dense_mask(grid, kernel_size, dilation) -> torch.Tensor:
    """True [N, N] where the column is a key of the row."""
    rows, columns = (
        torch.tensor(
            [[key in own_positions(query, side, kernel_size, dilation) for key in range(side)] for query in range(side)]
        )
        for side in grid
    )
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def dense_bias(mixer, grid) -> torch.Tensor:
    """The learned bias [H, N, N] of every pair of tokens, whatever it is where the mask hides it."""
    size, step = mixer.kernel_size, mixer.dilation
    tokens = list(itertools.product(*map(range, grid)))
    entry = [
        [((qy - ky) // step + size - 1) * (2 * size - 1) + (qx - kx) // step + size - 1 for ky, kx in tokens]
        for qy, qx in tokens
    ]
    return mixer.relative_position_bias_table[torch.tensor(entry).clamp(0, (2 * size - 1) ** 2 - 1)].permute(2, 0, 1)


def dense(mixer, query, key, value, grid) -> torch.Tensor:
    mask = dense_mask(grid, mixer.kernel_size, mixer.dilation).to(query.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_DIM**0.5
    if mixer.relative_position_bias_table is not None:
        scores = scores + dense_bias(mixer, grid)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("tile", [3, 8])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (4, 1), (7, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_dense_attention_under_a_mask(monkeypatch, grid, kernel_size, dilation, tile):
    monkeypatch.setattr(module, "TILE", tile)
    _made_once.cache_clear()
    mixer = make(kernel_size=kernel_size, dilation=dilation, relative_position_bias=True)
    leaves = [torch.randn(2, grid[0] * grid[1], HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
    leaves.append(mixer.relative_position_bias_table)
    results = [mixer.mix(*leaves[:3], grid), dense(mixer, *leaves[:3], grid)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weight).sum(), leaves, allow_unused=True) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    _made_once.cache_clear()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (4, 1), (7, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_flex_attention_is_dense_attention_under_the_same_mask(grid, kernel_size, dilation, device):
    options = {"kernel_size": kernel_size, "dilation": dilation, "backend": "flex"}
    for mixer in (make(relative_position_bias=True, **options).to(device), make(**options)):
        states = torch.randn(3, 2, grid[0] * grid[1], HEADS, HEAD_DIM, device=device)
        with torch.no_grad():
            result = mixer.mix(*states, grid)
        torch.testing.assert_close(result, dense(mixer, *states, grid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_with_flex_attention_gradients_are_those_of_dense_attention(device):
    mixer = make(kernel_size=3, dilation=2, relative_position_bias=True, backend="flex").to(device)
    leaves = [torch.randn(2, 80, HEADS, HEAD_DIM, device=device, requires_grad=True) for _ in range(3)]
    leaves.append(mixer.relative_position_bias_table)
    results = [mixer.mix(*leaves[:3], (8, 10)), dense(mixer, *leaves[:3], (8, 10))]
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weight).sum(), leaves) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (4, 1), (7, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("grid", [*GRIDS, (9, 11)])
def test_natten_is_dense_attention_under_the_same_mask(grid, kernel_size, dilation, device):
    pytest.importorskip("natten")
    mixer = make(kernel_size=kernel_size, dilation=dilation, backend="natten").to(device)
    states = torch.randn(3, 2, grid[0] * grid[1], HEADS, HEAD_DIM, device=device)
    with torch.no_grad():
        result = mixer.mix(*states, grid)
    torch.testing.assert_close(result, dense(mixer, *states, grid), rtol=1e-4, atol=1e-5)
    leaves = [state.requires_grad_() for state in states.unbind()]
    results = [mixer.mix(*leaves, grid), dense(mixer, *leaves, grid)]
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weight).sum(), leaves) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_natten_is_called_where_its_grid_is_wide_enough(monkeypatch):
    """With a stand-in for the package, which sees a map of tokens."""
    seen = []

    def na2d(query, key, value, kernel_size, dilation):
        seen.append((tuple(query.shape), kernel_size, dilation))
        return value

    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na2d=na2d, __spec__=object()))
    mixer = make(kernel_size=3, dilation=2, backend="natten")
    states = torch.randn(3, 2, 6 * 7, HEADS, HEAD_DIM)
    with torch.no_grad():
        assert torch.equal(mixer.mix(*states, (6, 7)), states[2])
        mixer.mix(*states[:, :, :35], (5, 7))
    assert seen == [((2, 6, 7, HEADS, HEAD_DIM), 3, 2)]
    with pytest.raises(ValueError, match="has no relative_position_bias; set backend='tiles'"):
        make(backend="natten", relative_position_bias=True)
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(ImportError, match="needs the package natten.*or set backend='tiles'"):
        make(backend="natten")


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="backend='natten2' is not known.*tiles.*flex"):
        make(backend="natten2")


@pytest.mark.parametrize("grid", [(8, 8), (5, 13)])
def test_without_a_bias_interior_tiles_and_border_tiles_agree_with_the_mask(grid):
    mixer = make(kernel_size=3)
    states = [torch.randn(1, grid[0] * grid[1], HEADS, HEAD_DIM) for _ in range(3)]
    torch.testing.assert_close(mixer.mix(*states, grid), dense(mixer, *states, grid), rtol=1e-4, atol=1e-5)


def test_a_square_as_large_as_the_grid_is_full_attention():
    states = [torch.randn(1, 30, HEADS, HEAD_DIM) for _ in range(3)]
    full = MIXERS["full"](HEADS, HEAD_DIM, 0, None)
    torch.testing.assert_close(make(kernel_size=6).mix(*states, (5, 6)), full.mix(*states, (5, 6)))


def test_positions_enter_by_rotation_as_in_every_other_mixer():
    attn = LocalDiTAttention(HEADS * HEAD_DIM, HEADS, HEAD_DIM, make(rope_theta=10000.0, kernel_size=3))
    states = torch.randn(1, 16, HEADS * HEAD_DIM)
    rotated = attn(states, (4, 4))
    attn.processor.rope_theta = None
    assert not torch.allclose(rotated, attn(states, (4, 4)), atol=1e-3)


def test_every_token_has_as_many_keys_however_near_the_border():
    for length, kernel_size in [(9, 5), (9, 4), (3, 5)]:
        for position in range(length):
            own = neighbours(position, length, kernel_size)
            assert len(own) == min(kernel_size, length) and position in own and own[0] >= 0 and own[-1] < length


@pytest.mark.parametrize(("grid", "dilation"), [((20, 13), 1), ((11, 9), 2)])
def test_every_token_is_a_query_exactly_once(grid, dilation):
    tiles, place = build_tiles(*grid, 7, dilation)
    queries = torch.cat([group.queries.flatten() for group in tiles])
    assert torch.equal(queries[place], torch.arange(grid[0] * grid[1]))


def test_a_far_token_has_no_influence_and_a_near_one_has():
    mixer = make(kernel_size=3)
    states = [torch.randn(1, 100, HEADS, HEAD_DIM) for _ in range(3)]
    before = mixer.mix(*states, (10, 10))
    states[2][0, 55] += 1
    changed = (mixer.mix(*states, (10, 10)) != before).any(-1).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [44, 45, 46, 54, 55, 56, 64, 65, 66]


def test_half_precision_is_close_to_fp32():
    mixer = make(kernel_size=3)
    states = [torch.randn(1, 64, HEADS, HEAD_DIM) for _ in range(3)]
    half = mixer.mix(*(state.bfloat16() for state in states), (8, 8)).float()
    torch.testing.assert_close(half, mixer.mix(*states, (8, 8)), rtol=0.05, atol=0.05)


def test_a_whole_model_trains_and_compiles_with_it():
    model = LocalDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        num_layers=2,
        sample_size=12,
        patch_size=1,
        caption_channels=None,
        token_mixers=("sliding_window",),
        mixer_options={"sliding_window": {"kernel_size": 3, "relative_position_bias": True}},
    )
    torch.nn.init.normal_(model.proj_out.weight)
    given = {"hidden_states": torch.randn(2, 3, 12, 10), "timestep": torch.tensor([1.0, 900.0])}
    sample = model(**given).sample
    sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given).sample, sample)


@pytest.mark.parametrize("options", [{"kernel_size": 0}, {"kernel_size": 2.5}, {"dilation": 0}])
def test_a_square_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be a whole number of at least 1"):
        make(**options)


def test_the_mask_of_one_look_is_shared():
    tiles, _ = build_tiles(32, 32, 7, 1)
    assert len(tiles) == 9 and sum(len(group.queries) for group in tiles) == 16
    assert all(group.kept.shape == (64, group.keys.shape[1]) for group in tiles)
