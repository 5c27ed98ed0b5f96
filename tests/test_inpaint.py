"""Inpainting: what the mask leaves alone stays to the byte, the rest follows the text."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForInpainting,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline

PICTURE = Image.effect_noise((16, 16), 80).convert("RGB")
LEFT = np.zeros((16, 16), np.float32)
LEFT[:, :8] = 1


def paint(pipe, mask=LEFT, image=PICTURE, seed: int = 0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    arguments = {"output_type": "np", **arguments}
    return pipe("a red seven", image, mask, generator=generator, **arguments).images


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


@pytest.mark.parametrize("latent", [False, True], ids=["pixels", "latents"])
def test_the_unmasked_pixels_stay_to_the_byte_and_the_masked_ones_change(make_pipeline, latent_components, latent):
    pipe = make_pipeline(LocalDiTInpaintPipeline, **(latent_components if latent else {}))
    (painted,) = paint(pipe, output_type="pil")
    before, after = np.asarray(PICTURE), np.asarray(painted)
    assert np.array_equal(before[:, 8:], after[:, 8:])
    assert (np.abs(before[:, :8].astype(int) - after[:, :8]) > 2).mean() > 0.5


def test_a_list_of_masks_may_hold_batches(make_pipeline):
    pipe = make_pipeline(LocalDiTInpaintPipeline)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1)]
    pictures = pipe(["red", "red"], [PICTURE] * 2, [mask] * 2, generator=generators, output_type="np").images
    assert np.allclose(pictures[0], pictures[1], atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16, 1), (1, 16, 16), (1, 16, 16, 1)])
def test_a_mask_of_numpy_may_have_a_channel_and_a_batch(make_pipeline, shape):
    pipe = make_pipeline(LocalDiTInpaintPipeline)
    assert np.array_equal(paint(pipe, mask=LEFT.reshape(shape)), paint(pipe))


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(prediction_type="epsilon", clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(prediction_type="epsilon"),
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="epsilon"),
    "flow": FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_after_every_step_the_rest_is_the_picture_with_the_noise_of_that_step(make_pipeline, name):
    pipe = make_pipeline(LocalDiTInpaintPipeline, scheduler=SCHEDULERS[name]())
    noise, seen = torch.randn(1, 3, 16, 16), []

    def see(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    arguments = {"latents": noise, "strength": 0.75, "num_inference_steps": 8, "callback_on_step_end": see}
    painted = paint(pipe, **arguments)
    assert len(seen) == 6
    clean = torch.from_numpy(pixels(PICTURE)).permute(2, 0, 1)[None] * 2 - 1
    scheduler = pipe.scheduler
    for index, latents in enumerate(seen):
        following = scheduler.timesteps[2 + index + 1 :]
        expected = clean
        if len(following):
            sigma = following[0] / 1000
            if name == "flow":
                expected = (1 - sigma) * clean + sigma * noise
            elif name == "euler":
                expected = clean + scheduler.sigmas[2 + index + 1] * noise
            else:
                level = scheduler.alphas_cumprod[int(following[0])]
                expected = level.sqrt() * clean + (1 - level).sqrt() * noise
        torch.testing.assert_close(latents[..., 8:], expected[..., 8:], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(latents[..., :8], expected[..., :8], atol=1e-2)
    np.testing.assert_allclose(painted[0][:, 8:], pixels(PICTURE)[:, 8:], atol=1e-6)


def test_a_white_mask_is_text_to_image_and_a_black_one_returns_the_picture(inpaint, make_pipeline):
    generate = make_pipeline(LocalDiTPipeline, **inpaint.components)
    drawn = generate("a red seven", generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_array_equal(paint(inpaint, np.ones((16, 16), np.float32)), drawn)
    np.testing.assert_allclose(paint(inpaint, np.zeros((16, 16), np.float32))[0], pixels(PICTURE), atol=1e-6)
    np.testing.assert_allclose(paint(inpaint, strength=0)[0], pixels(PICTURE), atol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray((LEFT * 255).astype(np.uint8)),
        Image.fromarray((LEFT * 255).astype(np.uint8)).resize((32, 32)),
        (LEFT * 255).astype(np.uint8),
        LEFT[None],
        torch.from_numpy(LEFT),
        torch.from_numpy(LEFT)[None, None],
        [LEFT],
    ],
    ids=["PIL", "PIL of another size", "bytes", "numpy batch", "tensor", "tensor batch", "list"],
)
def test_every_form_of_a_mask_means_the_same(inpaint, mask):
    np.testing.assert_array_equal(paint(inpaint, mask), paint(inpaint))


def test_a_picture_that_resizing_left_a_little_below_zero_is_no_signed_one(inpaint):
    picture = pixels(PICTURE)
    picture[0, 0, 0] = -0.01
    kept = paint(inpaint, np.zeros((16, 16), np.float32), picture)[0]
    np.testing.assert_allclose(kept, picture.clip(0, 1), atol=1e-6)


def test_each_picture_may_have_its_own_mask(inpaint):
    masks = [LEFT, 1 - LEFT]
    generators = [torch.Generator().manual_seed(0) for _ in masks]
    both = inpaint(["a red seven"] * 2, PICTURE, masks, generator=generators, output_type="np").images
    for picture, mask in zip(both, masks, strict=True):
        np.testing.assert_allclose(picture, paint(inpaint, mask)[0], atol=1e-5)


def test_a_latent_is_painted_where_any_of_its_pixels_is(make_pipeline, latent_components):
    pipe = make_pipeline(LocalDiTInpaintPipeline, **latent_components)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 5, 5] = True
    cells = pipe.latent_mask(mask)
    assert cells.shape == (1, 1, 8, 8) and cells.nonzero().tolist() == [[0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("mask", "error", "phrase"),
    [
        (None, ValueError, "mask_image is missing"),
        ([], ValueError, "mask_image is missing"),
        ("mask.png", TypeError, "of type str"),
        ([LEFT] * 2, ValueError, "2 masks for 1 prompts"),
        (np.zeros((2, 16, 16, 3)), ValueError, r"shape \[2, 16, 16, 3\]"),
        (LEFT * 2, ValueError, "values from 0 to 2"),
        (LEFT * np.nan, ValueError, "values from nan"),
        (Image.new("L", (0, 4)), ValueError, "0 x 4 pixels"),
        (Image.new("I;16", (4, 4)), ValueError, "mode 'I;16'"),
    ],
)
def test_a_bad_mask_is_refused_before_any_work(inpaint, mask, error, phrase):
    inpaint.text_encoder.forward = inpaint.transformer.forward = None  # whoever calls it fails otherwise
    with pytest.raises(error, match=phrase):
        inpaint("a red seven", PICTURE, mask)


def test_the_auto_pipeline_and_from_pipe_share_every_weight(model_folder):
    inpaint = AutoPipelineForInpainting.from_pretrained(model_folder)
    assert type(inpaint) is LocalDiTInpaintPipeline
    for other in (LocalDiTPipeline, LocalDiTImg2ImgPipeline):
        made = other.from_pipe(inpaint.to(torch.bfloat16))
        assert made.transformer.dtype == made.text_encoder.dtype == torch.bfloat16
        assert made.transformer is inpaint.transformer and made.text_encoder is inpaint.text_encoder
        assert type(LocalDiTInpaintPipeline.from_pipe(made)) is LocalDiTInpaintPipeline
