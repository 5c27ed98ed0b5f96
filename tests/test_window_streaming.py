"""A streamed transformer gives what the whole one gives, in the memory of its input and output."""

from copy import deepcopy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from tests.live_memory import LiveMemory
from tests.small_transformers import EVERY_PARAMETER, NEAR, SIZES, call, make_inputs, make_model

MIXERS = {
    "windows": {},
    "context and bias": {"mixer_options": EVERY_PARAMETER},
    "cyclic shifts": {"mixer_options": {"window": {"window_size": 4, "shift_schedule": "cyclic"}}},
    "as released": {"attention_residual": True, "qk_norm": None, **SIZES},
    "hybrid": {"token_mixers": ("window", "full"), "mixer_options": EVERY_PARAMETER},
    "no windows": {"token_mixers": ("linear", "ssm", "sliding_window"), "mixer_options": None},
    "convolution": {"feed_forward": "mix_ffn"},
    "classes": {"caption_channels": None, "num_classes": 5},
}


def chunks_of(model) -> list[tuple[int, int]]:
    """Number of the block, and tokens of all pictures, for each run of a feed-forward in the calls that follow."""
    seen = []
    for number, block in enumerate(model.transformer_blocks):
        block.ff.register_forward_hook(
            lambda module, arguments, output, number=number: seen.append((number, arguments[0].shape[:2].numel()))
        )
    return seen


@pytest.mark.parametrize("chunk_tokens", [1, 40, None])
@pytest.mark.parametrize("height,width", [(12, 20), (14, 26), (2, 2)])
@pytest.mark.parametrize("changes", MIXERS.values(), ids=MIXERS)
def test_streaming_changes_nothing(changes, height, width, chunk_tokens):
    model = make_model(**changes)
    inputs = make_inputs(model, height=height, width=width)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.enable_window_streaming(chunk_tokens)
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)
        model.disable_window_streaming()
        assert torch.equal(call(model, **inputs), expected)


@pytest.mark.parametrize("mixer", ["window", "full"])
def test_a_chunk_holds_so_many_tokens_of_the_whole_batch(mixer):
    model = make_model(token_mixers=(mixer,), mixer_options={"window": {"window_size": 4, "global_context": 2}})
    seen = chunks_of(model)
    inputs = make_inputs(model, height=32, width=32)  # 256 tokens of each of two pictures, in 3 layers
    with torch.no_grad():
        call(model, **inputs)
        assert seen == [(0, 512), (1, 512), (2, 512)]
        seen.clear()
        model.enable_window_streaming(128)
        call(model, **inputs)
    tokens = [tokens for _, tokens in seen]
    assert sum(tokens) == 3 * 512 and max(tokens) == 128


def test_a_window_is_never_cut():
    model = make_model(mixer_options={"window": {"window_size": 4, "shift_schedule": "none"}}, num_layers=1)
    seen = chunks_of(model)
    model.enable_window_streaming(5)
    with torch.no_grad():
        call(model, **make_inputs(model, batch_size=1, height=16, width=16))
    assert seen == [(0, 16)] * 4


@pytest.mark.parametrize("context", [0, 4])
def test_a_forward_needs_its_weights_and_three_activations(context):
    options = {"window": {"window_size": 4, "global_context": context}}
    model = make_model(num_attention_heads=4, attention_head_dim=16, mixer_options=options)
    inputs = make_inputs(model, batch_size=1, height=256, width=256)
    activation = 128 * 128 * 64 * 4

    def peak() -> float:
        with torch.no_grad(), LiveMemory() as memory:
            call(model, **inputs)
        return memory.peak / activation

    call_once = peak()
    assert call_once > 8
    model.enable_window_streaming(512)
    assert peak() < 3


def test_gradients_flow_as_without():
    model = make_model()
    inputs = make_inputs(model)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(call(model, **inputs).square().mean(), parameters)
    model.enable_window_streaming(8)
    found = torch.autograd.grad(call(model, **inputs).square().mean(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"mixer_options": EVERY_PARAMETER}], ids=["windows", "context and bias"])
def test_compiled_blocks_stream_from_a_handful_of_graphs(changes):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(num_layers=4, **changes)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    model.enable_window_streaming(36)
    with torch.no_grad():
        for height, width in ((24, 24), (24, 36), (48, 48)):
            inputs = make_inputs(model, height=height, width=width)
            model.disable_window_streaming()
            expected = call(deepcopy(model), **inputs)
            model.enable_window_streaming(36)
            torch.testing.assert_close(call(model, **inputs), expected, **NEAR)
    # shapes of windows, and the second time a number of them that may vary; not one for every chunk
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights():
    torch.compiler.reset()
    model = make_model(num_layers=1)
    model.compile_repeated_blocks(backend="eager")
    copy = deepcopy(model)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.transformer_blocks[0].ff.net[2].weight.zero_()
        torch.testing.assert_close(call(copy, **inputs), expected, **NEAR)
        assert not torch.allclose(call(model, **inputs), expected, **NEAR)


def test_streaming_works_beside_offloading():
    model = make_model(mixer_options=EVERY_PARAMETER)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = call(model, **inputs)
        model.enable_window_streaming(16)
        model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        torch.testing.assert_close(call(model, **inputs), expected, **NEAR)


def test_streaming_works_beside_a_cache_of_whole_blocks():
    inputs = make_inputs(make_model())
    found = []
    for streams in (False, True):
        torch.manual_seed(1)
        model = make_model(num_layers=4)
        if streams:
            model.enable_window_streaming(16)
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        seen = chunks_of(model)
        with torch.no_grad(), model.cache_context("test"):
            call(model, **inputs)
            assert {number for number, _ in seen} == {0, 1, 2, 3} and (len(seen) > 4) == streams
            seen.clear()
            found.append(call(model, **{**inputs, "hidden_states": inputs["hidden_states"] + 0.01}))
        assert {number for number, _ in seen} == {0}  # the later blocks' work was taken from the first call
    torch.testing.assert_close(*found, **NEAR)


def test_streaming_and_a_cache_of_attention_calls_exclude_each_other():
    cache = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    model = make_model()
    model.enable_window_streaming()
    with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig counts the calls"):
        model.enable_cache(cache)
    model.disable_window_streaming()
    model.enable_cache(cache)
    with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig counts the calls"):
        model.enable_window_streaming()


@pytest.mark.parametrize("wrong", [0, -8, 1.5, "many", True])
def test_a_chunk_without_tokens_is_refused(wrong):
    with pytest.raises(ValueError, match="chunk_tokens"):
        make_model().enable_window_streaming(wrong)
