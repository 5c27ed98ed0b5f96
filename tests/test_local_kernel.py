"""The kernel of local attention gives what the dense ways give, forward and backward (here in Triton's interpreter)."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from localdit import LocalDiTTransformer2DModel
from localdit.mixers import MIXERS, sliding_window, window
from localdit.mixers.base import grid_rotation
from localdit.mixers.local_kernel import WIDEST_HEAD, kernel_takes
from localdit.models.attention import LocalDiTAttention

pytest.importorskip("triton")

HEADS, HEAD_DIM = 2, 20  # two parts, of which the second is not full
# where there is a GPU the kernel runs on it, in half precision alone, else in the interpreter
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
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


def outcomes(layer, states, weight, grid) -> list[torch.Tensor]:
    """The output of a layer, and the gradients of its input and its parameters, for one random sum."""
    leaf = states.clone().requires_grad_()
    output = layer(leaf, grid)
    return [output, *torch.autograd.grad((output * weight).sum(), [leaf, *layer.parameters()])]


def compare(attn, dense, grid, dtype=DTYPE):
    """The kernel's layer is as near to the dense one in double precision as that is itself in its own precision."""
    states = tokens(grid[0] * grid[1], dtype)
    weight = torch.randn_like(states)
    assert kernel_takes(attn.to(DEVICE, dtype), states)
    mine, theirs = (outcomes(layer.to(DEVICE, dtype), states, weight, grid) for layer in (attn, dense))
    exact = outcomes(dense.double(), states.double(), weight.double(), grid)
    # some gradients are sums that cancel, such as that of a bias which all keys share
    scale = max(gradient.abs().max() for gradient in exact[1:])
    for one, other, right in zip(mine, theirs, exact, strict=True):
        assert (one - right).abs().max() <= 3 * (other - right).abs().max() + 1e-6 * scale


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
    rule = (*[None] * 6, 5, 9, 4, 2, True, 0.0)
    expected = torch.ops.localdit.local_attention(*states, *rule)
    lying = (states[0].mT.contiguous().mT, states[1].transpose(1, 2).contiguous().transpose(1, 2), states[2])
    for mine, theirs in zip(torch.ops.localdit.local_attention(*lying, *rule), expected, strict=True):
        assert torch.equal(mine, theirs)
    gradients = [
        torch.ops.localdit.local_attention_backward(states[2], *expected, *given, *rule) for given in (states, lying)
    ]
    assert all(torch.equal(*pair) for pair in list(zip(*gradients, strict=True))[:3])


def test_half_precision_rounds_as_dense_attention_does():
    compare(make("window"), make("window", None), (5, 9), torch.float16)


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
    turns = grid_rotation(3, 5, HEAD_DIM, 100.0, torch.device(DEVICE))
    rule = (3, 5, 4, 2, True, 1e-6)
    torch.library.opcheck(torch.ops.localdit.local_attention, (*states, *weights, *pooled, *turns, *rule))
    torch.library.opcheck(torch.ops.localdit.local_attention, (*states, *[None] * 6, *rule))


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
    near = 1e-4 if DEVICE == "cpu" else 5e-2
    with torch.no_grad():
        dense = model(**given).sample
        model.set_token_mixers("window", {"window": {**options["window"], "backend": "triton"}})
        torch.testing.assert_close(model(**given).sample, dense, rtol=near, atol=near)
        model.enable_window_streaming(chunk_tokens=32)
        torch.testing.assert_close(model(**given).sample, dense, rtol=near, atol=near)


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
        assert torch.equal(layer(name), layer(name, None))


def test_the_kernel_takes_the_precision_that_the_projections_will_have():
    attn = make("window").to(DEVICE)
    single = tokens(45, torch.float32)
    assert kernel_takes(attn, single) == (DEVICE == "cpu")
    with torch.autocast(DEVICE, torch.bfloat16):  # which the interpreter multiplies wrongly
        assert kernel_takes(attn, single) == (DEVICE == "cuda")
    with torch.autocast(DEVICE, torch.float16):
        assert kernel_takes(attn, single)
        assert attn(single, (5, 9)).dtype == torch.float16
    assert not kernel_takes(attn.double(), single.double())


def test_offloaded_weights_are_left_to_the_norms_that_fetch_them():
    states = tokens(45)
    for name in ("window", "sliding_window"):
        attn = make(name).to(DEVICE, DTYPE)
        expected = attn(states, (5, 9))
        accelerate.cpu_offload(attn, execution_device=torch.device(DEVICE))
        assert not kernel_takes(attn, states)
        torch.testing.assert_close(attn(states, (5, 9)), expected, rtol=3e-2, atol=1e-4)


def test_a_batch_may_be_empty():
    attn = make("window").to(DEVICE, DTYPE)
    assert attn(tokens(45)[:0], (5, 9)).shape == (0, 45, HEADS * HEAD_DIM)


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
    command = [sys.executable, script, str(WIDEST_HEAD)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [kernel, capability]
        for capability in ("80", "90")
        for kernel in ("attend_kernel", "query_gradient_kernel", "key_gradient_kernel")
    ]
    assert all(int(line[2]) <= 99 * 1024 for line in lines), result.stdout
