"""The benchmarks run; what they measure is for a quiet machine to say."""

import sys

from localdit.benchmarks import attention


def test_every_mixer_is_timed_in_the_layer_and_in_the_block(monkeypatch, capsys):
    monkeypatch.setattr(attention, "HEADS", 2)
    monkeypatch.setattr(attention, "HEAD_DIM", 12)
    monkeypatch.setattr(attention, "DIM", 24)
    monkeypatch.setattr(sys, "argv", ["attention", "--side", "6", "--repeats", "1"])
    attention.main()
    lines = capsys.readouterr().out.splitlines()
    for name in attention.mixers():
        assert sum(line.startswith(f"  {name} ") and "ms   x" in line for line in lines) >= 4, name
