"""The benchmark of a text's work turns off what it says, and nothing that the picture shows."""

import sys
from contextlib import ExitStack

import pytest
import torch

from localdit.benchmarks import text as benchmark
from localdit.benchmarks.pipeline import Settings

SETTINGS = Settings("tiny", "tiny", steps=3, dtype="float32", device="cpu", repeats=1, tile=64)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return benchmark.build(SETTINGS)


class Calls:
    """What comes to the transformer, to a projection of the text and to the text encoder."""

    def __init__(self, pipeline):
        self.batches, self.lengths, self.read, self.encoded = [], [], 0, []
        transformer = pipeline.transformer
        self.hooks = [
            transformer.pos_embed.register_forward_hook(lambda _, given, __: self.batches.append(len(given[0]))),
            transformer.caption_projection.register_forward_hook(self.note_text),
            pipeline.text_encoder.register_forward_hook(lambda _, given, __: self.encoded.append(len(given[0]))),
        ]

    def note_text(self, _, given, __):
        self.read += 1
        self.lengths.append(given[0].shape[1])


def generate(pipeline, way):
    calls = Calls(pipeline)
    with ExitStack() as stack:
        for hook in calls.hooks:
            stack.callback(hook.remove)
        for switch in way.switches:
            stack.enter_context(switch(pipeline))
        drawn = pipeline(
            [benchmark.PROMPT] * 2,
            height=8,
            width=8,
            num_inference_steps=SETTINGS.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    return drawn, calls


def test_each_way_leaves_out_one_saving_and_draws_the_same(pipeline):
    drawn, plain = generate(pipeline, benchmark.WAYS[benchmark.PLAIN])
    assert (plain.batches, plain.lengths, plain.encoded) == ([4] * 3, [16], [1, 1])  # 14 tokens, in eights
    changes = {
        "texts padded to their limit": ([4] * 3, [120]),
        "texts read in every step": ([4] * 3, [16] * 3),
        "and guidance in two batches": ([2] * 6, [16] * 6),
    }
    for name, (batches, lengths) in changes.items():
        other, calls = generate(pipeline, benchmark.WAYS[name])
        assert (calls.batches, calls.lengths) == (batches, lengths), name
        torch.testing.assert_close(other, drawn, rtol=1e-3, atol=1e-3)
    assert generate(pipeline, benchmark.WAYS[benchmark.PLAIN])[1].lengths == [16]  # every switch is back


def test_distinct_prompts_are_all_encoded(pipeline):
    calls = Calls(pipeline)
    benchmark.seconds(pipeline, benchmark.WAYS["each picture's text encoded"], 8, 3, SETTINGS)
    for hook in calls.hooks:
        hook.remove()
    assert calls.encoded == [3, 3]


def test_it_reports_every_way(monkeypatch, capsys):
    tiny = ["--config", "tiny", "--text_encoder", "tiny", "--steps", "1", "--repeats", "1", "--pictures", "1"]
    monkeypatch.setattr(sys, "argv", ["text", *tiny, "--side", "8", "--device", "cpu"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "8 x 8 latents" in printed and all(f"  {name} " in printed for name in benchmark.WAYS)
    monkeypatch.setattr(sys, "argv", ["text", *tiny, "--side", "7"])
    with pytest.raises(ValueError, match="--side 7 is not a multiple of 2 latents"):
        benchmark.main()
