"""Facts about the transformer: its arithmetic, what conditions it, and the features it takes from diffusers."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models import attention_dispatch as dispatch
from torch import nn

from localdit import LocalDiTTransformer2DModel
from localdit.mixers.full import FullAttnProcessor
from localdit.mixers.window import WindowAttnProcessor

TEXT_WIDTH, LABELS = 20, 5
TEXT = {"caption_channels": TEXT_WIDTH}
CLASSES = {"caption_channels": None, "num_classes": LABELS}
UNCONDITIONAL = {"caption_channels": None}
SIZES = {"use_additional_conditions": True}
EVERY_PARAMETER = {"window": {"window_size": 3, "relative_position_bias": True, "global_context": 2}}
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def make_model(**changes) -> LocalDiTTransformer2DModel:
    """A tiny model in which no parameter has a value, such as 0 or 1, that could hide a mistake."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "sample_size": 16,
        "mixer_options": {"window": {"window_size": 3}},
    }
    model = LocalDiTTransformer2DModel(**{**config, **TEXT, **changes})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_inputs(model, batch_size=2, height=12, width=20, text_tokens=6, dtype=torch.float32) -> dict:
    """Random inputs of every kind that the model needs."""
    config = model.config
    inputs = {
        "hidden_states": torch.randn(batch_size, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.linspace(3, 981, batch_size).long(),
    }
    if config.caption_channels:
        inputs["encoder_hidden_states"] = torch.randn(batch_size, text_tokens, config.caption_channels, dtype=dtype)
        lengths = torch.arange(batch_size) % text_tokens + 1
        inputs["encoder_attention_mask"] = (torch.arange(text_tokens) < lengths[:, None]).long()
    if config.num_classes:
        inputs["class_labels"] = torch.arange(batch_size) * 2
    if model.use_additional_conditions:
        inputs["added_cond_kwargs"] = {
            "resolution": torch.tensor([[8.0 * height, 8.0 * width]] * batch_size, dtype=dtype),
            "aspect_ratio": torch.tensor([[width / height]] * batch_size, dtype=dtype),
        }
    return inputs


def call(model, **inputs) -> torch.Tensor:
    return model(**inputs).sample


class Reference:
    """The forward pass in plain steps, from the weights alone; all self-attention is window attention without extras.

    Steps 1 to 8 of LocalDiT as released (PixArt, arXiv 2310.00426, with windows, RoPE and RMSNorm), in fp64.
    """

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads, self.head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        self.width = self.heads * self.head_dim

    def linear(self, name, states):
        bias = self.weights.get(f"{name}.bias")
        product = states @ self.weights[f"{name}.weight"].T
        return product if bias is None else product + bias

    def layer_norm(self, states):
        mean = states.mean(-1, keepdim=True)
        return (states - mean) / ((states - mean).pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt()

    def gelu(self, states):
        return 0.5 * states * (1 + torch.tanh(math.sqrt(2 / math.pi) * (states + 0.044715 * states**3)))

    def silu(self, states):
        return states / (1 + torch.exp(-states))

    def sinusoid(self, numbers):
        # fp32 like the model's, for rounding at t = 1000 is no matter of correctness
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = numbers.flatten()[:, None].float() * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1).double()

    def embed(self, name, numbers):
        return self.linear(f"{name}.linear_2", self.silu(self.linear(f"{name}.linear_1", self.sinusoid(numbers))))

    def positions(self, rows, columns):
        """[N, C]: the first half of the channels from x, the second from y; each sines, then cosines."""
        base = self.config.sample_size // self.config.patch_size
        scale = self.config.interpolation_scale or max(self.config.sample_size // 64, 1)
        quarter = self.width // 4
        frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        table = torch.empty(rows, columns, self.width, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                x, y = j * base / columns / scale * frequencies, i * base / rows / scale * frequencies
                table[i, j] = torch.cat((x.sin(), x.cos(), y.sin(), y.cos()))
        return table.flatten(0, 1)

    def split_heads(self, name, states, norm=None):
        states = self.linear(name, states).unflatten(-1, (self.heads, self.head_dim))
        if norm is not None and self.config.qk_norm:
            states = states / (states.pow(2).mean(-1, keepdim=True) + self.config.qk_norm_eps).sqrt()
            states = states * self.weights[f"{norm}.weight"]
        return states.transpose(1, 2)  # [B, H, N, D]

    def attend(self, name, query, key, value, bias):
        scores = query @ key.mT / math.sqrt(self.head_dim) + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.linear(f"{name}.to_out.0", mixed)

    def rotate(self, states, rows, columns):
        """RoPE as multiplication by complex numbers: the first half of the pairs turns with x, the second with y."""
        count = self.head_dim // 4
        frequencies = self.config.rope_theta ** (-4 * torch.arange(count, dtype=torch.float64) / self.head_dim)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = torch.cat((x.flatten()[:, None] * frequencies, y.flatten()[:, None] * frequencies), dim=1)
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def window_attention(self, name, states, rows, columns, shift):
        window_size = self.config.mixer_options["window"]["window_size"]
        query = self.rotate(self.split_heads(f"{name}.to_q", states, f"{name}.norm_q"), rows, columns)
        key = self.rotate(self.split_heads(f"{name}.to_k", states, f"{name}.norm_k"), rows, columns)
        value = self.split_heads(f"{name}.to_v", states)
        window = torch.tensor(
            [
                [(i - shift) // window_size, (j - shift) // window_size]  # Python's // rounds down
                for i in range(rows)
                for j in range(columns)
            ]
        )
        same = (window[:, None] == window[None]).all(-1)
        return self.attend(name, query, key, value, torch.zeros(same.shape).masked_fill(~same, float("-inf")))

    def cross_attention(self, name, states, text, mask):
        query = self.split_heads(f"{name}.to_q", states, f"{name}.norm_q")
        key = self.split_heads(f"{name}.to_k", text, f"{name}.norm_k")
        value = self.split_heads(f"{name}.to_v", text)
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
        return self.attend(name, query, key, value, bias[:, None, None])

    def block(self, index, states, modulation, rows, columns, text, mask):
        name = f"transformer_blocks.{index}"
        modulation = self.weights[f"{name}.scale_shift_table"] + modulation  # [B, 6, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, i : i + 1] for i in range(6))

        normed = self.layer_norm(states) * (1 + scale1) + shift1
        window_shift = (self.config.mixer_options["window"]["window_size"] // 2) * (index % 2)
        mixed = self.window_attention(f"{name}.attn", normed, rows, columns, window_shift)
        states = states + gate1 * (mixed + normed if self.config.attention_residual else mixed)
        if text is not None:
            states = states + self.cross_attention(f"{name}.cross_attn", states, text, mask)
        normed = self.layer_norm(states) * (1 + scale2) + shift2
        hidden = self.gelu(self.linear(f"{name}.ff.net.0.proj", normed))
        return states + gate2 * self.linear(f"{name}.ff.net.2", hidden)

    def __call__(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        batch_size, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        patches = hidden_states.double().reshape(batch_size, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, -1)
        states = patches @ self.weights["pos_embed.proj.weight"].flatten(1).T + self.weights["pos_embed.proj.bias"]
        states = states + self.positions(rows, columns)

        condition = self.embed("adaln_single.emb.timestep_embedder", timestep)
        if added_cond_kwargs is not None:
            tall, wide = added_cond_kwargs["resolution"].T
            sizes = [self.embed("adaln_single.emb.resolution_embedder", side) for side in (tall, wide)]
            ratio = self.embed("adaln_single.emb.aspect_ratio_embedder", added_cond_kwargs["aspect_ratio"])
            condition = condition + torch.cat((*sizes, ratio), dim=1)
        if class_labels is not None:
            condition = condition + self.weights["class_embedder.weight"][class_labels]
        modulation = self.linear("adaln_single.linear", self.silu(condition)).reshape(batch_size, 6, -1)

        text = None
        if encoder_hidden_states is not None:
            hidden = self.gelu(self.linear("caption_projection.linear_1", encoder_hidden_states.double()))
            text = self.linear("caption_projection.linear_2", hidden)
        for index in range(self.config.num_layers):
            states = self.block(index, states, modulation, rows, columns, text, encoder_attention_mask)

        table = self.weights["scale_shift_table"]
        states = self.layer_norm(states) * (1 + (table[1] + condition)[:, None]) + (table[0] + condition)[:, None]
        patches = self.linear("proj_out", states).reshape(batch_size, rows, columns, patch, patch, -1)
        sample = torch.empty(batch_size, patches.shape[-1], height, width, dtype=torch.float64)
        for i in range(patch):
            for j in range(patch):
                sample[:, :, i::patch, j::patch] = patches[:, :, :, i, j].permute(0, 3, 1, 2)
        return sample


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
    with pytest.raises(IndexError):
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


def mixers_of(model):
    return [block.attn.get_processor() for block in model.transformer_blocks]


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


def test_set_token_mixers_keeps_dtype_and_backend():
    model = make_model(mixer_options=EVERY_PARAMETER).to(torch.bfloat16)
    model.set_attention_backend("native")
    model.set_token_mixers("window", {"window": {"window_size": 2, "relative_position_bias": True}})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {"native"}


def test_refused_mixers_leave_the_model_as_it_was():
    model = make_model()
    before, config = mixers_of(model), dict(model.config)
    with pytest.raises(ValueError, match="'widow'"):
        model.set_token_mixers("widow")
    assert mixers_of(model) == before
    assert dict(model.config) == config


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption_channels": 8, "num_classes": 3}, ["caption_channels=8", "num_classes=3", "exclude"]),
        ({"patch_size": 17}, ["patch_size=17", "sample_size=16"]),
        ({"patch_size": 0}, ["patch_size=0", "at least 1"]),
        ({"token_mixers": ()}, ["token_mixers is empty", "'full'", "'window'"]),
        ({"token_mixers": ("window", "widow")}, ["'widow'", "'full'", "'window'"]),
        ({"mixer_options": {"window": {"size": 2}}}, ["'size'", "window_size"]),
        ({"mixer_options": {"window": {"window_size": 0}}}, ["window_size=0", "at least 1"]),
        ({"num_attention_heads": 1, "attention_head_dim": 6, "rope_theta": None}, ["= 6", "multiple of 4"]),
        ({"attention_head_dim": 6}, ["attention_head_dim=6", "multiple of 4", "rope_theta=None"]),
        ({"attention_head_dim": 8, **SIZES}, ["16", "multiple of 3"]),
        ({"qk_norm": "layer"}, ["'layer'", "'rms_norm'"]),
        ({"activation_fn": "relu"}, ["'relu'", "'gelu-approximate'"]),
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"num_layers": "2"}, ["num_layers='2'", "whole number"]),
        ({"num_layers": True}, ["num_layers=True", "whole number"]),
        ({"patch_size": 2.0}, ["patch_size=2.0", "whole number"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
        ({"attention_head_dim": -12}, ["attention_head_dim=-12", "at least 1"]),
        ({"out_channels": 0}, ["out_channels=0", "at least 1"]),
        ({"caption_channels": 0}, ["caption_channels=0", "at least 1"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0", "above 0"]),
        ({"qk_norm_eps": float("nan")}, ["qk_norm_eps=nan", "finite"]),
        ({"mlp_ratio": -4.0}, ["mlp_ratio=-4.0", "above 0"]),
        ({"interpolation_scale": 0}, ["interpolation_scale=0", "above 0"]),
        ({"rope_theta": -1.0}, ["rope_theta=-1.0", "above 0"]),
        ({"attention_bias": "yes"}, ["attention_bias='yes'", "True or False"]),
        ({"attention_residual": 1}, ["attention_residual=1", "True or False"]),
        ({"mixer_options": {"window": {"global_context": "x"}}}, ["global_context='x'", "whole number"]),
        ({"mixer_options": {"window": {"relative_position_bias": 2}}}, ["relative_position_bias=2", "True or False"]),
        ({"mixer_options": {"window": {"shift_schedule": [0.5]}}}, ["shift 0.5", "whole number"]),
        ({"caption_channels": None, "num_classes": 0}, ["num_classes=0", "at least 1"]),
        ({"mixer_options": {"window": None}}, ["'window'", "None", "dictionary"]),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        make_model(**changes)
    assert_is_one_helpful_sentence(refusal, words)


def assert_is_one_helpful_sentence(refusal, words):
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and ". " not in message and "\n" not in message, message


@pytest.mark.parametrize(
    ("model_changes", "input_changes", "words"),
    [
        ({}, {"hidden_states": torch.zeros(2, 4, 12, 15)}, ["12 x 15", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 13, 16)}, ["13 x 16", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 0, 16)}, ["0 x 16", "patch_size=2"]),
        ({}, {"hidden_states": torch.zeros(2, 3, 12, 16)}, ["[2, 3, 12, 16]", "[batch, 4, height, width]"]),
        ({}, {"hidden_states": torch.zeros(4, 12, 16)}, ["[4, 12, 16]", "[batch, 4, height, width]"]),
        ({}, {"timestep": None}, ["timestep is missing", "[batch]"]),
        ({}, {"encoder_hidden_states": None}, ["encoder_hidden_states is missing", "text"]),
        ({}, {"encoder_hidden_states": torch.zeros(2, 6, 21)}, ["21 wide", "caption_channels=20"]),
        (CLASSES, {"class_labels": None}, ["class_labels is missing", "0 to 4", "5 for no label"]),
        (SIZES, {"added_cond_kwargs": None}, ["lacks ['aspect_ratio', 'resolution']", "[batch, 2]"]),
        (SIZES, {"added_cond_kwargs": {}}, ["lacks ['aspect_ratio', 'resolution']", "[batch, 1]"]),
        (SIZES, {"added_cond_kwargs": {"resolution": torch.ones(2, 2)}}, ["lacks ['aspect_ratio']", "[batch, 1]"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_input_that_does_not_fit_is_refused(model_changes, input_changes, words):
    model = make_model(num_layers=1, **model_changes)
    inputs = {**make_inputs(model), **input_changes}
    with pytest.raises(ValueError) as refusal:
        model(**inputs)
    assert_is_one_helpful_sentence(refusal, words)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="window_size"):
        LocalDiTTransformer2DModel(2, 12, window_size=4)
    model = make_model(num_layers=1)
    with pytest.raises(TypeError, match="text_embeds"):
        model(**make_inputs(model), text_embeds=None)


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
    model = make_model()
    model.set_token_mixers("window", options)
    options["window"]["window_size"] = 7
    assert model.config.mixer_options == {"window": {"window_size": 2}}
