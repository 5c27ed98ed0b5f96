"""Facts about token mixers, each compared with a slow, obvious version of the same mathematics."""

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localdit.mixers import MIXERS, check_mixers
from localdit.mixers.chunks import chunk_tokens
from localdit.mixers.tables import _made_once
from localdit.mixers.window import average, build_window_layout, scheduled_shift
from localdit.models.attention import LocalDiTAttention, attend, attend_by_matmul
from tests.rope_reference import THETA, reference_rope

HEADS, HEAD_DIM, EPS = 2, 8, 1e-6
WIDTH = HEADS * HEAD_DIM
GRIDS = [(1, 1), (1, 7), (3, 5), (8, 8), (9, 10), (5, 13)]
WINDOW_SIZES = [1, 2, 3, 4, 8]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def make_attention(name="window", layer=0, rope_theta=THETA, qk_norm="rms_norm", bias=True, **options):
    """An attention layer in which no parameter has a value, such as 0 or 1, that could hide a mistake."""
    mixer = MIXERS[name](HEADS, HEAD_DIM, layer, rope_theta, **options)
    attn = LocalDiTAttention(WIDTH, HEADS, HEAD_DIM, mixer, qk_norm=qk_norm, qk_norm_eps=EPS, bias=bias)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    return attn


def shifted(window_size, shift, **options):
    return make_attention(window_size=window_size, shift_schedule=(shift,), **options)


def tokens_of(grid):
    """Row and column of every token, row-major."""
    return list(itertools.product(range(grid[0]), range(grid[1])))


