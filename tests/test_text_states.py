"""A text is encoded, projected and turned into keys and values once, however many steps and pictures read it."""

from contextlib import nullcontext

import pytest
import torch

from tests.small_transformers import NEAR, call, make_inputs, make_model

PROMPT = "a red seven"


def count_calls(module) -> list:
    calls = []
    module.register_forward_hook(lambda module, arguments, output: calls.append(output))
    return calls


def draw(pipeline, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipeline(PROMPT, generator=generator, output_type="latent", **arguments).images


def test_a_generation_projects_its_text_once(pipeline):
    transformer = pipeline.transformer
    projections = [transformer.caption_projection, *(block.cross_attn.to_k for block in transformer.transformer_blocks)]
    counts = [count_calls(module) for module in projections]
    kept = draw(pipeline, num_inference_steps=5)
    assert [len(calls) for calls in counts] == [1] * len(projections)
    transformer.keep_text_states = nullcontext
    assert torch.equal(draw(pipeline, num_inference_steps=5), kept)
    assert [len(calls) for calls in counts] == [6] * len(projections)


def test_nothing_is_kept_after_a_generation_not_even_after_one_that_fails(pipeline):
    draw(pipeline)
    assert pipeline.transformer._text_states is None
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipeline, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert pipeline.transformer._text_states is None and not pipeline.transformer._keeps_text_states


def test_weights_that_a_callback_changes_are_heard(pipeline):
    def silence(pipeline, step, timestep, tensors):
        pipeline.transformer.transformer_blocks[0].cross_attn.to_v.weight.data.mul_(factor)
        return {}

    factor = 1.0
    unchanged = draw(pipeline, callback_on_step_end=silence)
    factor = 0.0
    assert not torch.equal(draw(pipeline, callback_on_step_end=silence), unchanged)


def test_another_text_is_projected_anew_and_gradients_are_never_kept():
    model = make_model()
    inputs = make_inputs(model)
    other = {**inputs, "encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    with torch.no_grad():
        expected = call(model, **inputs), call(model, **other)
        with model.keep_text_states():
            for _ in range(2):
                assert torch.equal(call(model, **inputs), expected[0])
                assert torch.equal(call(model, **other), expected[1])
    with model.keep_text_states():
        call(model, **inputs).sum().backward()
        assert model._text_states is None
    assert model.caption_projection.linear_1.weight.grad.any()


def test_compiled_blocks_read_a_kept_text():
    torch.compiler.reset()
    model = make_model()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with model.keep_text_states():
            for _ in range(2):
                torch.testing.assert_close(call(model, **inputs), expected, **NEAR)


def test_a_text_is_encoded_once_however_often_it_is_asked_for(pipeline):
    encoded = count_calls(pipeline.text_encoder)
    prompts = ["a seven", "a red seven", "a seven"]
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(prompts, num_images_per_prompt=2)
    assert [len(output[0]) for output in encoded] == [2, 1]  # two prompts, and the empty one
    alone = [pipeline.encode_prompt(prompt)[:2] for prompt in prompts]
    for row, (states, kept) in enumerate(alone):
        for copy in (2 * row, 2 * row + 1):
            torch.testing.assert_close(embeds[copy], states[0], **NEAR)
            assert torch.equal(mask[copy], kept[0])
    assert len(negative) == len(negative_mask) == 6


def test_the_transformer_reads_no_further_than_the_longest_text(pipeline):
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    long = draw(pipeline, max_sequence_length=64)
    assert set(seen) == {8}
    torch.testing.assert_close(draw(pipeline, max_sequence_length=8), long, **NEAR)
    conditions = pipeline.prompt_conditions(PROMPT, None, True, 1, None, None, None, None, None, 64)
    conditions["prompt_attention_mask"][0, 40] = 1  # a mask need not end where its text does
    pipeline.begin(2.0, None)
    assert pipeline.transformer_conditions(conditions)["encoder_hidden_states"].shape[1] == 48


def test_a_text_of_which_nothing_is_kept_still_runs(pipeline):
    conditions = pipeline.prompt_conditions(PROMPT, None, True, 1, None, None, None, None, None, 8)
    masks = {name: torch.zeros_like(value) for name, value in conditions.items() if name.endswith("mask")}
    pipeline.begin(2.0, None)
    assert pipeline.transformer_conditions({**conditions, **masks})["encoder_attention_mask"].shape == (2, 8)
