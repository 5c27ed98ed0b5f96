"""Facts about text to image, and about what both pipelines share."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers.callbacks import PipelineCallback
from peft import LoraConfig, get_peft_model_state_dict

from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline
from tests.drawing import PROMPT, calls_of, draw, seeded

DIFFUSION_SAMPLERS = ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"]
FLOW_SAMPLERS = {
    "flow_match_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_match_euler_shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow_match_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}


def scheduler(name, **config):
    return getattr(diffusers, name)(**config)


def close(a, b, tolerance=1e-4):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# What comes out


def test_all_output_types_hold_the_same_picture(pipeline):
    pictures = {kind: draw(pipeline, output_type=kind) for kind in ("latent", "pt", "np", "pil")}
    expected = (pictures["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pictures["pt"], expected) and expected.shape == (1, 3, 16, 16)
    assert np.array_equal(pictures["np"], expected.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pictures["pil"][0]), (pictures["np"][0] * 255).round().astype("uint8"))


def test_without_return_dict_a_tuple_comes_back(pipeline):
    (images,) = draw_tuple = pipeline(PROMPT, generator=seeded(0), output_type="latent", return_dict=False)
    assert isinstance(draw_tuple, tuple) and torch.equal(images, draw(pipeline))


def test_any_size_of_whole_tokens_is_drawn(pipeline):
    image = draw(pipeline, height=10, width=22, output_type="pil")[0]
    assert image.size == (22, 10)


def test_a_seed_names_a_picture(pipeline):
    assert torch.equal(draw(pipeline), draw(pipeline))
    assert not close(draw(pipeline), draw(pipeline, generator=seeded(1)))


def test_one_generator_gives_the_same_first_picture_whatever_the_batch(pipeline):
    # on a CPU, torch draws sizes that are multiples of 16 number by number in any case
    odd = {"height": 10, "width": 10}
    assert close(draw(pipeline, **odd), draw(pipeline, num_images_per_prompt=3, **odd)[:1])


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "sample"}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "sample"}, {}),
        ("FlowMatchEulerDiscreteScheduler", {}, {}),
        ("DDPMScheduler", {"prediction_type": "sample"}, {}),
        ("DDIMScheduler", {"prediction_type": "sample"}, {"eta": 1.0}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, {}),
    ],
)
def test_a_picture_with_its_own_generator_does_not_depend_on_its_batch(pipeline, name, config, arguments):
    pipeline.scheduler = scheduler(name, **config)
    prompts = ["a red seven", "a blue seven", "seven"]
    together = draw(pipeline, prompts, generator=seeded(0, 1, 2), **arguments)
    for row, prompt in enumerate(prompts):
        assert close(together[row : row + 1], draw(pipeline, prompt, generator=seeded(row), **arguments))


def test_the_pictures_of_a_prompt_lie_side_by_side(pipeline):
    images = draw(pipeline, ["red", "blue"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    assert close(images[1:2], draw(pipeline, "red", generator=seeded(1)))
    assert close(images[2:3], draw(pipeline, "blue", generator=seeded(2)))


def test_given_latents_are_the_noise_to_start_from(pipeline):
    noise = torch.randn(1, 3, 16, 16, generator=seeded(0))
    assert torch.equal(draw(pipeline), draw(pipeline, latents=noise, generator=None))


# Samplers


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", DIFFUSION_SAMPLERS)
def test_diffusion_samplers_draw(pipeline, name, prediction_type):
    pipeline.scheduler = scheduler(f"{name}Scheduler", prediction_type=prediction_type)
    assert draw(pipeline).isfinite().all() and pipeline.num_timesteps == 4


@pytest.mark.parametrize("name", DIFFUSION_SAMPLERS)
def test_a_network_that_sees_black_everywhere_draws_black(pipeline, name):
    # the predicted clean picture is constant, so every sampler of clean pictures must end on it
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.constant_(pipeline.transformer.proj_out.bias, -1)
    pipeline.scheduler = scheduler(f"{name}Scheduler", prediction_type="sample")
    assert close(draw(pipeline, num_inference_steps=20, height=8, width=8), torch.tensor(-1.0), 0.02)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_flow_samplers_carry_noise_along_a_constant_velocity(pipeline, name):
    # x_1 = x_0 + v, so with v = 1 everywhere the picture is the noise minus one
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.ones_(pipeline.transformer.proj_out.bias)
    class_name, config = FLOW_SAMPLERS[name]
    pipeline.scheduler = scheduler(class_name, **config)
    noise = torch.randn(1, 3, 16, 16, generator=seeded(0))
    assert close(draw(pipeline, num_inference_steps=6), noise - 1, 0.01)


@pytest.mark.parametrize("name", sorted(set(FLOW_SAMPLERS) - {"flow_match_heun"}))  # which is refused for them
def test_flow_samplers_reach_a_constant_clean_picture(pipeline, name):
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.constant_(pipeline.transformer.proj_out.bias, -1)
    class_name, config = FLOW_SAMPLERS[name]
    pipeline.scheduler = getattr(diffusers, class_name).from_config({**config, "prediction_type": "sample"})
    assert close(draw(pipeline, num_inference_steps=6), torch.tensor(-1.0), 0.01)


def test_dpm_solver_and_euler_converge_to_one_picture_on_a_network_of_clean_pictures(pipeline):
    solver = pipeline.scheduler
    assert solver.config.prediction_type == "sample" and solver.config.use_flow_sigmas
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(solver.config)

    def drawn_by(sampler, steps):
        pipeline.scheduler = sampler
        return draw(pipeline, num_inference_steps=steps, guidance_scale=1.0, height=8, width=8)

    few, many = ((drawn_by(solver, steps) - drawn_by(euler, steps)).abs() for steps in (15, 120))
    assert many.max() < 0.06 and many.mean() < few.mean() / 4


def test_a_flow_sampler_still_knows_the_prediction_type_after_saving(pipeline, tmp_path):
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config["prediction_type"] == "sample"
    assert torch.equal(draw(loaded), draw(pipeline))


def test_one_euler_step_is_the_textbook_one(pipeline):
    pipeline.scheduler = scheduler("FlowMatchEulerDiscreteScheduler")
    noise = torch.randn(1, 3, 16, 16)

    def velocity(text):
        ids = pipeline.tokenizer(text, padding="max_length", max_length=8, return_tensors="pt")
        with torch.no_grad():
            states = pipeline.text_encoder(**ids)[0]
            return pipeline.transformer(noise, states, torch.tensor([1000.0]), None, ids.attention_mask).sample

    unconditional, conditional = velocity(""), velocity(PROMPT)
    expected = noise - (unconditional + 3 * (conditional - unconditional))
    assert close(draw(pipeline, latents=noise, num_inference_steps=1, guidance_scale=3.0), expected)


def test_own_timesteps_and_sigmas_replace_the_even_ones(pipeline):
    pipeline.scheduler = scheduler("FlowMatchEulerDiscreteScheduler")
    even = draw(pipeline, num_inference_steps=3)
    sigmas = pipeline.scheduler.sigmas[:-1].tolist()
    assert close(draw(pipeline, sigmas=sigmas), even) and pipeline.num_timesteps == 3
    assert close(draw(pipeline, timesteps=[1000 * sigma for sigma in sigmas]), even)
    assert not close(draw(pipeline, sigmas=[1.0, 0.1]), even) and pipeline.num_timesteps == 2

    pipeline.scheduler = scheduler("DDPMScheduler")
    even = draw(pipeline, num_inference_steps=3)
    assert close(draw(pipeline, timesteps=pipeline.scheduler.timesteps.tolist()), even)


def test_eta_is_the_noise_of_ddim(pipeline):
    pipeline.scheduler = scheduler("DDIMScheduler", prediction_type="sample")
    assert torch.equal(draw(pipeline), draw(pipeline, eta=0.0))
    assert not close(draw(pipeline), draw(pipeline, eta=1.0))


def test_the_shift_of_a_larger_picture_follows_the_schedulers_own_numbers(pipeline):
    numbers = {"base_image_seq_len": 16, "max_image_seq_len": 64, "base_shift": 0.0, "max_shift": 1.0}
    pipeline.scheduler = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, **numbers)
    draw(pipeline, height=8, width=8, num_inference_steps=2)  # 16 tokens, so no shift
    assert close(pipeline.scheduler.sigmas[:2], torch.tensor([1.0, 0.001]))
    draw(pipeline, height=16, width=16, num_inference_steps=2)  # 64 tokens, so exp(1) / (exp(1) + 1 / s - 1)
    assert close(pipeline.scheduler.sigmas[1], np.e / (np.e + torch.tensor(999.0)))


def test_a_learned_variance_is_left_out(pipeline, tiny_transformer, make_pipeline):
    both = tiny_transformer(out_channels=6)
    weights = both.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):  # [patch * patch * out_channels, ...]
        weights[name] = weights[name].unflatten(0, (4, 6))[:, :3].flatten(0, 1)
    mean_only = tiny_transformer()
    mean_only.load_state_dict(weights)
    parts = {name: part for name, part in pipeline.components.items() if name != "transformer"}
    images = [draw(make_pipeline(**parts, transformer=transformer)) for transformer in (both, mean_only)]
    assert images[0].shape[1] == 3 and close(*images)


# Text and guidance


def test_embeddings_in_place_of_prompts_draw_the_same(pipeline):
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    with torch.no_grad():
        encoded = dict(zip(names, pipeline.encode_prompt(["red", "blue"], "seven"), strict=True))
    by_text = draw(pipeline, ["red", "blue"], negative_prompt="seven", num_images_per_prompt=2)
    pipeline.text_encoder = pipeline.tokenizer = None
    assert torch.equal(by_text, draw(pipeline, None, **encoded, num_images_per_prompt=2))


def test_prompts_are_encoded_where_there_is_nothing_but_a_text_encoder(pipeline, make_pipeline):
    encoder_only = make_pipeline(
        text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, transformer=None, scheduler=None
    )
    for ours, theirs in zip(encoder_only.encode_prompt(PROMPT), pipeline.encode_prompt(PROMPT), strict=True):
        assert torch.equal(ours, theirs)


def test_encode_prompt_repeats_each_row_for_its_pictures(pipeline):
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(["red", "blue"], num_images_per_prompt=2)
    assert embeds.shape == negative.shape == (4, 8, 24) and mask.shape == negative_mask.shape == (4, 8)
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[1], embeds[2])
    assert pipeline.encode_prompt("red", do_classifier_free_guidance=False)[2:] == (None, None)


def test_padding_of_the_text_has_no_influence(pipeline):
    assert close(draw(pipeline, max_sequence_length=8), draw(pipeline, max_sequence_length=20))


def test_a_prompt_that_is_cut_is_told_about(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        draw(pipeline, "a red seven " * 4)
    assert "Only the first 8 of 13 tokens are used" in caplog.text


def test_the_negative_prompt_is_empty_unless_given(pipeline):
    empty = draw(pipeline, ["red", "seven"])
    assert torch.equal(empty, draw(pipeline, ["red", "seven"], negative_prompt=""))
    assert not close(empty, draw(pipeline, ["red", "seven"], negative_prompt="blue"))
    for_all, for_each = (draw(pipeline, ["red", "seven"], negative_prompt=text) for text in ("blue", ["blue", "blue"]))
    assert torch.equal(for_all, for_each)


def test_without_guidance_the_network_runs_on_the_prompt_alone(pipeline):
    calls = calls_of(pipeline.transformer)
    plain = draw(pipeline, guidance_scale=1.0)
    assert not pipeline.do_classifier_free_guidance and {len(call["sample"]) for call in calls} == {1}
    assert torch.equal(plain, draw(pipeline, guidance_scale=1.0, negative_prompt="blue"))


def test_guidance_can_end_between_two_steps(pipeline):
    def end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step == 1 else pipe._guidance_scale
        return tensors

    calls = calls_of(pipeline.transformer)
    draw(pipeline, guidance_scale=3.0, callback_on_step_end=end)
    assert [len(call["sample"]) for call in calls] == [2, 2, 1, 1]


def test_the_size_reaches_a_transformer_that_is_conditioned_on_it(make_pipeline, tiny_transformer):
    pipeline = make_pipeline(transformer=tiny_transformer(use_additional_conditions=True))
    calls = calls_of(pipeline.transformer)
    draw(pipeline, height=8, width=16)
    assert calls[0]["added_cond_kwargs"]["resolution"].tolist() == [[8, 16]]
    assert calls[0]["added_cond_kwargs"]["aspect_ratio"].tolist() == [[0.5]]


def test_a_lora_adapter_weighs_what_attention_kwargs_say(pipeline):
    plain = draw(pipeline)
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not close(draw(pipeline), plain)
    assert close(draw(pipeline, attention_kwargs={"scale": 0.0}), plain)


def test_lora_weights_are_saved_and_loaded(pipeline, tmp_path):
    plain = draw(pipeline)
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = draw(pipeline)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
    pipeline.unload_lora_weights()
    assert close(draw(pipeline), plain)
    pipeline.load_lora_weights(tmp_path)
    assert close(draw(pipeline), adapted)


def test_lora_adapters_are_weighed_fused_disabled_and_deleted_by_name(pipeline, tmp_path):
    plain = draw(pipeline)
    alone = {}
    for seed, name in enumerate(("ink", "paper")):
        torch.manual_seed(seed)
        pipeline.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False), name)
        pipeline.set_adapters(name)
        alone[name] = draw(pipeline)
    assert not close(alone["ink"], alone["paper"]) and not close(alone["ink"], plain)
    assert pipeline.get_list_adapters() == {"transformer": ["ink", "paper"]}

    pipeline.set_adapters(["ink", "paper"], [1.0, 0.0])
    assert close(draw(pipeline), alone["ink"]) and set(pipeline.get_active_adapters()) == {"ink", "paper"}
    pipeline.disable_lora()
    assert close(draw(pipeline), plain)
    pipeline.enable_lora()
    pipeline.delete_adapters("paper")
    assert pipeline.get_list_adapters() == {"transformer": ["ink"]} and close(draw(pipeline), alone["ink"])

    pipeline.set_adapters("ink", 1.0)
    pipeline.fuse_lora(components=["transformer"], lora_scale=1.0)
    fused = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert fused.merged and close(draw(pipeline), alone["ink"])
    pipeline.unfuse_lora(components=["transformer"])
    assert not fused.merged and close(draw(pipeline, attention_kwargs={"scale": 0.0}), plain)


# Callbacks


def test_a_callback_sees_every_step_and_the_tensors_it_asks_for(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), float(pipe.current_timestep), sorted(tensors)))
        return {}

    names = list(pipeline._callback_tensor_inputs)
    draw(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert seen == [(step, timestep, timestep, sorted(names)) for step, timestep in enumerate(timesteps)]
    assert pipeline.current_timestep is None


def test_a_callback_may_return_nothing(pipeline):
    assert torch.equal(draw(pipeline), draw(pipeline, callback_on_step_end=lambda *arguments: None))


def test_latents_that_a_callback_returns_are_used(pipeline):
    def blacken(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    assert not draw(pipeline, callback_on_step_end=blacken).any()


def test_embeddings_that_a_callback_returns_are_used_from_the_next_step_on(pipeline):
    blue, mask, *_ = pipeline.encode_prompt("blue", do_classifier_free_guidance=False)
    calls = calls_of(pipeline.transformer)
    draw(
        pipeline,
        callback_on_step_end=lambda *arguments: {"prompt_embeds": blue, "prompt_attention_mask": mask},
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert not torch.equal(calls[0]["encoder_hidden_states"][1:], blue)
    assert all(torch.equal(call["encoder_hidden_states"][1:], blue) for call in calls[1:])


def test_a_callback_object_of_diffusers_brings_its_own_tensor_names(pipeline):
    class Blacken(PipelineCallback):
        tensor_inputs = ["latents", "prompt_embeds"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert sorted(callback_kwargs) == self.tensor_inputs
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    assert not draw(pipeline, callback_on_step_end=Blacken()).any()


def test_an_interrupted_call_ends_with_the_latents_it_has(pipeline):
    latents = []

    def interrupt(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        pipe._interrupt = step == 1

    calls = calls_of(pipeline.transformer)
    image = draw(pipeline, callback_on_step_end=interrupt)
    assert len(calls) == 2 and torch.equal(image, latents[-1])
    assert not torch.equal(draw(pipeline), image)  # the next call is not interrupted


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "HeunDiscrete", "FlowMatchHeunDiscrete"])
def test_the_progress_bar_counts_steps(pipeline, name, capsys):
    pipeline.scheduler = scheduler(f"{name}Scheduler")
    pipeline.set_progress_bar_config(disable=False)
    draw(pipeline)
    assert "4/4" in capsys.readouterr().err


# Autoencoders, precision, folders


def test_latents_are_decoded_by_the_autoencoder(make_pipeline, latent_components):
    pipeline = make_pipeline(**latent_components)
    pipeline.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    latents = draw(pipeline)
    assert latents.shape == (1, 4, 8, 8)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.5 + 0.25).sample
    assert close(draw(pipeline, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))
    assert draw(pipeline, output_type="pil", height=20, width=24)[0].size == (24, 20)


def test_decoding_in_slices_draws_the_same(make_pipeline, latent_components):
    pipeline = make_pipeline(**latent_components)
    at_once = draw(pipeline, num_images_per_prompt=3, output_type="pt")
    pipeline.vae.enable_slicing()
    assert close(at_once, draw(pipeline, num_images_per_prompt=3, output_type="pt"))


def test_decoding_in_tiles_draws_nearly_the_same(make_pipeline, latent_components):
    pipeline = make_pipeline(**latent_components)
    at_once = draw(pipeline, output_type="pt", height=32, width=32)
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 8, 16
    tiled = draw(pipeline, output_type="pt", height=32, width=32)
    assert tiled.shape == at_once.shape and not torch.equal(tiled, at_once)
    assert (tiled - at_once).abs().mean() < 0.1


@pytest.mark.parametrize("pipeline_class", [LocalDiTPipeline, LocalDiTImg2ImgPipeline])
def test_components_are_offloaded_in_the_order_of_their_use(pipeline_class):
    assert pipeline_class.model_cpu_offload_seq == "text_encoder->transformer->vae"


@pytest.mark.parametrize("pipeline_class", [LocalDiTPipeline, LocalDiTImg2ImgPipeline])
def test_an_offloaded_pipeline_draws_the_same_and_calls_its_components_in_order(make_pipeline, pipeline_class):
    """The hooks of accelerate with the CPU on both sides, which is what can be tried without an accelerator."""
    pipeline = make_pipeline(pipeline_class)
    image = {"image": torch.full((1, 3, 16, 16), 0.5)} if pipeline_class is LocalDiTImg2ImgPipeline else {}
    expected = draw(pipeline, output_type="pt", **image)
    pipeline.enable_model_cpu_offload(device="cpu")
    called = []
    for name in ("text_encoder", "transformer"):
        component = getattr(pipeline, name)
        assert isinstance(component._hf_hook, CpuOffload)
        component.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(draw(pipeline, output_type="pt", **image), expected)
    assert called[0] == "text_encoder" and set(called[called.index("transformer") :]) == {"transformer"}
