"""Tokens and their positions are those of diffusers' PatchEmbed."""

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from localdit.models.patch_embed import GridPatchEmbed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height,width", [(16, 16), (12, 20), (2, 34)])
@pytest.mark.parametrize("scale", [1, 3])
def test_every_grid_has_the_positions_of_diffusers(height, width, scale, dtype):
    theirs = PatchEmbed(16, 16, 2, 4, 24, interpolation_scale=scale)
    ours = GridPatchEmbed(16, 2, 4, 24, scale)
    ours.load_state_dict(theirs.state_dict())
    latents = torch.randn(2, 4, height, width, dtype=dtype)
    positions = theirs.pos_embed  # which `.to` would round
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    theirs.pos_embed = positions
    found = ours(latents)
    assert found.dtype is dtype and torch.equal(found, theirs(latents))


def test_gradients_are_those_of_diffusers():
    theirs, ours = PatchEmbed(16, 16, 2, 4, 24), GridPatchEmbed(16, 2, 4, 24, 1)
    ours.load_state_dict(theirs.state_dict())
    latents = torch.randn(2, 4, 12, 20, requires_grad=True)
    factor = torch.randn(2, 60, 24)
    found, expected = (
        torch.autograd.grad((module(latents) * factor).sum(), [latents, *module.parameters()])
        for module in (ours, theirs)
    )
    for gradient, wish in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wish)
