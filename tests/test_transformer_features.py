"""What the transformer takes from diffusers and torch: precisions, compiling, backends, saving, adapters."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from diffusers.models import attention_dispatch as dispatch
from torch import nn

from localdit import LocalDiTTransformer2DModel
from tests.small_transformers import (
    CLASSES,
    EVERY_PARAMETER,
    NEAR,
    SIZES,
    TEXT,
    call,
    make_inputs,
    make_model,
    mixers_of,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", [TEXT, CLASSES, SIZES], ids=str)
def test_half_precision_is_finite_and_close_to_fp32(changes, dtype):
    model = make_model(mixer_options=EVERY_PARAMETER, **changes)
    inputs = make_inputs(model)
    half_inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        expected = call(model, **inputs)
        output = call(model.to(dtype), **half_inputs)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert (output.float() - expected).norm() / expected.norm() < 16 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_mixed_precision_trains_close_to_fp32():
    model = make_model(mixer_options=EVERY_PARAMETER).train()
    inputs = make_inputs(model)
    parameters = list(model.parameters())
    expected = call(model, **inputs)
    wanted = torch.autograd.grad(expected.square().mean(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        output = call(model, **inputs)
    found = torch.autograd.grad(output.float().square().mean(), parameters)
    assert output.dtype == torch.bfloat16
    found, wanted = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (found, wanted))
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    assert (found - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("conditioning", [TEXT, CLASSES], ids=str)
def test_gradient_checkpointing_changes_no_gradient(conditioning):
    model = make_model(mixer_options=EVERY_PARAMETER, **conditioning).train()
    inputs = make_inputs(model)

    def gradients():
        model.zero_grad()
        call(model, **inputs).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    kept = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    recomputed = gradients()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_compiled_model_equals_the_eager_one_at_every_size():
    torch.compiler.reset()
    model = make_model(num_layers=1, mixer_options=EVERY_PARAMETER)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for height, width in [(12, 12), (12, 20)]:
        inputs = make_inputs(model, height=height, width=width)
        with torch.no_grad():
            torch.testing.assert_close(call(compiled, **inputs), call(model, **inputs), **NEAR)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiled_to_machine_code_equals_the_eager_one():
    torch.compiler.reset()
    model = make_model(num_layers=1, mixer_options=EVERY_PARAMETER)
    inputs = make_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(call(torch.compile(model, fullgraph=True), **inputs), call(model, **inputs), **NEAR)


def test_compiled_blocks_give_the_eager_gradients():
    torch.compiler.reset()
    model = make_model(num_layers=2, token_mixers=("full", "window"), mixer_options=EVERY_PARAMETER)
    inputs = make_inputs(model, height=12, width=12)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(call(model, **inputs).square().mean(), parameters)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(call(model, **inputs).square().mean(), parameters)
    for gradient, wish in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wish, **NEAR)


@pytest.mark.parametrize("fused", [TEXT, CLASSES, {"attention_bias": False}], ids=str)
def test_fused_projections_give_equal_outputs(fused):
    model = make_model(mixer_options=EVERY_PARAMETER, **fused)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.fuse_qkv_projections()
        assert all(block.attn.fused_projections for block in model.transformer_blocks)
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)
        model.unfuse_qkv_projections()
        assert torch.equal(call(model, **inputs), expected)


def test_fused_projections_are_the_ones_in_use():
    model = make_model()
    inputs = make_inputs(model)
    model.fuse_qkv_projections()
    with torch.no_grad():
        expected = call(model, **inputs)
        for block in model.transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.cross_attn.to_k):
                projection.weight.zero_()
        assert torch.equal(call(model, **inputs), expected)


@pytest.mark.parametrize("how", ["for the model", "for everything"])
def test_masks_go_to_a_kernel_that_takes_them(monkeypatch, how):
    """With a stand-in for flash attention, which refuses masks as the real one does."""
    masked = []

    def flash(query, key, value, attn_mask=None, **kwargs):
        masked.append(attn_mask is not None)
        assert attn_mask is None, "attn_mask is not supported for flash-attn 2"
        return F.scaled_dot_product_attention(*(states.transpose(1, 2) for states in (query, key, value))).transpose(
            1, 2
        )

    model = make_model(**TEXT)
    inputs = make_inputs(model)
    expected = call(model, **inputs)
    flash_name = dispatch.AttentionBackendName.FLASH
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, flash_name, flash)
    monkeypatch.setitem(registry._supported_arg_names, flash_name, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda backend: None)
    if how == "for the model":
        model.set_attention_backend("flash")
        output = call(model, **inputs)
    else:
        with dispatch.attention_backend("flash"):
            output = call(model, **inputs)
    assert masked and not any(masked)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_an_attention_backend_reaches_every_processor():
    model = make_model(token_mixers=("window", "full"))
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.set_attention_backend("native")
        processors = model.attn_processors
        assert len(processors) == 6
        assert {processor._attention_backend for processor in processors.values()} == {"native"}
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_layerwise_casting_keeps_weights_in_eight_bits_and_computes_in_more():
    model = make_model(mixer_options=EVERY_PARAMETER)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        output = call(model, **inputs)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert block.attn.norm_q.weight.dtype == torch.float32
    assert (output - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer_options": EVERY_PARAMETER},
        {"token_mixers": ("window", "full"), "mixer_options": {"window": {"shift_schedule": (0, 3, 1)}}},
        {**CLASSES, "attention_residual": True, "rope_theta": None, "qk_norm": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_a_saved_model_loads_bit_for_bit(tmp_path, changes, max_shard_size):
    model = make_model(**changes)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "50KB")
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    tensors = model.state_dict()
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    inputs = make_inputs(model)
    with torch.no_grad():
        assert torch.equal(call(loaded, **inputs), call(model, **inputs))


def test_config_json_holds_every_argument_and_nothing_of_the_machine(tmp_path):
    model = make_model(mixer_options=EVERY_PARAMETER)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
    assert arguments["mixer_options"] == EVERY_PARAMETER
    rebuilt = LocalDiTTransformer2DModel(**arguments)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_changed_mixers_survive_saving_and_loading(tmp_path):
    model = make_model()
    model.set_token_mixers(("full", "window"), EVERY_PARAMETER)
    for parameter in mixers_of(model)[1].parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    assert [type(mixer) for mixer in mixers_of(loaded)] == [type(mixer) for mixer in mixers_of(model)]
    inputs = make_inputs(model)
    with torch.no_grad():
        assert torch.equal(call(loaded, **inputs), call(model, **inputs))


def test_half_precision_loads_as_asked(tmp_path):
    model = make_model(mixer_options=EVERY_PARAMETER)
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=LORA_TARGETS))
    return model


def test_lora_trains_its_adapters_and_nothing_else():
    model = make_model(token_mixers=("window", "full"), mixer_options=EVERY_PARAMETER)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
    add_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 3 * 2 * len(LORA_TARGETS) * 2  # layers, attentions, targets, two factors
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # in the first step one factor is zero, and the other one's gradient with it
        optimizer.zero_grad()
        call(model, **inputs).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trained.values())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    with torch.no_grad():
        assert not torch.allclose(call(model, **inputs), expected)
        without = call(model, **inputs, attention_kwargs={"scale": 0.0})
        torch.testing.assert_close(without, expected, **NEAR)


def test_adapters_are_saved_and_loaded_alone(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    add_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_lora_adapter(tmp_path / "adapter")
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "model")
    loaded.load_lora_adapter(tmp_path / "adapter", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    inputs = make_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(call(loaded, **inputs), call(model, **inputs), **NEAR)


def test_a_model_is_not_saved_with_an_adapter_between_its_layers(tmp_path):
    model = add_lora(make_model())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
    with pytest.raises(ValueError, match=r"adapter\(s\) \['default'\] are loaded.*unload_lora"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        actual = call(LocalDiTTransformer2DModel.from_pretrained(tmp_path), **inputs)
    torch.testing.assert_close(actual, expected, **NEAR)


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
@pytest.mark.parametrize("mixer", ["window", "full", "sliding_window"])
def test_diffusers_other_backends_give_equal_outputs(backend, mixer):
    model = make_model(token_mixers=(mixer,))
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.set_attention_backend(backend)
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)


@pytest.mark.parametrize("max_shard_size", ["10GB", "40KB"])
def test_pickled_weights_are_saved_and_loaded_sharded_or_not(tmp_path, max_shard_size):
    model = make_model(mixer_options=EVERY_PARAMETER)
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.bin"))) > 1) == (max_shard_size == "40KB")
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_device_map_cuts_no_block():
    model = make_model()
    two = {0: model.num_parameters() * 2, 1: model.num_parameters() * 8}  # bytes, as if there were two devices
    places = infer_auto_device_map(model, two, no_split_module_classes=model._no_split_modules)
    assert set(places.values()) == {0, 1}
    assert not [name for name in places if name.startswith("transformer_blocks.") and name.count(".") > 1]