def window_of(token, window_size, shift):
    """The window of a token (row, column), by its place on the shifted grid of windows."""
    return tuple((coordinate - shift) // window_size for coordinate in token)


def neighbours(grid, window_size, shift):
    """True [N, N] where two tokens lie in the same window; without a window size all do."""
    if window_size is None:
        return torch.ones(grid[0] * grid[1], grid[0] * grid[1], dtype=torch.bool)
    windows = [window_of(token, window_size, shift) for token in tokens_of(grid)]
    return torch.tensor([[query == key for key in windows] for query in windows])


def reference_projections(attn, hidden_states, positions):
    """Query, key and value [B, N, H, D], normalised and rotated as the layer's options say."""
    query, key, value = (
        F.linear(hidden_states, projection.weight, projection.bias).reshape(len(hidden_states), -1, HEADS, HEAD_DIM)
        for projection in (attn.to_q, attn.to_k, attn.to_v)
    )
    if isinstance(attn.norm_q, nn.RMSNorm):
        query = query / (query.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * attn.norm_q.weight
        key = key / (key.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * attn.norm_k.weight
    if attn.processor.rope_theta is not None:
        query, key = reference_rope(query, positions), reference_rope(key, positions)
    return query, key, value


def reference_context(attn, hidden_states, grid, side):
    """Key and value [B, G, H, D] of the averages of overlapping cells, each rotated at the cell's centre."""
    rows, columns = min(side, grid[0]), min(side, grid[1])
    planes = hidden_states.reshape(-1, *grid, WIDTH)
    pooled, centres = [], []
    for i, j in itertools.product(range(rows), range(columns)):
        top, bottom = i * grid[0] // rows, -(-(i + 1) * grid[0] // rows)
        left, right = j * grid[1] // columns, -(-(j + 1) * grid[1] // columns)
        pooled.append(planes[:, top:bottom, left:right].mean((1, 2)))
        centres.append(((i + 0.5) * grid[0] / rows - 0.5, (j + 0.5) * grid[1] / columns - 0.5))
    pooled = torch.stack(pooled, dim=1) + attn.processor.context_embedding
    return reference_projections(attn, pooled, centres)[1:]


def reference_attention(attn, hidden_states, grid, window_size=None, shift=0, context=0):
    """Dense attention over all tokens, under a mask that keeps the pairs of one window, and the pooled tokens."""
    tokens = tokens_of(grid)
    query, key, value = reference_projections(attn, hidden_states, tokens)
    kept = neighbours(grid, window_size, shift)
    bias = torch.zeros(HEADS, len(tokens), len(tokens), dtype=hidden_states.dtype)
    table = getattr(attn.processor, "relative_position_bias_table", None)
    if table is not None:
        span = 2 * window_size - 1
        # Swin's index; pairs of different windows are masked and may take any entry
        index = [
            [(qy - ky + window_size - 1) * span + qx - kx + window_size - 1 for ky, kx in tokens] for qy, qx in tokens
        ]
        bias = table[torch.tensor(index).masked_fill(~kept, 0)].permute(2, 0, 1)
    bias = bias.masked_fill(~kept, float("-inf"))
    if context:
        pooled_key, pooled_value = reference_context(attn, hidden_states, grid, context)
        key, value = torch.cat((key, pooled_key), dim=1), torch.cat((value, pooled_value), dim=1)
        bias = F.pad(bias, (0, pooled_key.shape[1]))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_DIM**0.5 + bias
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    return F.linear(mixed, attn.to_out[0].weight, attn.to_out[0].bias)


def assert_equals_reference(attn, grid, batch_size, **reference_options):
    """Compare output and all gradients of the layer (fp32) with the reference's (fp64)."""
    exact = copy.deepcopy(attn).double()
    hidden_states = torch.randn(batch_size, grid[0] * grid[1], WIDTH, requires_grad=True)
    exact_states = hidden_states.detach().double().requires_grad_()
    output = attn(hidden_states, grid)
    expected = reference_attention(exact, exact_states, grid, **reference_options)
    torch.testing.assert_close(output.double(), expected, **NEAR)

    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), [hidden_states, *attn.parameters()])
    wanted = torch.autograd.grad((expected * weights.double()).sum(), [exact_states, *exact.parameters()])
    names = ["hidden_states", *(name for name, _ in attn.named_parameters())]
    for name, gradient, exact_gradient in zip(names, found, wanted, strict=True):
        scale = exact_gradient.abs().max().clamp(min=1.0)
        difference = (gradient.double() - exact_gradient).abs().max() / scale
        assert difference < 2e-5, f"gradient of {name} is off by {difference}"


@pytest.mark.parametrize("window_size", WINDOW_SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_attention_is_dense_attention_under_a_mask(grid, window_size):
    for shift in range(window_size):
        attn = shifted(window_size, shift, relative_position_bias=True)
        batch_size = 3 if shift % 2 else 1
        assert_equals_reference(attn, grid, batch_size, window_size=window_size, shift=shift)


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_global_context_is_pooled_keys_and_values_beside_the_windows_own(grid, context):
    for window_size, shift, biased in [(1, 0, False), (3, 0, True), (3, 2, True), (4, 1, False), (8, 5, True)]:
        attn = shifted(window_size, shift, relative_position_bias=biased, global_context=context)
        assert_equals_reference(attn, grid, 3, window_size=window_size, shift=shift, context=context)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("without", [{"rope_theta": None}, {"qk_norm": None}, {"bias": False}], ids=str)
def test_every_shared_part_can_be_left_out(without, context):
    attn = shifted(3, 1, relative_position_bias=True, global_context=context, **without)
    assert_equals_reference(attn, (5, 7), 2, window_size=3, shift=1, context=context)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_full_attention_is_dense_attention(grid):
    for batch_size in (1, 3):
        assert_equals_reference(make_attention("full"), grid, batch_size)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_window_as_large_as_the_grid_is_full_attention(grid):
    window = make_attention(window_size=max(grid), shift_schedule="none")
    full = make_attention("full")
    full.load_state_dict(window.state_dict())
    hidden_states = torch.randn(2, grid[0] * grid[1], WIDTH)
    torch.testing.assert_close(window(hidden_states, grid), full(hidden_states, grid), **NEAR)


def test_windows_of_one_token_return_the_tokens_own_value():
    attn = make_attention(window_size=1)
    hidden_states = torch.randn(2, 12, WIDTH)
    expected = attn.to_out[0](attn.to_v(hidden_states))
    torch.testing.assert_close(attn(hidden_states, (3, 4)), expected, **NEAR)


def test_a_grid_and_its_transpose_are_not_mistaken_for_each_other():
    attn = shifted(4, 2)
    for grid in [(16, 4), (4, 16), (8, 8), (2, 32)]:
        assert_equals_reference(attn, grid, 1, window_size=4, shift=2)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grid", [(7, 8), (6, 6)], ids=str)
def test_a_token_outside_the_window_has_no_influence(grid, shift):
    attn = shifted(3, shift, relative_position_bias=True)
    hidden_states = torch.randn(1, grid[0] * grid[1], WIDTH)
    output = attn(hidden_states, grid)
    for token, same_window in enumerate(neighbours(grid, 3, shift)):
        changed = hidden_states.clone()
        changed[0, token] += 10.0
        moved = (attn(changed, grid) != output).any(-1)[0]
        assert torch.equal(moved, same_window)


@pytest.mark.parametrize("shift", [0, 2])
def test_gradients_do_not_leave_the_window(shift):
    grid, attn = (7, 8), shifted(3, shift)
    hidden_states = torch.randn(1, grid[0] * grid[1], WIDTH, requires_grad=True)
    output = attn(hidden_states, grid)
    for token, same_window in enumerate(neighbours(grid, 3, shift)):
        (gradient,) = torch.autograd.grad(output[0, token].sum(), hidden_states, retain_graph=True)
        assert torch.equal((gradient != 0).any(-1)[0], same_window)


@pytest.mark.parametrize("context", [1, 3])
def test_with_global_context_a_change_anywhere_reaches_every_token_within_one_layer(context):
    grid, attn = (7, 8), shifted(3, 1, global_context=context)
    hidden_states = torch.randn(1, grid[0] * grid[1], WIDTH, requires_grad=True)
    output = attn(hidden_states, grid)
    for token in range(grid[0] * grid[1]):
        changed = hidden_states.detach().clone()
        changed[0, token] += 10.0
        assert (attn(changed, grid) != output).any(-1).all()
        (gradient,) = torch.autograd.grad(output[0, token].sum(), hidden_states, retain_graph=True)
        assert (gradient != 0).any(-1).all()


def test_shifted_layers_let_windows_meet_where_unshifted_ones_do_not():
    grid = (6, 6)

    def tokens_reached(schedule):
        layers = [make_attention(layer=layer, window_size=2, shift_schedule=schedule) for layer in range(2)]
        hidden_states = torch.randn(1, 36, WIDTH, requires_grad=True)
        mixed = layers[1](layers[0](hidden_states, grid), grid)
        (gradient,) = torch.autograd.grad(mixed[0, 14].sum(), hidden_states)
        return (gradient != 0).any(-1).sum().item()

    assert tokens_reached("none") == 4
    assert tokens_reached("swin") == 16


def test_pictures_of_a_batch_do_not_influence_each_other():
    attn = shifted(3, 1, global_context=2, relative_position_bias=True)
    hidden_states = torch.randn(3, 40, WIDTH)
    together = attn(hidden_states, (5, 8))
    apart = torch.cat([attn(picture[None], (5, 8)) for picture in hidden_states])
    torch.testing.assert_close(together, apart, **NEAR)


def random_layouts(count):
    rng = random.Random(0)
    for _ in range(count):
        height, width, window_size = rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 9)
        yield height, width, window_size, rng.randrange(window_size)


def test_every_token_belongs_to_exactly_one_window():
    for height, width, window_size, shift in random_layouts(200):
        layout = build_window_layout(height, width, window_size, shift)
        order = layout.order.tolist()
        assert sorted(order) == list(range(height * width))
        assert layout.order[layout.place].tolist() == list(range(height * width))
        tokens, start, seen = tokens_of((height, width)), 0, set()
        for shape in layout.shapes:
            for _ in range(shape.count):
                members = [tokens[token] for token in order[start : start + shape.tokens]]
                windows = {window_of(member, window_size, shift) for member in members}
                rows, columns = ({member[axis] for member in members} for axis in (0, 1))
                assert len(windows) == 1 and not windows & seen
                assert (len(rows), len(columns)) == (shape.height, shape.width)
                assert members == sorted(members)
                seen |= windows
                start += shape.tokens
        assert start == height * width
        assert len(layout.shapes) <= 9


def test_runs_hold_whole_windows_and_cover_the_sequence_once():
    for height, width, window_size, shift in random_layouts(50):
        layout = build_window_layout(height, width, window_size, shift)
        for most in (1, 7, 30, 10_000, None):
            runs = list(layout.runs(most))
            tokens = [sum(shape.count * shape.tokens for shape in shapes) for shapes in runs]
            assert most is None or max(tokens) <= max(most, window_size**2)
            assert sum(tokens) == height * width
            cut = [(shape.height, shape.width) for shapes in runs for shape in shapes for _ in range(shape.count)]
            whole = [(shape.height, shape.width) for shape in layout.shapes for _ in range(shape.count)]
            assert cut == whole


def test_runs_are_few_and_no_run_is_a_rest():
    layout = build_window_layout(64, 64, window_size=8, shift=4)  # 49 windows of 8 x 8, and smaller ones around them
    tokens = [sum(shape.count * shape.tokens for shape in shapes) for shapes in layout.runs(1024)]
    assert tokens == [1024] * 4


@pytest.mark.parametrize(("grid", "window_size", "shift"), [((8, 8), 4, 2), ((6, 9), 3, 1), ((8, 16), 4, 3)])
def test_cutting_at_the_shift_is_swins_roll_and_mask(grid, window_size, shift):
    # Liu et al. 2021 (arXiv 2103.14030), section 3.2 and its code: roll by -shift, number the regions, then window.
    regions = torch.zeros(grid, dtype=torch.long)
    slices = (slice(0, -window_size), slice(-window_size, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate(itertools.product(slices, slices)):
        regions[rows, columns] = number
    windows = torch.tensor(
        [[y // window_size * 100 + x // window_size for x in range(grid[1])] for y in range(grid[0])]
    )
    labels = torch.stack((regions, windows)).roll((shift, shift), (1, 2)).flatten(1)  # rolled back: [2, N]
    same = (labels[:, :, None] == labels[:, None]).all(0)
    assert torch.equal(same, neighbours(grid, window_size, shift))


def test_tables_of_inference_serve_training_afterwards():
    _made_once.cache_clear()
    attn = shifted(3, 1, relative_position_bias=True, global_context=2)
    hidden_states = torch.randn(1, 35, WIDTH)
    with torch.inference_mode():
        expected = attn(hidden_states, (5, 7)).clone()
    output = attn(hidden_states, (5, 7))
    output.sum().backward()
    made = _made_once.cache_info()
    assert (
        made.hits == made.misses == 5
    )  # the windows, turns of the grid and of the context, and its cells on both axes
    assert all(parameter.grad is not None for parameter in attn.parameters())
    torch.testing.assert_close(output, expected, **NEAR)


@pytest.mark.parametrize(
    ("schedule", "window_size", "shifts"),
    [
        ("swin", 4, [0, 2, 0, 2, 0, 2]),
        ("swin", 5, [0, 2, 0, 2, 0, 2]),
        ("swin", 1, [0, 0, 0, 0, 0, 0]),
        ("cyclic", 4, [0, 1, 2, 3, 0, 1]),
        ("cyclic", 3, [0, 1, 2, 0, 1, 2]),
        ("none", 4, [0, 0, 0, 0, 0, 0]),
        ((3,), 4, [3, 3, 3, 3, 3, 3]),
        ((0, 3, 1), 4, [0, 3, 1, 0, 3, 1]),
        ([0, 2], 4, [0, 2, 0, 2, 0, 2]),
    ],
)
def test_shift_schedule_names_the_shift_of_each_layer(schedule, window_size, shifts):
    assert [scheduled_shift(schedule, layer, window_size) for layer in range(6)] == shifts
    mixers = [MIXERS["window"](1, 4, n, None, window_size=window_size, shift_schedule=schedule) for n in range(6)]
    assert [mixer.shift for mixer in mixers] == shifts


@pytest.mark.parametrize("options", [{}, {"global_context": 2}, {"relative_position_bias": True}], ids=str)
def test_chunks_do_not_change_what_windows_give(monkeypatch, options):
    for grid, window_size, shift in [((9, 10), 3, 1), ((8, 8), 4, 0), ((5, 13), 8, 5), ((1, 1), 4, 2)]:
        chunks_do_not_change(monkeypatch, shifted(window_size, shift, **options), grid)


@pytest.mark.parametrize("options", [{}, {"feature_map": "elu"}, {"feature_map": "softmax"}], ids=str)
def test_chunks_do_not_change_what_sums_give(monkeypatch, options):
    for grid in [(9, 10), (5, 13), (1, 1)]:
        chunks_do_not_change(monkeypatch, make_attention("linear", **options), grid)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"relative_position_bias": True}], ids=str)
def test_runs_of_tiles_do_not_change_what_neighbours_give(monkeypatch, options):
    for grid in [(24, 17), (5, 13), (1, 1)]:
        chunks_do_not_change(monkeypatch, make_attention("sliding_window", kernel_size=3, **options), grid)


def chunks_do_not_change(monkeypatch, attn, grid):
    for batch_size in (1, 3):
        hidden_states = torch.randn(batch_size, grid[0] * grid[1], WIDTH)
        whole = attn(hidden_states, grid)  # in training mode all tokens are taken at once
        assert chunk_tokens(hidden_states) is None
        for tokens in (1, 16, 40, 100, 250):
            monkeypatch.setattr("localdit.mixers.chunks.CHUNK_TOKENS", tokens)
            with torch.no_grad():
                assert chunk_tokens(hidden_states) == max(1, tokens // batch_size)
                torch.testing.assert_close(attn(hidden_states, grid), whole, **NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_half_precision_is_close_to_fp32(name, dtype):
    options = {"window_size": 3, "relative_position_bias": True, "global_context": 2} if name == "window" else {}
    attn = make_attention(name, layer=1, **options)
    hidden_states = torch.randn(2, 63, WIDTH)
    half = copy.deepcopy(attn).to(dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            expected, output = attn(hidden_states, (7, 9)), half(hidden_states.to(dtype), (7, 9))
        assert output.dtype == dtype
        assert (output.float() - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


def masks(batch_size, queries, keys):
    """Masks of every kind that `attend` takes, by name."""
    keep = torch.rand(batch_size, 1, 1, keys) < 0.7
    keep[..., 0] = True
    return {
        "none": None,
        "bool per key": keep,
        "bool per pair": (torch.rand(batch_size, HEADS, queries, keys) < 0.5) | torch.eye(queries, keys).bool(),
        "bias per key": (1 - keep.float()) * -10000.0,
        "bias per head": torch.randn(1, HEADS, queries, keys),
        "minus infinity": torch.zeros(batch_size, 1, 1, keys).masked_fill(~keep, float("-inf")),
    }


@pytest.mark.parametrize(("batch_size", "queries", "keys"), [(1, 1, 1), (3, 5, 7), (2, 16, 9)])
def test_plain_matrix_products_equal_fused_attention(batch_size, queries, keys):
    shapes = [(batch_size, queries, HEADS, HEAD_DIM), *[(batch_size, keys, HEADS, HEAD_DIM)] * 2]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for name, mask in masks(batch_size, queries, keys).items():
        expected = F.scaled_dot_product_attention(*(state.transpose(1, 2) for state in states), attn_mask=mask)
        expected = expected.transpose(1, 2)
        dispatched = attend(*states, mask, MIXERS["full"](HEADS, HEAD_DIM, 0, None))
        output = attend_by_matmul(*states, mask)
        weights = torch.randn_like(output)
        found = torch.autograd.grad((output * weights).sum(), states)
        wanted = torch.autograd.grad((expected * weights).sum(), states)
        for result, wish in zip([output, dispatched, *found], [expected, expected, *wanted], strict=True):
            torch.testing.assert_close(result, wish, **NEAR, msg=lambda text, name=name: f"mask {name!r}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_without_any_key_stays_finite(dtype):
    query, key, value = (torch.randn(2, 5, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(3))
    keep = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep[0] = False
    for mask in (keep, (1 - keep.float()) * -10000.0):
        for output in (
            attend_by_matmul(query, key, value, mask),
            attend(query, key, value, mask, MIXERS["full"](HEADS, HEAD_DIM, 0, None)),
        ):
            gradients = torch.autograd.grad(output.float().sum(), (query, key, value))
            assert all(states.isfinite().all() for states in (output, *gradients))


WINDOW = {"num_attention_heads": 2, "attention_head_dim": 8, "layer": 0, "rope_theta": THETA}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 0}, ["window_size=0", "at least 1"]),
        ({"window_size": -3}, ["window_size=-3", "at least 1"]),
        ({"shift_schedule": "sine"}, ["'sine'", "'swin'", "'cyclic'", "'none'"]),
        ({"shift_schedule": ()}, ["()", "'swin'", "'cyclic'", "'none'"]),
        ({"shift_schedule": 2}, ["2", "'swin'", "'cyclic'", "'none'"]),
        ({"shift_schedule": (4,), "window_size": 4}, ["shift 4", "[0, 4)"]),
        ({"shift_schedule": (-1,), "window_size": 4}, ["shift -1", "[0, 4)"]),
        ({"global_context": -1}, ["global_context=-1", "at least 0"]),
        ({"attention_head_dim": 6}, ["attention_head_dim=6", "multiple of 4", "rope_theta=None"]),
    ],
    ids=str,
)
def test_a_window_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        MIXERS["window"](**{**WINDOW, **changes})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_head_width_is_free_without_rope():
    assert MIXERS["window"](**{**WINDOW, "attention_head_dim": 6, "rope_theta": None}).attention_head_dim == 6


@pytest.mark.parametrize(
    ("token_mixers", "mixer_options", "words"),
    [
        ((), {}, ["empty", *sorted(MIXERS)]),
        (("windows",), {}, ["'windows'", *sorted(MIXERS)]),
        (("window", "fool"), {}, ["'fool'", *sorted(MIXERS)]),
        (("window",), {"widow": {}}, ["'widow'", *sorted(MIXERS)]),
        (("window",), {"window": {"size": 8}}, ["'size'", "window_size", "shift_schedule", "global_context"]),
        (("full",), {"full": {"window_size": 8}}, ["'window_size'", "'full'"]),
    ],
    ids=str,
)
def test_unknown_mixers_and_options_are_refused_with_the_known_ones(token_mixers, mixer_options, words):
    with pytest.raises(ValueError) as refusal:
        check_mixers(token_mixers, mixer_options)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_unknown_qk_norm_is_refused():
    with pytest.raises(ValueError, match="'layer'.*'rms_norm' or None"):
        make_attention(qk_norm="layer")


def test_a_memory_estimate_with_fake_tensors_leaves_no_trace():
    attn, grid = make_attention(window_size=3), (7, 11)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        attn(torch.empty(1, 77, WIDTH), grid)
    with torch.no_grad():
        assert type(attn(torch.randn(1, 77, WIDTH), grid)) is torch.Tensor


def test_an_empty_batch_stays_empty():
    with torch.no_grad():
        assert make_attention(window_size=3)(torch.empty(0, 12, WIDTH), (3, 4)).shape == (0, 12, WIDTH)


@pytest.mark.parametrize(("length", "cells"), [(8, 4), (7, 3), (10, 4), (5, 5), (1, 1), (9, 2)])
def test_averages_over_cells_are_torchs_adaptive_pooling(length, cells):
    states = torch.randn(2, 3, length, 4, requires_grad=True)
    expected = F.adaptive_avg_pool2d(states.mT, (4, cells)).mT
    torch.testing.assert_close(average(states, cells), expected)
    sent = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(made, states, sent)[0] for made in (average(states, cells), expected))
    torch.testing.assert_close(ours, theirs)
