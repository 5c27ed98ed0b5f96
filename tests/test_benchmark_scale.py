"""The benchmark of scale counts what torch counts, and its prices follow from the counts."""

import sys

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from localdit.benchmarks import attention, scale
from localdit.mixers import MIXERS
from tests.small_transformers import CLASSES, SIZES, UNCONDITIONAL, call, make_inputs, make_model

ROWS, COLUMNS, TEXT_TOKENS = 5, 11, 6


def flops_of_torch(model, backward: bool = False) -> int:
    """Operations that torch counts in a forward pass of one picture; it does not count fused attention on a CPU."""
    inputs = make_inputs(model, 1, 2 * ROWS, 2 * COLUMNS, TEXT_TOKENS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = call(model, **inputs)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def counted(model) -> int:
    return 2 * scale.multiply_adds(model, (ROWS, COLUMNS), TEXT_TOKENS)


@pytest.mark.parametrize("name", MIXERS)
def test_the_count_of_every_mixer_is_what_torch_counts(name):
    model = make_model(token_mixers=(name,), mixer_options=None)
    with torch.no_grad():
        assert counted(model) == flops_of_torch(model)


@pytest.mark.parametrize(
    "changes",
    [
        SIZES,
        {"feed_forward": "mix_ffn", "mlp_ratio": 2.5},
        {"patch_size": 1, "out_channels": 8},
        {"token_mixers": ("full", "window"), "mixer_options": {"window": {"window_size": 4}}},
        {"token_mixers": ("sliding_window",), "mixer_options": {"sliding_window": {"kernel_size": 3, "dilation": 2}}},
        {"token_mixers": ("ssm",), "mixer_options": {"ssm": {"state_size": 8, "hourglass_ratio": 3}}},
    ],
    ids=str,
)
def test_the_count_of_every_setting_is_what_torch_counts(changes):
    model = make_model(**changes)
    inputs = make_inputs(model, 1, ROWS * model.config.patch_size, COLUMNS * model.config.patch_size, TEXT_TOKENS)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, **inputs)
    assert counted(model) == counter.get_total_flops()


@pytest.mark.parametrize("condition", [CLASSES, UNCONDITIONAL], ids=["classes", "unconditional"])
def test_a_model_without_text_has_no_work_with_it(condition):
    model = make_model(caption_channels=None, num_classes=condition.get("num_classes"))
    with torch.no_grad():
        assert counted(model) == flops_of_torch(model)


def test_global_context_counts():
    context = {"window": {"window_size": 3, "global_context": 2}}
    model, without = make_model(mixer_options=context), make_model()
    # with gradients, since without them a block takes chunks and computes the context's keys for each of them
    measured = flops_of_torch(model) - flops_of_torch(without)
    assert counted(model) - counted(without) == pytest.approx(measured, rel=0.25)


def test_a_training_step_is_three_forward_passes():
    model = make_model()
    assert flops_of_torch(model, backward=True) == pytest.approx(scale.PASSES * counted(model), rel=0.02)


def test_the_released_size_has_the_work_that_was_counted_of_it():
    full, local = scale.released_size("full"), scale.released_size("window 8")
    assert sum(parameter.numel() for parameter in local.parameters()) == pytest.approx(0.399e9, rel=0.01)
    assert scale.forward_flops(full, 1024) / 2e9 == pytest.approx(2093, rel=0.01)
    assert scale.forward_flops(local, 4096) == pytest.approx(16 * scale.forward_flops(local, 1024), rel=0.01)
    assert scale.forward_flops(full, 4096) > 30 * scale.forward_flops(full, 1024)


def test_the_text_encoder_is_flan_t5_xxl():
    with torch.device("meta"):
        config = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        assert scale.matrices(T5EncoderModel(config)) == scale.T5_PER_TOKEN


def test_a_price_is_work_over_speed():
    device = scale.Device(tflops=100, utilisation=0.5, dollars_per_hour=2)
    assert device.hours(50e12 * 3600) == pytest.approx(1)
    stages = scale.training_stages(1000, [2.0, 1.0, 0.5])
    assert [stage.pictures for stage in stages if stage.mixers == "full"] == [2000, 1000, 500]
    assert [stage.pictures for stage in stages if not stage.mixers] == [1000, 1000, 1000, 500]
    model = scale.released_size("full")
    assert [stage.flops for stage in stages if stage.mixers == "full"] == [
        3 * scale.forward_flops(model, pixels) for pixels in (256, 512, 1024)
    ]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(attention, "HEADS", 2)
    monkeypatch.setattr(attention, "HEAD_DIM", 12)
    monkeypatch.setattr(attention, "DIM", 24)


def test_what_would_take_too_long_is_left_out(small):
    makers = {name: attention.mixers()[name] for name in ("identity", "full")}
    sizes = [(2, 1), (4, 1), (2, 3)]
    measured = scale.measure(makers, sizes, 1e9, torch.float32, "cpu", repeats=2)
    assert list(measured) == [(name, *size) for name in makers for size in sizes]
    assert [growth.tokens for growth in measured.values()] == [4, 16, 12] * 2
    assert measured["full", 2, 3].work == 3 * measured["full", 2, 1].work
    assert measured["full", 4, 1].work > measured["identity", 4, 1].work
    assert all(len(growth.seconds) == 2 for growth in measured.values())
    assert list(scale.measure(makers, sizes, 0.0, torch.float32, "cpu", 1)) == [(name, 2, 1) for name in makers]


def test_the_command_prints_both_parts_and_plots_one(small, monkeypatch, capsys, tmp_path):
    given = ["--side", "2", "3", "--batch", "1", "2", "--repeats", "1", "--pixels", "512", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scale", *given])
    scale.main()
    assert Image.open(tmp_path / scale.PLOT).size == (500, 400)
    lines = capsys.readouterr().out.splitlines()
    for name in attention.mixers():
        assert sum(line.startswith(f"{name} ") for line in lines) >= 3, name
    assert sum(line.startswith("    512    1024 ") for line in lines) == len(scale.MODELS)
    assert sum(" px " in line and "encoder" not in line for line in lines) >= 3 * len(scale.MODELS)


@pytest.mark.parametrize("given", [["--utilisation", "2"], ["--pixels", "500"], ["--epochs", "1", "-1", "1"]], ids=str)
def test_settings_out_of_range_are_refused(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale", "--part", "modelled", *given])
    with pytest.raises(ValueError, match=given[0]):
        scale.main()
