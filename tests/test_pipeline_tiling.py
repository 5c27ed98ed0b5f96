"""Facts about large pictures, which go through the VAE tile by tile."""

import importlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
from localdit.command_line import PRETRAINED
from tests.drawing import PROMPT, draw, seeded

tiling = importlib.import_module("localdit.pipelines.pipeline_common")

TILE = {"height": 64, "width": 96}  # pixels; more than 1.5 tiles of 32


@pytest.fixture
def small_tiles(make_pipeline, latent_components):
    """The maker of tiny pipelines with a VAE whose tiles are 32 pixels wide."""

    def make(pipeline_class=LocalDiTPipeline):
        pipeline = make_pipeline(pipeline_class, **latent_components)
        pipeline.vae_tile_size = 32
        return pipeline

    return make


@pytest.fixture
def trained_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(PRETRAINED / "vae").eval()


@contextmanager
def listening(module):
    """The sides of what goes through a module, in a list that fills."""
    sides = []
    handle = module.register_forward_pre_hook(lambda _, arguments: sides.append(tuple(arguments[0].shape[-2:])))
    yield sides
    handle.remove()


def photo() -> torch.Tensor:
    """Scenes side by side, which are nothing that the trained VAE knows as one picture, [1, 3, 256, 256]."""
    pixels = np.asarray(Image.open(PRETRAINED / "samples.png").convert("RGB"))[:256, :256]
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def decibels(one, other) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return -10 * torch.log10((one - other).square().mean() / 4).item()


# When


def test_pictures_of_more_than_one_and_a_half_tiles_are_cut(small_tiles):
    pipeline = small_tiles()
    pipeline.vae_tile_size = 1024
    assert not pipeline.is_cut(1024, 1024) and not pipeline.is_cut(1536, 1024) and not pipeline.is_cut(512, 3072)
    assert pipeline.is_cut(1280, 1280) and pipeline.is_cut(512, 3074) and pipeline.is_cut(4096, 4096)
    pipeline.vae_tile_size = None
    assert not pipeline.is_cut(4096, 4096)


def test_large_pictures_are_decoded_in_tiles_and_others_whole(small_tiles):
    pipeline = small_tiles()
    with listening(pipeline.vae.decoder) as sides:
        draw(pipeline, output_type="pt", height=32, width=48)
    assert sides == [(16, 24)]
    with listening(pipeline.vae.decoder) as sides:
        image = draw(pipeline, output_type="pt", **TILE)
    assert image.shape == (1, 3, 64, 96)
    assert len(sides) > 6 and max(height * width for height, width in sides) <= 16 * 16


def test_tiling_can_be_turned_off(small_tiles):
    pipeline = small_tiles()
    pipeline.vae_tile_size = None
    with listening(pipeline.vae.decoder) as sides:
        draw(pipeline, output_type="pt", **TILE)
    assert sides == [(32, 48)]


def test_the_vaes_own_tiling_goes_first(small_tiles):
    pipeline = small_tiles()
    pipeline.vae.enable_tiling()
    with torch.no_grad():
        expected = pipeline.vae.decode(draw(pipeline, **TILE) / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(draw(pipeline, output_type="pt", **TILE), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("pixels", [31, 0, -1024, 64.0, "1024", True])
def test_a_tile_that_cannot_be_is_refused(small_tiles, pixels):
    with pytest.raises(ValueError, match="vae_tile_size=.* at least 32 pixels"):
        small_tiles().vae_tile_size = pixels


def test_a_pipeline_without_a_vae_cuts_nothing(pipeline):
    assert not pipeline.is_cut(4096, 4096)


# What comes out


@pytest.mark.parametrize(("height", "width"), [(17, 90), (64, 64), (33, 16), (120, 41)])
def test_tiles_of_a_convolution_make_the_whole(height, width):
    """Where they meet, no tile counts whose convolution saw its own padding."""
    inputs, kernel = torch.randn(2, 4, height, width), torch.randn(3, 4, 3, 3)

    def decode(latents):
        return F.conv2d(F.interpolate(latents, scale_factor=2), kernel, padding=1)

    def encode(pixels):
        return F.avg_pool2d(F.conv2d(pixels, kernel, padding=1), 2)

    assert torch.allclose(tiling.in_tiles(decode, inputs, 16, 1, 2), decode(inputs), atol=1e-4)
    pixels = F.interpolate(inputs, scale_factor=2)
    assert torch.allclose(tiling.in_tiles(encode, pixels, 16, 2, 1), encode(pixels), atol=1e-4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 28, 29, 100, 1023])
def test_tiles_cover_a_length_evenly(length):
    spans = tiling.spans(length, 16)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert len({stop - start for start, stop in spans}) == 1 and spans[0][1] <= 16
    assert all(stop - start >= 4 for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))


