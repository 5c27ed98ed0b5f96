"""The kernel of local attention gives what the dense ways give, forward and backward (here in Triton's interpreter)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from localdit import LocalDiTTransformer2DModel
from localdit.mixers import MIXERS, sliding_window, window
from localdit.mixers.local_kernel import kernel_takes
from localdit.models.attention import LocalDiTAttention

pytest.importorskip("triton")

HEADS, HEAD_DIM = 2, 20  # two parts, of which the second is not full
# where there is a GPU the kernel runs on it, in half precision alone, else in the interpreter
GPU = torch.cuda.is_available()
DEVICE, DTYPE, NEAR = ("cuda", torch.bfloat16, 3e-2) if GPU else ("cpu", torch.float32, 1e-4)
WINDOWS = [
    {"window_size": 1},
    {"window_size": 3},
    {"window_size": 4, "shift_schedule": "none"},
    {"window_size": 8},
    {"window_size": 11, "shift_schedule": (9,)},
    {"window_size": 4, "global_context": 2},
    {"window_size": 8, "global_context": 6},  # more pooled tokens than a step takes
]
SQUARES = [{"kernel_size": size} for size in (1, 2, 3, 4, 7, 13)]
CASES = [*(("window", options) for options in WINDOWS), *(("sliding_window", options) for options in SQUARES)]


def make(name, backend="triton", rope_theta=100.0, qk_norm="rms_norm", **options) -> LocalDiTAttention:
    """An attention layer, its parameters drawn from a seed, so that two differ in the backend only."""
    mixer = MIXERS[name](HEADS, HEAD_DIM, 1, rope_theta, **options, **({} if backend is None else {"backend": backend}))
    attn = LocalDiTAttention(HEADS * HEAD_DIM, HEADS, HEAD_DIM, mixer, qk_norm=qk_norm)
    generator = torch.Generator().manual_seed(1)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3, generator=generator)
    return attn


def tokens(count: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(2, count, HEADS * HEAD_DIM, device=DEVICE, dtype=dtype)


def compare(attn, dense, grid, dtype=DTYPE, near=NEAR):
    """The kernel's layer and the dense one, forward and backward, on the same random tokens."""
    states = tokens(grid[0] * grid[1], dtype)
    assert kernel_takes(states)
    results, gradients, weight = [], [], torch.randn_like(states)
    for layer in (attn, dense):
        layer.to(DEVICE, dtype)
        leaf = states.clone().requires_grad_()
        results.append(layer(leaf, grid))
        gradients.append(torch.autograd.grad((results[-1] * weight).sum(), [leaf, *layer.parameters()]))
    torch.testing.assert_close(*results, rtol=near, atol=near / 10)
    # some gradients are sums that cancel, such as that of a bias which all keys share
    scale = max(gradient.abs().max() for gradient in gradients[1])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=near, atol=near / 10)


@pytest.mark.parametrize("grid", [(3, 5), (9, 10)])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_kernel_gives_what_dense_attention_gives(name, options, grid):
    compare(make(name, **options), make(name, None, **options), grid)


@pytest.mark.parametrize("grid", [(1, 1), (1, 17), (17, 2)])
@pytest.mark.parametrize(
    ("name", "options"), [("window", {"window_size": 4, "global_context": 2}), ("sliding_window", {"kernel_size": 5})]
)
def test_narrow_grids_are_as_good(name, options, grid):
    compare(make(name, **options), make(name, None, **options), grid)


@pytest.mark.parametrize("changes", [{"rope_theta": None}, {"qk_norm": None}, {"rope_theta": None, "qk_norm": None}])
@pytest.mark.parametrize("name", ["window", "sliding_window"])
def test_norm_and_turn_can_each_be_missing(name, changes):
    compare(make(name, **changes), make(name, None, **changes), (5, 9))


def test_fused_projections_are_read_where_they_lie():
    attn = make("window").to(DEVICE, DTYPE)
    states = tokens(45)
    apart = attn(states, (5, 9))
    attn.fuse_projections()
    torch.testing.assert_close(attn(states, (5, 9)), apart)


