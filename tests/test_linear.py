"""Linear attention equals the quadratic form of the same kernel, forward and backward, and stays finite."""

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from localdit.mixers.linear import EPSILON, FEATURE_MAPS, LinearAttnProcessor
from localdit.models.rope import grid_positions

HEADS, HEAD_DIM = 2, 8


def states_of(tokens: int, requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, HEADS, HEAD_DIM, requires_grad=requires_grad) for _ in range(3)]


def angles_apart(positions: torch.Tensor, theta: float) -> torch.Tensor:
    """The angle between every two positions [N, N, D / 2], half of the pairs by columns, half by rows."""
    frequencies = theta ** -(torch.arange(0, HEAD_DIM // 2, 2) / (HEAD_DIM // 2))
    apart = (positions[:, None] - positions[None]).float().flip(-1)  # [N, N, 2] as (x, y)
    return (apart[..., None] * frequencies).flatten(-2)


def quadratic(query, key, value, grid, feature_map, rope_theta) -> torch.Tensor:
    """Every weight of every pair of tokens, written out."""
    query, key = (FEATURE_MAPS[feature_map](states) for states in (query, key))
    weight = torch.einsum("bqhd,bkhd->bhqk", query, key)
    turned = weight
    if rope_theta is not None:
        angle = angles_apart(grid_positions(*grid), rope_theta)
        (q0, q1), (k0, k1) = (states.unflatten(-1, (-1, 2)).unbind(-1) for states in (query, key))
        along = torch.einsum("bqhp,bkhp,qkp->bhqk", q0, k0, angle.cos())
        along = along + torch.einsum("bqhp,bkhp,qkp->bhqk", q1, k1, angle.cos())
        across = torch.einsum("bqhp,bkhp,qkp->bhqk", q1, k0, angle.sin())
        across = across - torch.einsum("bqhp,bkhp,qkp->bhqk", q0, k1, angle.sin())
        turned = along - across
    tokens = key.shape[1]
    return torch.einsum("bhqk,bkhd->bqhd", turned / (weight.sum(-1, keepdim=True) + tokens * EPSILON), value)


@pytest.mark.parametrize("rope_theta", [None, 10000.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)])
def test_it_is_the_quadratic_form_of_its_kernel(grid, feature_map, rope_theta):
    mixer = LinearAttnProcessor(HEADS, HEAD_DIM, 0, rope_theta, feature_map=feature_map)
    leaves = states_of(grid[0] * grid[1], requires_grad=True)
    results = [mixer.mix(*leaves, grid), quadratic(*leaves, grid, feature_map, rope_theta)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weight).sum(), leaves) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_without_positions_equal_values_come_back_as_they_are():
    query, key, _ = states_of(30)
    value = torch.randn(2, 1, HEADS, HEAD_DIM).expand(-1, 30, -1, -1)
    mixer = LinearAttnProcessor(HEADS, HEAD_DIM, 0, None, feature_map="elu")
    torch.testing.assert_close(mixer.mix(query, key, value, (5, 6)), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_it_is_finite_and_accurate_at_65536_tokens_in_half_precision(feature_map, dtype):
    mixer = LinearAttnProcessor(1, HEAD_DIM, 0, 10000.0, feature_map=feature_map)
    states = [4 * torch.randn(1, 65536, 1, HEAD_DIM) + 4 for _ in range(3)]
    half = [state.to(dtype) for state in states]
    mixed = mixer.mix(*half, (256, 256))
    assert mixed.dtype == dtype and mixed.isfinite().all()
    exact = mixer.mix(*(state.double().float() for state in half), (256, 256))
    torch.testing.assert_close(mixed.float(), exact, rtol=1e-2, atol=1e-2)


def test_autocast_does_not_lower_the_precision_of_the_sums():
    mixer = LinearAttnProcessor(HEADS, HEAD_DIM, 0, None)
    states = states_of(400)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer.mix(*states, (20, 20))
    torch.testing.assert_close(mixed, mixer.mix(*states, (20, 20)))


def test_a_query_without_a_feature_gets_zeros():
    query, key, value = states_of(12)
    mixed = LinearAttnProcessor(HEADS, HEAD_DIM, 0, None).mix(-query.abs(), key, value, (3, 4))
    assert torch.equal(mixed, torch.zeros_like(mixed))


def test_a_whole_model_trains_compiles_and_reloads_with_it(tmp_path):
    model = LocalDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        num_layers=2,
        sample_size=12,
        patch_size=1,
        caption_channels=None,
        token_mixers=("linear",),
        mixer_options={"linear": {"feature_map": "elu"}},
    )
    torch.nn.init.normal_(model.proj_out.weight)
    given = {"hidden_states": torch.randn(2, 3, 12, 10), "timestep": torch.tensor([1.0, 900.0])}
    sample = model(**given).sample
    sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given).sample, sample)
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalDiTTransformer2DModel.from_pretrained(tmp_path)(**given).sample, sample)


def test_an_unknown_feature_map_names_the_known_ones():
    with pytest.raises(ValueError, match="feature_map='cosine' is not known.*elu.*relu.*softmax"):
        LinearAttnProcessor(HEADS, HEAD_DIM, 0, None, feature_map="cosine")
