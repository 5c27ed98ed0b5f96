"""The state space mixer equals its recurrence step by step, forward and backward, and hears both directions."""

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from localdit.mixers.ssm import BidirectionalSSMProcessor, CircularConvolution, S4DKernel
from localdit.models.attention import LocalDiTAttention

HEADS, HEAD_DIM = 2, 4
CHANNELS = HEADS * HEAD_DIM


def make(layer: int = 0, **options) -> BidirectionalSSMProcessor:
    return BidirectionalSSMProcessor(HEADS, HEAD_DIM, layer, None, **options)


def make_attention(mixer, **options) -> LocalDiTAttention:
    return LocalDiTAttention(CHANNELS, HEADS, HEAD_DIM, mixer, **options)


def recur(kernel: S4DKernel, readout: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    """x <- exp(dt a) x + (exp(dt a) - 1) / a u and y = 2 Re c x, one position after another: L times [B, C]."""
    step = kernel.log_step.exp()[:, None]
    eigenvalue = torch.complex(-kernel.log_decay.exp(), kernel.frequency)
    keep, take = torch.exp(step * eigenvalue), (torch.exp(step * eigenvalue) - 1) / eigenvalue
    memory, answers = torch.zeros(len(states), *keep.shape, dtype=keep.dtype), []
    for position in range(states.shape[1]):
        memory = keep * memory + take * states[:, position, :, None]
        answers.append(2 * (torch.view_as_complex(readout) * memory).sum(-1).real)
    return answers


def step_by_step(mixer: BidirectionalSSMProcessor, states: torch.Tensor) -> torch.Tensor:
    """What comes from the front with a position itself, from the back without it, and the skip."""
    front, back = mixer.kernel.readout
    forward = torch.stack(recur(mixer.kernel, front, states), dim=1)
    backward = recur(mixer.kernel, back, states.flip(1))[:-1]  # what each position but the first hands on
    nothing = torch.zeros(len(states), 1, states.shape[2])
    backward = torch.cat((torch.stack(backward, dim=1).flip(1), nothing), dim=1) if backward else nothing
    return forward + backward + mixer.skip * states


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 50])
def test_the_convolution_is_the_recurrence(length):
    mixer = make(state_size=8)
    states = torch.randn(2, length, CHANNELS, requires_grad=True)
    leaves = [states, mixer.skip, *mixer.kernel.parameters()]
    results = [mixer.convolve(states), step_by_step(mixer, states)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weight).sum(), leaves, allow_unused=True) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_convolutions_gradients_are_those_of_its_values(length):
    signal = torch.randn(2, 3, length, dtype=torch.float64, requires_grad=True)
    circle = torch.randn(3, 2 * length, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(CircularConvolution.apply, (signal, circle))
    torch.autograd.gradgradcheck(CircularConvolution.apply, (signal, circle))
    torch.autograd.gradcheck(CircularConvolution.apply, (signal.detach(), circle))
    (expected,) = torch.autograd.grad(CircularConvolution.apply(signal, circle).square().sum(), signal)
    found = torch.func.grad(lambda given: CircularConvolution.apply(given, circle).square().sum())(signal)
    torch.testing.assert_close(found, expected)


def test_the_layer_is_the_papers_formula():
    mixer = make(state_size=4, hourglass_ratio=3)
    attn = make_attention(mixer, qk_norm=None)
    tokens = torch.randn(2, 6, CHANNELS)

    def act(states):
        return torch.nn.functional.gelu(states)

    up = mixer.up.weight.unflatten(0, (3, CHANNELS)), mixer.up.bias.unflatten(0, (3, CHANNELS))
    down = mixer.down.weight.unflatten(1, (3, CHANNELS))
    longer = []
    for token in range(6):
        for k in range(3):
            longer.append(act(act(attn.to_v(tokens[:, token])) @ up[0][k].T + up[1][k]))
    read = mixer.convolve(torch.stack(longer, dim=1))
    outputs = []
    for token in range(6):
        met = sum(read[:, token * 3 + k] @ down[:, k].T for k in range(3)) + mixer.down.bias
        gated = act(attn.to_k(act(met))) * act(attn.to_q(tokens[:, token]))
        outputs.append(attn.to_out[0](gated))
    torch.testing.assert_close(attn(tokens, (2, 3)), torch.stack(outputs, dim=1), rtol=1e-4, atol=1e-5)


def test_a_late_token_changes_early_ones_and_an_early_token_late_ones():
    mixer = make(state_size=4)
    attn = make_attention(mixer)
    tokens = torch.randn(1, 40, CHANNELS)
    before = attn(tokens, (5, 8))
    for changed in (0, 39):
        other = tokens.clone()
        other[:, changed] += 1
        moved = (attn(other, (5, 8)) - before).abs().amax(-1)[0]
        assert (moved > 1e-6).all()


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 5)])
def test_every_other_layer_of_an_alternating_scan_reads_the_transposed_picture(grid):
    tokens = torch.randn(2, *grid, CHANNELS)
    for layer in range(3):
        alternating = make_attention(make(layer, scan="alternating"))
        rows = make_attention(make(layer))
        rows.load_state_dict(alternating.state_dict())
        if layer % 2:
            expected = rows(tokens.transpose(1, 2).flatten(1, 2), grid[::-1]).unflatten(1, grid[::-1]).transpose(1, 2)
        else:
            expected = rows(tokens.flatten(1, 2), grid).unflatten(1, grid)
        torch.testing.assert_close(alternating(tokens.flatten(1, 2), grid).unflatten(1, grid), expected)


