"""The benchmark of the pipeline measures every part; what it finds is for a quiet machine to say."""

import os
import signal
import sys

import pytest
from PIL import Image

from localdit.benchmarks import memory
from localdit.benchmarks import pipeline as benchmark

SETTINGS = benchmark.Settings("tiny", "tiny", steps=1, dtype="float32", device="cpu", repeats=1, tile=128)


def run(monkeypatch, *options):
    """Run the command line on tiny models, in this process."""
    monkeypatch.setattr(benchmark, "apart", lambda function, *arguments: function(*arguments))
    tiny = ["--config", "tiny", "--text_encoder", "tiny", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *tiny, *options])
    benchmark.main()


def test_every_part_is_measured_and_drawn(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--size", "64", "256", "--tile", "128", "--output", str(tmp_path / "plots"))
    small, large = capsys.readouterr().out.split("64 x 64 pixels")[1].split("256 x 256 pixels")
    for part in benchmark.PARTS:
        lines = [line for line in large.splitlines() if line.startswith(f"  {part} ")]
        assert len(lines) == 1 and " s " in lines[0] and " GiB" in lines[0], part
    assert "2 steps of" in large
    assert "VAE, in tiles" not in small  # which is not cut
    assert Image.open(tmp_path / "plots" / benchmark.PLOT).size == (1000, 400)


def test_the_shares_are_those_of_what_a_generation_runs(capsys):
    found = {part: benchmark.Measurement(seconds=1.0, peak=2**30) for part in benchmark.PARTS}
    benchmark.report(2048, found, SETTINGS)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" s ")[1].split()[0] for line in lines] == ["33.3%", "33.3%", "-", "33.3%"]
    benchmark.report(2048, {**found, "transformer": benchmark.Measurement(missing="skipped")}, SETTINGS)
    assert "%" not in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 0)
    run(monkeypatch, "--size", "64")
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 3
    assert all("skipped: it takes about" in line and "0.00 GiB are free" in line for line in lines)


def test_the_estimate_grows_with_the_picture_and_for_tiles_by_the_picture_alone():
    def growth(part):
        return benchmark.estimate(part, 8192, SETTINGS) / benchmark.estimate(part, 4096, SETTINGS)

    assert growth("text encoder") == 1
    assert 3 < growth("transformer") <= 4 and 3 < growth("VAE, whole") <= 4
    added = benchmark.estimate("VAE, in tiles", 8192, SETTINGS) - benchmark.estimate("VAE, in tiles", 4096, SETTINGS)
    assert added == 4 * benchmark.PICTURES * 3 * (8192**2 - 4096**2)


def test_the_tile_is_the_pipelines_own(pipeline):
    assert pipeline.vae_tile_size == benchmark.TILE


def test_a_size_of_no_whole_tokens_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="--size 100 is not a multiple of 16 pixels"):
        run(monkeypatch, "--size", "100")


def test_a_measurement_has_a_process_of_its_own_and_tells_of_its_death():
    assert memory.apart(os.getpid) != os.getpid()
    with pytest.raises(MemoryError, match="killed"):
        memory.apart(signal.raise_signal, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the peak")
def test_the_peak_holds_what_was_freed():
    before = memory.forget_peak("cpu")
    taken = len(bytearray(2**28))
    assert 0.9 * taken < memory.peak_memory("cpu") - before < 1.5 * taken
    assert memory.forget_peak("cpu") - before < 0.1 * taken