def test_tiles_are_decoded_nearly_as_the_whole(small_tiles, trained_vae):
    pipeline = small_tiles()
    pipeline.vae, pipeline.vae_scale_factor, pipeline.vae_tile_size = trained_vae, 4, 128
    with torch.no_grad():
        latents = trained_vae.encode(photo()).latent_dist.mode()
        whole, tiled = trained_vae.decode(latents).sample, pipeline.vae_decode(latents)
        trained_vae.enable_tiling()
        trained_vae.tile_latent_min_size, trained_vae.tile_sample_min_size = 32, 128
        own_tiling = trained_vae.decode(latents).sample
    assert decibels(tiled, whole) > 30 and decibels(own_tiling, whole) < 20


def test_tiles_have_no_seams(small_tiles, trained_vae):
    """Beside the whole with the same statistics, no column or row of pixels steps away from its neighbour."""
    pipeline = small_tiles()
    pipeline.vae, pipeline.vae_scale_factor, pipeline.vae_tile_size = trained_vae, 4, 128
    with torch.no_grad():
        latents = trained_vae.encode(photo()).latent_dist.mode()
        with tiling.SharedGroupNorms() as norms:
            trained_vae.decode(tiling.shrunk(latents, 32, 1))
            norms.begin_pass()
            whole = trained_vae.decode(latents).sample
        difference = 255 / 2 * (pipeline.vae_decode(latents) - whole)  # in grey levels
    assert difference.diff(dim=-1).mean(dim=(0, 1, 2)).abs().max() < 0.3
    assert difference.diff(dim=-2).mean(dim=(0, 1, 3)).abs().max() < 0.3


def test_tiles_are_encoded_nearly_as_the_whole(small_tiles, trained_vae):
    pipeline = small_tiles()
    pipeline.vae, pipeline.vae_scale_factor, pipeline.vae_tile_size = trained_vae, 4, 128
    with torch.no_grad():
        whole, tiled = trained_vae.encode(photo()).latent_dist.mode(), pipeline.vae_encode(photo())
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).square().mean().sqrt() < 0.05 * whole.std()


def test_a_picture_does_not_depend_on_its_batch(small_tiles):
    pipeline = small_tiles()
    together = draw(pipeline, ["red", "blue"], generator=seeded(0, 1), output_type="pt", **TILE)
    alone = draw(pipeline, "blue", generator=seeded(1), output_type="pt", **TILE)
    assert torch.allclose(together[1:], alone, atol=1e-4)
    pipeline.vae.enable_slicing()
    sliced = draw(pipeline, ["red", "blue"], generator=seeded(0, 1), output_type="pt", **TILE)
    assert torch.allclose(together, sliced, atol=1e-4)


def test_an_offloaded_vae_decodes_the_same(small_tiles):
    pipeline = small_tiles()
    expected = draw(pipeline, output_type="pt", **TILE)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline, output_type="pt", **TILE), expected)


def test_half_precision_stays_near(small_tiles):
    pipeline = small_tiles()
    latents = torch.randn(1, 4, 32, 48)
    with torch.no_grad():
        expected = pipeline.vae_decode(latents)
        tiled = pipeline.to(dtype=torch.bfloat16).vae_decode(latents.bfloat16())
    assert (tiled - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("pipeline_class", [LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline])
def test_a_large_picture_is_encoded_in_tiles(small_tiles, pipeline_class):
    pipeline = small_tiles(pipeline_class)
    inputs = {"image": torch.rand(1, 3, 64, 96, generator=seeded(1)), "strength": 0.5, **TILE}
    if pipeline_class is LocalDiTInpaintPipeline:
        inputs["mask_image"] = torch.ones(64, 96)
    with listening(pipeline.vae.encoder) as sides:
        image = pipeline(PROMPT, generator=seeded(0), output_type="pt", **inputs).images
    assert image.shape == (1, 3, 64, 96) and image.isfinite().all()
    assert len(sides) > 6 and max(height * width for height, width in sides) <= 32 * 32


# What stays


def test_the_vae_stays_as_it_was_even_where_decoding_fails(small_tiles):
    pipeline = small_tiles()
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        before, state = pipeline.vae.decode(latents).sample, dict(vars(pipeline.vae))
        draw(pipeline, output_type="pt", **TILE)
        broken = pipeline.vae.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(pipeline, output_type="pt", **TILE)
        broken.remove()
        assert torch.equal(pipeline.vae.decode(latents).sample, before) and vars(pipeline.vae) == state


@pytest.mark.parametrize("affine", [True, False])
def test_shared_norms_of_the_same_inputs_are_group_norms(affine):
    norm, inputs = torch.nn.GroupNorm(2, 6, affine=affine), torch.randn(3, 6, 5, 7) * 4 + 2
    if affine:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    with tiling.SharedGroupNorms() as norms:
        measured = norm(inputs)
        norms.begin_pass()
        used, of_others = norm(inputs), None
        norms.begin_pass()
        of_others = norm(3 * inputs)
    assert torch.equal(measured, norm(inputs)) and torch.allclose(used, measured, atol=1e-5)
    assert not torch.allclose(of_others, measured, atol=0.1)  # which its own statistics would give
