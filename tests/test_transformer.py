"""Facts about the transformer: its arithmetic, what conditions it, its mixers."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from localdit import LocalDiTTransformer2DModel
from localdit.mixers.full import FullAttnProcessor
from localdit.mixers.window import WindowAttnProcessor
from tests.small_transformers import (
    CLASSES,
    EVERY_PARAMETER,
    LABELS,
    NEAR,
    SIZES,
    TEXT,
    TEXT_WIDTH,
    UNCONDITIONAL,
    Reference,
    call,
    make_inputs,
    make_model,
    mixers_of,
)


@pytest.mark.parametrize(
    "changes",
    [
        TEXT,
        CLASSES,
        UNCONDITIONAL,
        SIZES,
        {**CLASSES, **SIZES},
        {"attention_residual": True},
        {"in_channels": 3, "out_channels": 6, "attention_bias": False},
        {"patch_size": 1, "sample_size": 8},
        {"patch_size": 4, "norm_eps": 1e-3, "qk_norm_eps": 1e-2, "rope_theta": 50.0},
        {"qk_norm": None},
        {"sample_size": 64},
        {"sample_size": 128},
        {"interpolation_scale": 2},
    ],
    ids=str,
)
def test_forward_is_its_definition(changes):
    model = make_model(**changes)
    for height, width in [(16, 16), (12, 20), (4, 8)]:
        inputs = make_inputs(model, batch_size=3, height=height, width=width)
        with torch.no_grad():
            output = call(model, **inputs)
        expected = Reference(model)(**inputs)
        assert expected.std() > 0.1  # else the comparison would say nothing
        torch.testing.assert_close(output.double(), expected, **NEAR)


def test_interpolation_keeps_positions_of_large_models_in_the_range_of_small_ones():
    scales = {size: make_model(sample_size=size, num_layers=1).pos_embed.interpolation_scale for size in (16, 64, 128)}
    assert scales == {16: 1, 64: 1, 128: 2}
    assert make_model(sample_size=16, interpolation_scale=3.0, num_layers=1).pos_embed.interpolation_scale == 3.0


def test_resolution_conditions_models_of_128_latents_unless_told_otherwise():
    assert make_model(sample_size=128, num_layers=1).use_additional_conditions
    assert not make_model(sample_size=128, num_layers=1, use_additional_conditions=False).use_additional_conditions
    assert not make_model(sample_size=64, num_layers=1).use_additional_conditions


@pytest.mark.parametrize("sample_size", [16, 128])
def test_with_full_attention_it_is_pixart(sample_size):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": sample_size}
    pixart = PixArtTransformer2DModel(**sizes, caption_channels=TEXT_WIDTH, cross_attention_dim=24).eval()
    model = make_model(**sizes, out_channels=8, token_mixers=("full",), rope_theta=None, qk_norm=None)
    for parameter in pixart.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    names = {name: name.replace(".attn1.", ".attn.").replace(".attn2.", ".cross_attn.") for name in pixart.state_dict()}
    model.load_state_dict({names[name]: tensor for name, tensor in pixart.state_dict().items()})
    for height, width in [(16, 16), (8, 20)]:
        inputs = make_inputs(model, height=height, width=width)
        inputs.setdefault("added_cond_kwargs", {"resolution": None, "aspect_ratio": None})
        with torch.no_grad():
            output, expected = call(model, **inputs), call(pixart, **inputs)
        assert expected.std() > 0.1
        torch.testing.assert_close(output, expected, **NEAR)


def test_with_the_weights_that_training_starts_from_it_predicts_zero_and_hears_no_text_yet():
    model = LocalDiTTransformer2DModel(2, 12, num_layers=2, sample_size=16, **TEXT)
    assert call(model, **make_inputs(model)).any()
    model.initialize_weights()
    assert not call(model, **make_inputs(model)).any()
    nn.init.normal_(model.proj_out.weight)
    inputs = make_inputs(model)
    output = call(model, **inputs)
    inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
    assert torch.equal(call(model, **inputs), output)


def test_every_condition_matters():
    for changes, name in [(TEXT, "encoder_hidden_states"), (CLASSES, "class_labels"), (UNCONDITIONAL, "timestep")]:
        model = make_model(**changes)
        inputs = make_inputs(model, batch_size=1)
        changed = {**inputs, name: inputs[name] + 1}
        with torch.no_grad():
            assert (call(model, **changed) - call(model, **inputs)).abs().max() > 1e-3


def test_the_last_label_is_the_null_class():
    model = make_model(**CLASSES)
    inputs = make_inputs(model, batch_size=1)
    with torch.no_grad():
        outputs = [call(model, **{**inputs, "class_labels": torch.tensor([label])}) for label in range(LABELS + 1)]
    assert len({output.sum().item() for output in outputs}) == LABELS + 1
    with pytest.raises(ValueError, match=f"class_labels holds {LABELS + 1}"):
        call(model, **{**inputs, "class_labels": torch.tensor([LABELS + 1])})


def test_a_tuple_is_returned_on_request():
    model = make_model()
    inputs = make_inputs(model)
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, call(model, **inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_text_has_no_influence(dtype):
    model = make_model().to(dtype)
    inputs = make_inputs(model, dtype=dtype)
    masked = inputs["encoder_attention_mask"] == 0
    assert masked.any()
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].masked_fill(masked[..., None], 100.0)}
    with torch.no_grad():
        assert torch.equal(call(model, **changed), call(model, **inputs))


def test_masked_text_is_as_if_it_were_cut_off():
    model = make_model()
    inputs = make_inputs(model, batch_size=1)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])
    cut = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :4], "encoder_attention_mask": None}
    with torch.no_grad():
        torch.testing.assert_close(call(model, **inputs), call(model, **cut), **NEAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_formats_agree(dtype):
    model = make_model().to(dtype)
    inputs = make_inputs(model, dtype=dtype)
    mask = inputs["encoder_attention_mask"]
    bias = ((1 - mask.float()) * -10000.0)[:, None]
    formats = [mask.bool(), mask.to(dtype), mask.bool()[:, None], bias, bias.to(dtype)]
    with torch.no_grad():
        expected = call(model, **inputs)
        for same in formats:
            output = call(model, **{**inputs, "encoder_attention_mask": same})
            torch.testing.assert_close(output, expected)


def test_without_a_mask_all_text_is_read():
    model = make_model()
    inputs = make_inputs(model)
    everything = {**inputs, "encoder_attention_mask": torch.ones(2, 6)}
    inputs["encoder_attention_mask"] = None
    with torch.no_grad():
        torch.testing.assert_close(call(model, **inputs), call(model, **everything), **NEAR)


def test_mixers_are_tiled_and_shifts_count_layers_of_their_own_kind():
    model = make_model(num_layers=7, token_mixers=("window", "window", "full"))
    window, full = WindowAttnProcessor, FullAttnProcessor
    assert [type(mixer) for mixer in mixers_of(model)] == [window, window, full, window, window, full, window]
    assert [mixer.shift for mixer in mixers_of(model) if isinstance(mixer, window)] == [0, 1, 0, 1, 0]


def test_a_mixers_parameters_are_the_models():
    model = make_model(mixer_options=EVERY_PARAMETER)
    learned = {name for name, _ in model.named_parameters() if "processor" in name}
    names = ("relative_position_bias_table", "context_embedding")
    assert learned == {f"transformer_blocks.{i}.attn.processor.{name}" for i in range(3) for name in names}
    assert learned <= set(model.state_dict())
    call(model.train(), **make_inputs(model)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_set_token_mixers_changes_layers_and_config_together():
    model = make_model()
    options = {"window": {"window_size": 2, "global_context": 3}}
    model.set_token_mixers(("window", "full"), options)
    assert [type(mixer) for mixer in mixers_of(model)] == [WindowAttnProcessor, FullAttnProcessor, WindowAttnProcessor]
    assert [mixer.window_size for mixer in mixers_of(model)[::2]] == [2, 2]
    assert tuple(model.config.token_mixers) == ("window", "full")
    assert model.config.mixer_options == options

    twin = make_model(token_mixers=("window", "full"), mixer_options=options)
    twin.load_state_dict(model.state_dict())
    inputs = make_inputs(model)
    with torch.no_grad():
        assert torch.equal(call(model, **inputs), call(twin, **inputs))


def test_a_new_model_takes_a_single_name_as_a_list_of_one():
    assert make_model(token_mixers="full").config.token_mixers == ("full",)


def test_set_token_mixers_takes_a_single_name():
    model = make_model()
    model.set_token_mixers("full")
    assert all(isinstance(mixer, FullAttnProcessor) for mixer in mixers_of(model))
    assert tuple(model.config.token_mixers) == ("full",)


def test_set_token_mixers_keeps_what_was_learned_where_the_shapes_agree():
    model = make_model(mixer_options=EVERY_PARAMETER)
    learned = [{name: p.clone() for name, p in mixer.named_parameters()} for mixer in mixers_of(model)]

    model.set_token_mixers("window", {"window": {**EVERY_PARAMETER["window"], "shift_schedule": "cyclic"}})
    assert [mixer.shift for mixer in mixers_of(model)] == [0, 1, 2]
    for mixer, before in zip(mixers_of(model), learned, strict=True):
        assert all(torch.equal(parameter, before[name]) for name, parameter in mixer.named_parameters())

    model.set_token_mixers("window", {"window": {**EVERY_PARAMETER["window"], "window_size": 4}})
    for mixer in mixers_of(model):
        assert mixer.relative_position_bias_table.shape == (49, 2)
        assert not mixer.relative_position_bias_table.any()
    for mixer, before in zip(mixers_of(model), learned, strict=True):
        assert torch.equal(mixer.context_embedding, before["context_embedding"])


def test_set_token_mixers_keeps_dtype_and_backend():
    model = make_model(mixer_options=EVERY_PARAMETER).to(torch.bfloat16)
    model.set_attention_backend("native")
    model.set_token_mixers("window", {"window": {"window_size": 2, "relative_position_bias": True}})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {"native"}


def test_set_token_mixers_keeps_the_steps_of_ssm_in_fp32_as_loading_does(tmp_path):
    make_model(token_mixers="window").save_pretrained(tmp_path)
    model = LocalDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.set_token_mixers("ssm")
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    own = model.state_dict()
    assert all(tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]) for name, tensor in loaded.items())
    assert own["transformer_blocks.0.attn.processor.kernel.log_step"].dtype == torch.float32


def test_refused_mixers_leave_the_model_as_it_was():
    model = make_model()
    before, config = mixers_of(model), dict(model.config)
    with pytest.raises(ValueError, match="'widow'"):
        model.set_token_mixers("widow")
    assert mixers_of(model) == before
    assert dict(model.config) == config


def test_a_single_timestep_stands_for_the_whole_batch():
    model = make_model()
    inputs = make_inputs(model)
    inputs["timestep"] = torch.full_like(inputs["timestep"], 250.0)
    with torch.no_grad():
        whole = call(model, **inputs)
        for single in (250.0, torch.tensor(250.0)):
            assert torch.equal(call(model, **{**inputs, "timestep": single}), whole)


def test_a_frozen_model_stays_frozen_with_new_mixers():
    model = make_model().requires_grad_(False)
    model.set_token_mixers("window", {"window": {"window_size": 2, "global_context": 2}})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_config_does_not_change_with_the_options_it_was_made_from():
    options = {"window": {"window_size": 2}}
    made, changed = make_model(mixer_options=options), make_model()
    changed.set_token_mixers("window", options)
    options["window"]["window_size"] = 7
    assert made.config.mixer_options == changed.config.mixer_options == {"window": {"window_size": 2}}
