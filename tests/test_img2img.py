"""Facts about image to image: where the denoising starts, and which pictures it may start from."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline

PROMPT = "a red seven"
SAMPLERS = {
    "ddpm": ("DDPMScheduler", {"prediction_type": "sample"}),
    "ddim": ("DDIMScheduler", {"prediction_type": "epsilon"}),
    "dpm": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "dpm_flow": ("DPMSolverMultistepScheduler", {"prediction_type": "sample", "use_flow_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "sample"}),
    "euler": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "heun": ("HeunDiscreteScheduler", {"prediction_type": "sample"}),
    "pndm": ("PNDMScheduler", {"prediction_type": "v_prediction"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}


@pytest.fixture
def picture():
    """Random bytes [16, 16, 3]."""
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def latent_img2img(make_pipeline, latent_components):
    return make_pipeline(LocalDiTImg2ImgPipeline, **latent_components)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def draw(pipeline, image, strength=0.5, prompt=PROMPT, **arguments):
    """The picture [B, C, H, W] in [0, 1] for a prompt and seed 0."""
    arguments = {"generator": seeded(0), "output_type": "pt", **arguments}
    return pipeline(prompt, image=image, strength=strength, **arguments).images


def as_tensor(picture):
    """Bytes [H, W, 3] as floats [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


def close(a, b, tolerance=1e-4):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# Strength


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_0_returns_the_picture_and_1_ignores_it(img2img, picture, name):
    class_name, config = SAMPLERS[name]
    img2img.scheduler = getattr(diffusers, class_name)(**config)
    assert close(draw(img2img, picture, strength=0), as_tensor(picture), 1e-6)
    noise_only = draw(img2img, picture, strength=1)
    assert torch.equal(noise_only, draw(img2img, 255 - picture, strength=1))
    half = draw(img2img, picture, strength=0.5)
    assert half.isfinite().all() and not close(half, noise_only) and not close(half, as_tensor(picture))


def test_strength_0_returns_the_very_bytes_of_a_pil_image(img2img, picture):
    image = draw(img2img, Image.fromarray(picture), strength=0, output_type="pil")[0]
    assert np.array_equal(np.asarray(image), picture)


def test_strength_1_is_text_to_image(img2img, latent_img2img, picture):
    img2img.scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")  # its noise is not of unit variance
    for pipeline in (img2img, latent_img2img):
        text_to_image = LocalDiTPipeline.from_pipe(pipeline)
        text_to_image.set_progress_bar_config(disable=True)
        expected = text_to_image(PROMPT, generator=seeded(0), output_type="pt").images
        assert torch.equal(draw(pipeline, picture, strength=1), expected)


@pytest.mark.parametrize(("strength", "steps"), [(0, 0), (0.25, 1), (0.5, 2), (0.8, 3), (1, 4)])
def test_strength_is_the_share_of_steps_that_run(img2img, picture, strength, steps):
    seen = []
    draw(img2img, picture, strength, callback_on_step_end=lambda pipe, step, *rest: seen.append(step))
    assert seen == list(range(steps)) and img2img.num_timesteps == steps


def test_a_sampler_that_takes_two_calls_a_step_makes_the_share_of_its_steps(img2img, picture):
    calls = []
    img2img.transformer.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    img2img.scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    draw(img2img, picture, strength=0.5)
    assert len(calls) == 3 and img2img.num_timesteps == 2  # two steps of four, the last of which is a plain one


def test_the_denoising_starts_from_the_picture_noised_as_in_training(img2img, picture):
    first_inputs = []
    img2img.transformer.register_forward_pre_hook(lambda module, arguments: first_inputs.append(arguments[0]))
    noise = torch.randn(1, 3, 16, 16)
    clean = as_tensor(picture) * 2 - 1

    img2img.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    draw(img2img, picture, latents=noise, guidance_scale=1)
    sigma = img2img.scheduler.timesteps[2] / 1000  # two of four steps are left
    assert 0.5 < sigma < 0.8 and close(first_inputs[0], (1 - sigma) * clean + sigma * noise)

    first_inputs.clear()
    img2img.scheduler = diffusers.DDIMScheduler()
    draw(img2img, picture, latents=noise, guidance_scale=1)
    kept = img2img.scheduler.alphas_cumprod[img2img.scheduler.timesteps[2]]
    assert close(first_inputs[0], kept.sqrt() * clean + (1 - kept).sqrt() * noise)


def test_own_timesteps_are_cut_by_strength_too(img2img, picture):
    img2img.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    draw(img2img, picture, sigmas=[1.0, 0.6, 0.3, 0.1, 0.05, 0.01], strength=0.5)
    assert img2img.num_timesteps == 3


def test_the_strength_of_the_folder_is_used_where_none_is_given(make_pipeline, picture):
    defaults = {"num_inference_steps": 5, "guidance_scale": 1.0, "max_sequence_length": 8}
    pipeline = make_pipeline(LocalDiTImg2ImgPipeline, call_defaults={**defaults, "strength": 0.4})
    pipeline(PROMPT, picture)
    assert pipeline.num_timesteps == 2
    pipeline = make_pipeline(LocalDiTImg2ImgPipeline, call_defaults=defaults)
    pipeline(PROMPT, picture)
    assert pipeline.num_timesteps == 3


# Pictures


def test_every_way_to_hand_over_a_picture_is_the_same(img2img, picture):
    pil, unit = Image.fromarray(picture), picture.astype("float32") / 255
    tensor = as_tensor(picture)
    ways = {
        "pil": pil,
        "list of pil": [pil],
        "bytes": picture,
        "batch of bytes": picture[None],
        "floats": unit,
        "list of floats": [unit],
        "batch of floats": unit[None],
        "tensor": tensor[0],
        "batch of tensors": tensor,
        "list of tensors": [tensor[0]],
        "tensor of bytes": torch.from_numpy(picture).permute(2, 0, 1),
        "tensor in [-1, 1]": tensor * 2 - 1,
    }
    expected = draw(img2img, pil)
    for name, image in ways.items():
        assert close(draw(img2img, image), expected, 1e-3), name


def test_a_picture_without_colour_or_with_transparency_is_read_as_rgb(img2img, picture):
    grey = Image.fromarray(picture).convert("L")
    assert close(draw(img2img, grey), draw(img2img, grey.convert("RGB")))
    clear = Image.fromarray(picture).convert("RGBA")
    assert close(draw(img2img, clear), draw(img2img, Image.fromarray(picture)))
    few_colours = Image.fromarray(picture).convert("P")
    assert close(draw(img2img, few_colours), draw(img2img, few_colours.convert("RGB")))


def test_a_model_of_one_channel_takes_grey_pictures(make_pipeline, tiny_transformer, picture):
    pipeline = make_pipeline(LocalDiTImg2ImgPipeline, transformer=tiny_transformer(in_channels=1))
    image = draw(pipeline, Image.fromarray(picture), strength=0, output_type="pil")[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(picture).convert("L")))


