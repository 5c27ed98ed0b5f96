"""Precisions, and pipelines that are saved and loaded with their settings."""

import diffusers
import pytest
import torch

from localdit import LocalDiTPipeline
from tests.drawing import PROMPT, calls_of, draw


def test_a_pipeline_in_bfloat16_draws(pipeline):
    reference = draw(pipeline, output_type="pt")
    image = draw(pipeline.to(torch.bfloat16), output_type="pt")
    assert (image.float() - reference).abs().mean() < 0.05


def test_a_saved_pipeline_draws_the_same_bits(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for loaded in (LocalDiTPipeline.from_pretrained(tmp_path), LocalDiTPipeline.from_pretrained(str(tmp_path))):
        assert torch.equal(draw(loaded), draw(pipeline))


def test_a_saved_latent_pipeline_draws_the_same_bits(make_pipeline, latent_components, tmp_path):
    pipeline = make_pipeline(**latent_components)
    pipeline.save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, output_type="pt"), draw(pipeline, output_type="pt"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loader", [LocalDiTPipeline, diffusers.DiffusionPipeline])
def test_weights_stored_in_half_precision_come_back_in_fp32(pipeline, tmp_path, loader, stored):
    reference = draw(pipeline, output_type="pt")
    pipeline.to(stored).save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.transformer.dtype == loaded.text_encoder.dtype == torch.float32
    assert (draw(loaded, output_type="pt") - reference).abs().max() < 0.02
    asked = {"text_encoder": torch.bfloat16, "default": torch.float32}
    loaded = loader.from_pretrained(tmp_path, dtype=asked)
    assert (loaded.transformer.dtype, loaded.text_encoder.dtype) == (torch.float32, torch.bfloat16)


def test_a_text_encoder_that_others_stored_in_half_precision_comes_in_fp32_too(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.text_encoder.half().save_pretrained(tmp_path / "text_encoder")
    assert LocalDiTPipeline.from_pretrained(tmp_path).text_encoder.dtype == torch.float32


def test_a_text_encoder_in_half_precision_serves_a_transformer_in_fp32(pipeline):
    reference = draw(pipeline, output_type="pt")
    pipeline.text_encoder.half()
    assert (draw(pipeline, output_type="pt") - reference).abs().max() < 0.02


def test_a_component_can_be_given_instead_of_loaded(model_folder, pipeline):
    loaded = LocalDiTPipeline.from_pretrained(model_folder, text_encoder=None, transformer=pipeline.transformer)
    assert loaded.text_encoder is None and loaded.transformer is pipeline.transformer


def test_a_call_without_settings_uses_those_of_the_folder(make_pipeline, tmp_path):
    defaults = {
        "height": 8,
        "width": 12,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "strength": 0.4,
        "max_sequence_length": 6,
    }
    make_pipeline(call_defaults=defaults).save_pretrained(tmp_path)
    pipeline = LocalDiTPipeline.from_pretrained(tmp_path)
    assert pipeline.config.call_defaults == defaults
    calls = calls_of(pipeline.transformer)
    image = pipeline(PROMPT).images[0]
    assert image.size == (12, 8) and len(calls) == 3 and pipeline.guidance_scale == 1.5
    assert calls[0]["encoder_hidden_states"].shape[1] == 6
    assert draw(pipeline, height=16, num_inference_steps=1).shape[-2:] == (16, 12) and len(calls) == 4


def test_without_call_defaults_the_size_is_the_transformers_own(make_pipeline):
    pipeline = make_pipeline(call_defaults=None)
    assert pipeline(PROMPT, num_inference_steps=1).images[0].size == (16, 16)
    assert pipeline.guidance_scale == 4.5 and pipeline.call_default("num_inference_steps", None) == 20
