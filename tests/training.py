"""A run small enough to train in a test."""

from dataclasses import replace
from pathlib import Path

from config import (
    DataConfig,
    FewStepConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TextEncoderConfig,
    TrainConfig,
)


def tiny_config(folder: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        output_dir=str(folder),
        model=ModelConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=3,
            num_layers=2,
            sample_size=64,
            patch_size=16,
            caption_channels=16,
            use_additional_conditions=False,
            mixer_options={"window": {"window_size": 3, "global_context": 2}},
        ),
        text_encoder=TextEncoderConfig(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, max_sequence_length=16),
        data=DataConfig(num_workers=0),
        objective=ObjectiveConfig(prediction_type="sample"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=2, ema_decay=0.9),
        sample=SampleConfig(prompt=["a red seven on a black background"], num_inference_steps=2, num_images=2),
        batch_size=4,
        max_steps=6,
        log_every=2,
        sample_every=4,
        checkpoint_every=3,
        report_to=(),
    )
    return replace(config, **changes)


def teacher_config(folder: Path, prediction_type: str) -> TrainConfig:
    """A run of a moment, after which a teacher's output is not zero."""
    config = tiny_config(folder, max_steps=10, checkpoint_every=10, sample_every=100)
    return replace(config, objective=replace(config.objective, prediction_type=prediction_type, flow_shift=2.0))


def matching_config(folder: Path, teacher: str, **changes) -> TrainConfig:
    """A tiny run that learns few steps by distribution matching, from the pipeline of another tiny run."""
    config = tiny_config(folder, pretrained=teacher, sample_every=100)
    config = replace(
        config,
        few_step=FewStepConfig(teacher, 3, 6, 2.0, "distribution_matching"),
        objective=replace(config.objective, condition_dropout=0.0, flow_shift=2.0),
        text_encoder=replace(config.text_encoder, frozen=True),
        sample=replace(config.sample, num_inference_steps=3, guidance_scale=1.0),
    )
    return replace(config, **changes)