def test_an_unknown_scan_is_refused():
    with pytest.raises(ValueError, match="scan='columns' is not known; choose among"):
        make(scan="columns")


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 5), (16, 16)])
def test_any_grid_runs_with_the_same_parameters(grid):
    attn = make_attention(make())
    assert attn(torch.randn(2, grid[0] * grid[1], CHANNELS), grid).isfinite().all()


def test_a_batch_of_none_stays_one():
    mixer = make()
    assert make_attention(mixer)(torch.zeros(0, 6, CHANNELS), (2, 3)).shape == (0, 6, CHANNELS)


def test_the_kernel_of_a_shorter_sequence_begins_the_longer_one():
    kernel = S4DKernel(CHANNELS, 8)
    torch.testing.assert_close(kernel(300)[..., :70], kernel(70), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype):
    mixer = make(state_size=8)
    states = torch.randn(1, 500, CHANNELS)
    torch.testing.assert_close(mixer.convolve(states.to(dtype)).float(), mixer.convolve(states), rtol=0.02, atol=0.05)


def test_autocast_leaves_the_state_space_in_fp32():
    mixer = make(state_size=8)
    states = torch.randn(1, 100, CHANNELS)
    with torch.autocast("cpu", torch.bfloat16):
        answer = mixer.convolve(states)
    torch.testing.assert_close(answer, mixer.convolve(states))


def test_a_whole_model_trains_compiles_and_reloads_with_it_in_half_precision_too(tmp_path):
    model = LocalDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        num_layers=2,
        sample_size=12,
        patch_size=2,
        caption_channels=None,
        token_mixers=("ssm",),
        mixer_options={"ssm": {"state_size": 8}},
    )
    torch.nn.init.normal_(model.proj_out.weight)
    given = {"hidden_states": torch.randn(2, 3, 12, 10), "timestep": torch.tensor([1.0, 900.0])}
    sample = model(**given).sample
    sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given).sample, sample)
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalDiTTransformer2DModel.from_pretrained(tmp_path)(**given).sample, sample)
    half = LocalDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.transformer_blocks[0].attn.processor.kernel.frequency.dtype == torch.float32
    close = half(given["hidden_states"].bfloat16(), timestep=given["timestep"]).sample.float()
    assert (close - sample).abs().mean() < 0.05 * sample.abs().mean()


def test_it_compiles_for_any_length():
    attn = make_attention(make(state_size=4))
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    for grid in ((3, 4), (5, 6), (7, 7)):
        tokens = torch.randn(1, grid[0] * grid[1], CHANNELS)
        torch.testing.assert_close(compiled(tokens, grid), attn(tokens, grid), rtol=1e-4, atol=1e-5)


def test_fused_projections_change_nothing():
    attn = make_attention(make())
    tokens = torch.randn(1, 12, CHANNELS)
    before = attn(tokens, (3, 4))
    attn.fuse_projections()
    torch.testing.assert_close(attn(tokens, (3, 4)), before)


@pytest.mark.parametrize("options", [{"state_size": 3}, {"state_size": 0}, {"hourglass_ratio": 0}])
def test_sizes_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be"):
        make(**options)