@pytest.mark.parametrize("size", [(16, 16), (24, 10)])
def test_a_picture_of_another_size_is_resized(img2img, size):
    image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    drawn = draw(img2img, image, strength=0, width=size[0], height=size[1], output_type="pil")[0]
    assert drawn.size == size
    expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=int)
    assert abs(np.asarray(drawn, dtype=int) - expected).max() <= 1


def test_pictures_of_different_sizes_go_into_one_batch(img2img, picture):
    images = [Image.fromarray(picture), Image.new("RGB", (5, 9), "red")]
    together = draw(img2img, images, prompt=["red", "blue"], generator=seeded(0, 1))
    assert close(together[:1], draw(img2img, images[0], prompt="red", generator=seeded(0)))
    assert close(together[1:], draw(img2img, images[1], prompt="blue", generator=seeded(1)))


def test_one_picture_serves_all_prompts(img2img, picture):
    together = draw(img2img, picture, prompt=["red", "blue"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    assert together.shape == (4, 3, 16, 16)
    assert close(together[3:], draw(img2img, picture, prompt="blue", generator=seeded(3)))


def test_each_picture_goes_with_its_prompt(img2img, picture):
    images = np.stack([picture, 255 - picture])
    drawn = draw(img2img, images, strength=0, prompt=["red", "blue"], num_images_per_prompt=2, generator=None)
    first, second = as_tensor(picture), as_tensor(255 - picture)
    assert close(drawn, torch.cat([first, first, second, second]), 1e-6)


def test_a_list_may_hold_batches_as_diffusers_own_pipelines_allow(img2img, picture):
    tensors = [as_tensor(picture), as_tensor(255 - picture)]
    drawn = draw(img2img, tensors, strength=0, prompt=["red", "blue"])
    assert close(drawn, torch.cat(tensors), 1e-6)


def test_a_consistency_decoder_tells_its_channels_by_another_name(latent_img2img):
    config = {name: value for name, value in latent_img2img.vae.config.items() if name != "in_channels"}
    latent_img2img.vae._internal_dict = FrozenDict({**config, "encoder_in_channels": 3})
    assert latent_img2img.pixel_channels == 3


def test_image_to_image_may_have_a_default_guidance_of_its_own(make_pipeline, picture):
    defaults = {"guidance_scale": 5.0, "num_inference_steps": 2}
    for extra, used in (({}, 5.0), ({"img2img_guidance_scale": 3.0}, 3.0)):
        pipeline = make_pipeline(LocalDiTImg2ImgPipeline, call_defaults=defaults | extra)
        draw(pipeline, picture)
        assert pipeline.guidance_scale == used
        draw(pipeline, picture, guidance_scale=2.0)
        assert pipeline.guidance_scale == 2.0
        text = LocalDiTPipeline.from_pipe(pipeline)
        text.set_progress_bar_config(disable=True)
        text(PROMPT)
        assert text.guidance_scale == 5.0


@pytest.mark.parametrize("name", ["ddpm", "dpm_flow", "flow"])
def test_a_picture_with_its_own_generator_does_not_depend_on_its_batch(img2img, latent_img2img, picture, name):
    class_name, config = SAMPLERS[name]
    for pipeline in (img2img, latent_img2img):
        pipeline.scheduler = getattr(diffusers, class_name)(**{**config, "prediction_type": "sample"} if config else {})
        together = draw(pipeline, picture, num_images_per_prompt=3, generator=seeded(0, 1, 2))
        assert close(together[1:2], draw(pipeline, picture, generator=seeded(1)))


def test_given_latents_are_the_noise_that_is_mixed_in(img2img, picture):
    noise = torch.randn(1, 3, 16, 16, generator=seeded(0))
    assert torch.equal(draw(img2img, picture), draw(img2img, picture, latents=noise, generator=None))


# Autoencoders


def test_strength_0_is_the_autoencoders_round_trip(latent_img2img, picture):
    latent_img2img.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    with torch.no_grad():
        latents = latent_img2img.vae.encode(as_tensor(picture) * 2 - 1).latent_dist.mode()
        decoded = latent_img2img.vae.decode(latents).sample
    assert close(draw(latent_img2img, picture, strength=0), (decoded / 2 + 0.5).clamp(0, 1))


def test_latents_are_taken_in_place_of_a_picture(latent_img2img, picture):
    config = latent_img2img.vae.config
    with torch.no_grad():
        latents = latent_img2img.vae.encode(as_tensor(picture) * 2 - 1).latent_dist.mode() * config.scaling_factor
    expected = draw(latent_img2img, picture)
    assert close(draw(latent_img2img, latents), expected) and close(draw(latent_img2img, latents[0]), expected)


def test_a_deterministic_autoencoder_serves_as_well(make_pipeline, tiny_transformer, picture):
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    transformer = tiny_transformer(in_channels=4, sample_size=8)
    pipeline = make_pipeline(LocalDiTImg2ImgPipeline, vae=vae, transformer=transformer)
    assert draw(pipeline, picture).shape == (1, 3, 16, 16)


def test_strength_is_the_share_of_noise_also_where_flow_sigmas_are_shifted(make_pipeline):
    for shift, steps in ((1.0, 12), (3.0, 7)):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=shift, prediction_type="sample"
        )
        pipe = make_pipeline(LocalDiTImg2ImgPipeline, scheduler=scheduler)
        schedule, count = pipe.set_timesteps(20, None, None, 16, 16, torch.device("cpu"))
        timesteps, left = pipe.last_timesteps(schedule, count, 0.6)
        assert left == len(timesteps) == steps
        assert abs(timesteps[0].item() - 600) < 25