def test_states_may_lie_as_they_like():
    make("window")
    states = tokens(45).unflatten(-1, (HEADS, HEAD_DIM)).repeat(3, 1, 1, 1, 1).unbind()
    rule = (None, None, None, None, 5, 9, 4, 2, True, 100.0, 0.0)
    expected = torch.ops.localdit.local_attention(*states, *rule)
    lying = (states[0].mT.contiguous().mT, states[1].transpose(1, 2).contiguous().transpose(1, 2), states[2])
    for mine, theirs in zip(torch.ops.localdit.local_attention(*lying, *rule), expected, strict=True):
        assert torch.equal(mine, theirs)
    gradients = [
        torch.ops.localdit.local_attention_backward(states[2], *expected, *given, *rule) for given in (states, lying)
    ]
    assert all(torch.equal(*pair) for pair in list(zip(*gradients, strict=True))[:3])


def test_half_precision_rounds_as_dense_attention_does():
    compare(make("window"), make("window", None), (5, 9), torch.float16, 3e-2)


def test_gradients_are_the_same_every_time():
    attn, states = make("window", global_context=2).to(DEVICE, DTYPE), tokens(45)
    first, second = (torch.autograd.grad(attn(states, (5, 9)).sum(), list(attn.parameters())) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_torch_knows_the_operation_with_its_shapes_and_its_gradient():
    make("window")
    like = {"device": DEVICE, "dtype": DTYPE, "requires_grad": True}
    states = [torch.randn(1, 15, HEADS, HEAD_DIM, **like) for _ in range(3)]
    weights = [torch.randn(HEAD_DIM, **like) for _ in range(2)]
    pooled = [torch.randn(1, 4, HEADS, HEAD_DIM, **like) for _ in range(2)]
    rule = (3, 5, 4, 2, True, 100.0, 1e-6)
    torch.library.opcheck(torch.ops.localdit.local_attention, (*states, *weights, *pooled, *rule))
    torch.library.opcheck(torch.ops.localdit.local_attention, (*states, None, None, None, None, *rule))


@pytest.mark.parametrize("name", ["window", "sliding_window"])
def test_a_graph_holds_the_kernel_whole(name):
    attn, states = make(name).to(DEVICE, DTYPE), tokens(45)
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(states, (5, 9)), attn(states, (5, 9)))


def test_a_transformer_runs_with_it_streamed_and_not():
    options = {"window": {"window_size": 4, "global_context": 2}}
    config = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": 2, "sample_size": 12}
    model = LocalDiTTransformer2DModel(**config, in_channels=3, caption_channels=None, mixer_options=options)
    nn.init.normal_(model.proj_out.weight)
    model.to(DEVICE, DTYPE).eval()
    noised = torch.randn(2, 3, 12, 18, device=DEVICE, dtype=DTYPE)
    given = {"hidden_states": noised, "timestep": torch.tensor([1.0, 900.0], device=DEVICE)}
    with torch.no_grad():
        dense = model(**given).sample
        model.set_token_mixers("window", {"window": {**options["window"], "backend": "triton"}})
        torch.testing.assert_close(model(**given).sample, dense, rtol=NEAR, atol=NEAR)
        model.enable_window_streaming(chunk_tokens=32)
        torch.testing.assert_close(model(**given).sample, dense, rtol=NEAR, atol=NEAR)


def test_where_the_kernel_cannot_run_the_dense_ways_take_over(monkeypatch):
    states = tokens(45)

    def layer(name, *arguments, **options):
        return make(name, *arguments, **options).to(DEVICE, states.dtype)(states, (5, 9))

    def refuse(*_):
        raise AssertionError("the kernel was asked")

    for module in (window, sliding_window):
        monkeypatch.setattr(module, "mix_by_kernel", refuse)
    for name in ("window", "sliding_window"):
        with pytest.raises(AssertionError, match="was asked"):
            layer(name)
    dilated = {"kernel_size": 3, "dilation": 2}
    assert torch.equal(layer("sliding_window", **dilated), layer("sliding_window", None, **dilated))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    states = tokens(45, torch.float32)
    for name in ("window", "sliding_window"):
        assert not kernel_takes(states)
        assert torch.equal(layer(name), layer(name, None))


@pytest.mark.parametrize("name", ["window", "sliding_window"])
def test_a_bias_is_refused(name):
    with pytest.raises(ValueError, match="backend='triton' has no relative_position_bias; leave `backend` out"):
        make(name, relative_position_bias=True)


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is not known.*dense.*triton"):
        make("window", backend="cuda")


def test_the_kernels_compile_for_a_gpu():
    """For sm_90 and sm_80, which takes no GPU, and in the shared memory of small ones."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [kernel, capability]
        for capability in ("80", "90")
        for kernel in ("attend_kernel", "query_gradient_kernel", "key_gradient_kernel")
    ]
    assert all(int(line[2]) <= 99 * 1024 for line in lines), result.stdout
