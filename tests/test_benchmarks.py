"""The benchmarks run; what they measure is for a quiet machine to say."""

import sys

import pytest
import torch

from localdit.benchmarks import attention, launches, transformers


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in {"HEADS": 2, "HEAD_DIM": 32, "DIM": 64}.items():
        monkeypatch.setattr(attention, name, value)


def lines_of(monkeypatch, capsys, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["attention", *arguments])
    attention.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("part", ["layer", "block", "training"])
def test_everything_is_timed_in_both_precisions(part, monkeypatch, capsys):
    lines = lines_of(monkeypatch, capsys, "--side", "6", "--repeats", "1", "--part", part)
    names = attention.modules(part)
    assert ("window 4, streamed" in names) == (part == "block") and ("SANA, diffusers" in names) == (part != "layer")
    for name in names:
        assert sum(line[2:32].strip() == name and "ms   x" in line for line in lines) == 2, name


@pytest.mark.parametrize("part", ["layer", "block", "training"])
def test_every_goal_is_of_something_that_is_measured(part):
    names = set(attention.modules(part)) | set(attention.modules("block"))
    assert set(attention.GOALS.get(part, {})) <= names
    found = {name: attention.goal_of(part, name, 64, "bfloat16") for name in attention.modules(part)}
    assert found["identity"] is None and found["linear"] == {"layer": 1.2, "block": 1.07, "training": 1.12}[part]
    assert attention.goal_of(part, "linear", 32, "bfloat16") is None


def test_a_training_step_has_the_goal_of_the_block_and_an_allowance():
    goals = [attention.goal_of("training", name, 64, "bfloat16") for name in ("window 8", "window 16", "linear")]
    assert goals == pytest.approx([1.08, 1.11, 1.12])  # of windows the block's goal is of the streamed one


def test_on_a_gpu_windows_have_a_goal_of_their_own():
    kernels = set(attention.mixers(gpu=True)) - set(attention.mixers())
    assert {"window 8, Triton", "sliding_window 7, Triton", "sliding_window 7, flex"} <= kernels
    goals = {
        name: attention.goal_of("block", name, 64, "bfloat16", "cuda") for name in attention.modules("block", True)
    }
    assert {name for name, goal in goals.items() if goal} == {name for name in goals if name.startswith("window")}
    assert goals["window 8, Triton"] == attention.GPU_GOAL
    assert attention.goal_of("layer", "window 8", 64, "bfloat16", "cuda") is None


def test_the_kernel_adds_one_launch_to_the_identity():
    """And without it no table of the grid is made anew: each of the operations counted passes over the tokens."""
    pytest.importorskip("triton")
    count = {name: launches.count("layer", name, 16)[0] for name in launches.names("layer")}
    assert count["identity"] == 4  # the projections
    assert count["full"] == 4 + 1 + 2 * (1 + 2 + 2)  # the attention; of query and key norm, complex turn and precision
    # tokens, cosines and sines sorted by window, and tokens sorted back; windows of four shapes, and what joins them
    assert count["window 8"] == count["full"] + 4 + 3 + 1
    assert count["window 8, Triton"] == count["sliding_window 7, Triton"] == 5
    assert len(launches.names("block")) > len(count)


def test_launches_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launches", "--side", "6", "--part", "block"])
    launches.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:32].strip() for line in lines if line.startswith("  ")] == launches.names("block")


def test_compiled_modules_are_timed_as_well(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(attention, "compile_without_limit", lambda: compiled.append("without limit"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    monkeypatch.setattr(attention.LocalDiTBlock, "compile", lambda module: compiled.append("ours"))
    lines_of(monkeypatch, capsys, "--side", "6", "--repeats", "1", "--part", "block", "--compile", "--dtype", "float32")
    assert compiled[0] == "without limit" and set(compiled[1:]) == {"ours", "PixArtBlock", "SanaBlock"}


def test_the_identity_mixes_nothing_and_trains_all_projections():
    layer = attention.build(attention.mixers()["identity"](), "layer")
    tokens = torch.randn(1, 4, attention.DIM, requires_grad=True)
    mixed = layer(tokens, (2, 2))
    torch.testing.assert_close(mixed, layer.to_out[0](layer.to_v(tokens)))
    mixed.sum().backward()
    assert all(part.weight.grad.abs().sum() > 0 for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]))


def test_a_verdict_says_whether_the_goal_is_reached():
    assert attention.verdict(1.02, 1.03).endswith("goal 1.03: pass")
    assert attention.verdict(1.04, 1.03).endswith("goal 1.03: falls short")
    assert attention.verdict(1.034, 1.03).endswith("pass")  # it is printed as 1.03
    assert attention.verdict(1.036, 1.03).endswith("falls short")
    assert attention.verdict(9.0, None) == ""


def test_chosen_rows_stand_beside_the_identity_and_others_are_refused(monkeypatch, capsys):
    wanted = ["--side", "6", "--repeats", "1", "--part", "block", "--dtype", "float32", "--mixer"]
    lines = lines_of(monkeypatch, capsys, *wanted, "linear")
    assert [line.split()[0] for line in lines if " ms " in line] == ["identity", "linear"]
    both = ["--side", "6", "--repeats", "1", "--part", "block", "layer", "--dtype", "float32", "--mixer"]
    lines = lines_of(monkeypatch, capsys, *both, "window 8, streamed")  # which a layer is not
    assert [line[2:32].strip() for line in lines if " ms " in line] == ["identity", "window 8, streamed", "identity"]
    with pytest.raises(ValueError, match="--mixer 'cubic' is not known"):
        lines_of(monkeypatch, capsys, *wanted, "cubic")


def test_blocks_of_diffusers_stand_in_for_ours():
    for block in (attention.PixArtBlock(), attention.SanaBlock()):
        tokens, *others = attention.inputs("block", 6, torch.float32, "cpu", batch=2)
        assert block(tokens, *others).shape == tokens.shape


def test_a_streamed_block_takes_less_memory(monkeypatch, capsys):
    # at a size where the block's own activations are well above what a process takes anyway
    for name, value in {"HEADS": 4, "HEAD_DIM": 32, "DIM": 128}.items():
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "apart", lambda function, *arguments: function(*arguments))
    wanted = ["--side", "192", "--part", "block", "--dtype", "float32", "--memory", "--mixer", "window 8"]
    lines = lines_of(monkeypatch, capsys, *wanted, "window 8, streamed")
    multiples = {line[2:32].strip(): float(line.split()[-1]) for line in lines if line.startswith("  ")}
    assert set(multiples) == {"identity", "window 8", "window 8, streamed"}
    assert multiples["window 8, streamed"] < 0.6 * multiples["window 8"]


def test_whole_transformers_are_timed_beside_those_of_diffusers(monkeypatch, capsys):
    arguments = ["--size", "64", "--layers", "1", "--repeats", "1", "--dtype", "float32", "--batch", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["transformers", *arguments])
    transformers.main()
    lines = capsys.readouterr().out.splitlines()
    for name in transformers.CONTESTANTS:
        assert sum(line[2:32].strip() == name and "x PixArt-Sigma" in line for line in lines) == 2, name
    monkeypatch.setattr(sys, "argv", ["transformers", "--size", "100"])
    with pytest.raises(ValueError, match="--size 100 is not a multiple of 32 pixels"):
        transformers.main()
