"""The benchmark of start-up tells imports from waiting, and one copy of the weights from two."""

import ctypes
import gc
import sys
import time
from pathlib import Path

import pytest
import torch

from localdit import LocalDiTTransformer2DModel
from localdit.benchmarks import startup

MEGABYTE = 2**20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture
def small(monkeypatch):
    """Transformers of about 40 MB instead of the released size, loaded in this process.

    For small pictures, so that PixArt's table of positions does not take as much as its weights.
    """
    size = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 48, "out_channels": 4, "sample_size": 16}
    monkeypatch.setattr(startup, "SIZE", size)
    monkeypatch.setattr(startup, "in_fresh_process", lambda function, *arguments: function(*arguments))


def test_waiting_counts_by_the_clock_and_not_by_the_processor():
    waiting, working = startup.import_times("import time; time.sleep(0.3)", "sum(range(3_000_000))")
    assert waiting.clock >= 0.3 and waiting.processor < 0.2
    assert working.processor > 0.01


def test_an_import_that_fails_is_told_of():
    with pytest.raises(RuntimeError, match="No module named 'nowhere'"):
        startup.import_times("import nowhere")


def test_what_a_process_imports_later_counts_from_its_start(monkeypatch):
    stages = {"diffusers": "import time; time.sleep(0.1)", "+ localdit": "import time; time.sleep(0.2)"}
    monkeypatch.setattr(startup, "IMPORTS", {"diffusers": {"diffusers": "0"}, "both": stages})
    results = startup.compare_imports(rounds=2)
    assert list(results) == [("diffusers", "diffusers"), ("both", "diffusers"), ("both", "+ localdit")]
    for first, last in zip(results["both", "diffusers"], results["both", "+ localdit"], strict=True):
        assert 0.1 <= first.clock < 0.3 <= last.clock


@pytest.fixture
def give_back():
    """A call that gives freed memory back to the system, so that what is held next shows as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this system's C library gives freed memory back as it likes")

    def trimmed() -> None:
        gc.collect()
        trim(0)

    return trimmed


@needs_proc
def test_the_meter_sees_how_much_memory_was_held_at_once(give_back):
    give_back()
    with startup.metered() as meter:
        for copies in (1, 2, 1):
            held = [torch.ones(64 * MEGABYTE, dtype=torch.uint8) for _ in range(copies)]
            time.sleep(0.05)
            del held
    assert meter.total / MEGABYTE == pytest.approx(128, abs=20)
    assert meter.anonymous / MEGABYTE == pytest.approx(128, abs=20)


@needs_proc
def test_weights_are_loaded_without_a_second_copy_and_a_copy_would_be_seen(small, give_back, tmp_path, monkeypatch):
    startup.save_models(tmp_path)
    startup.load("localdit", str(tmp_path / "localdit" / "float32"), "float32")  # loads what loading imports
    for library in startup.MODELS:
        for dtype in ("float32", "bfloat16"):
            give_back()
            loading = startup.load(library, str(tmp_path / library / dtype), dtype)
            assert loading.total < 1.5 and loading.anonymous < 0.5, (library, dtype)
            assert 0 < loading.seconds[0] < loading.seconds[1]

    class Copying(LocalDiTTransformer2DModel):
        @classmethod
        def from_pretrained(cls, folder, **kwargs):
            model = LocalDiTTransformer2DModel.from_pretrained(folder, **kwargs)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            return model

    monkeypatch.setitem(startup.MODELS, "localdit", Copying)
    give_back()
    loading = startup.load("localdit", str(tmp_path / "localdit" / "float32"), "float32")
    # the file's own pages may be gone by then, so what tells a copy is the memory that no file backs
    assert loading.anonymous > 0.8


@needs_proc
def test_the_command_prints_a_row_for_each_import_and_each_loading(small, monkeypatch, capsys):
    imports = {name: {name: "import decimal"} for name in ("diffusers", "localdit")}
    monkeypatch.setattr(startup, "IMPORTS", imports)
    monkeypatch.setattr(sys, "argv", ["startup", "--rounds", "1"])
    startup.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("diffusers ", "localdit ")) and line.count(" to ") == 2 for line in lines) == 2
    for stored, dtype in startup.CASES:
        for library in startup.MODELS:
            assert any(line.startswith(f"{stored} as {dtype}, {library} ") for line in lines)
