"""What the trainer costs: that the benchmark runs, and counts the operations of a step."""

from dataclasses import replace

from config import ModelConfig, TextEncoderConfig, TrainBenchmarkConfig
from localdit.command_line import PRETRAINED
from tests.training import tiny_config
from train.benchmark import benchmark


def test_the_benchmark_tells_ratios_and_the_operations_of_a_step(tmp_path, capsys):
    model = ModelConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        num_layers=1,
        sample_size=16,
        patch_size=2,
        caption_channels=128,
        use_additional_conditions=False,
        token_mixers=("full",),
    )
    text_encoder = TextEncoderConfig(pretrained=str(PRETRAINED), frozen=True, max_sequence_length=16)
    config = tiny_config(tmp_path, model=model, text_encoder=text_encoder, vae=str(PRETRAINED / "vae"), batch_size=2)
    config = replace(config, data=replace(config.data, name="digit_scenes", resolution=64))
    found = benchmark(TrainBenchmarkConfig(run=config, rounds=1, steps=1, peak_tflops=1.0))
    assert found["bare loop"] == 1
    assert found.keys() >= {"trainer, one batch", "trainer, precomputed", "trainer, pictures"}
    line = capsys.readouterr().out.splitlines()[-1]
    operations = 1e12 * float(line.split(" TFLOP a step")[0].rsplit(" ", 1)[1])
    # per token: four projections of attention and two of the feed-forward, 12 D² weights; forward and backward, 6 each
    least = 6 * 12 * 24**2 * 64 * 2
    assert least < operations < 10 * least
    assert line.endswith("of 1")
