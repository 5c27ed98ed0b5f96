"""diffusers' caches and offloading: they take hold of our blocks, save work, and leave nothing behind."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from localdit import LocalDiTClassPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel

STEPS = 8


@pytest.fixture
def deep_pipeline(make_pipeline, tiny_transformer):
    return make_pipeline(transformer=tiny_transformer(num_layers=4))


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red seven", num_inference_steps=STEPS, generator=generator, output_type="pt").images


def counted(module: torch.nn.Module) -> list:
    """A list that grows by one at every call of a module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), threshold=1.0),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_saves_work_changes_little_and_leaves_nothing_behind(deep_pipeline, name):
    attention = deep_pipeline.transformer.transformer_blocks[-1].attn
    plain = draw(deep_pipeline)
    deep_pipeline.transformer.enable_cache(CACHES[name](deep_pipeline))
    inner = counted(attention.get_processor())
    cached = draw(deep_pipeline)
    assert 0 < len(inner) < STEPS
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert (cached - plain).abs().mean() < 0.2
    assert torch.equal(draw(deep_pipeline), cached), "a call starts with an empty cache"
    deep_pipeline.transformer.disable_cache()
    assert torch.equal(draw(deep_pipeline), plain)


@pytest.mark.parametrize("condition", ["sizes", "labels"])
def test_a_cache_that_leaves_out_half_of_a_batch_leaves_out_its_other_conditions(
    make_pipeline, tiny_transformer, condition
):
    settings = {"num_layers": 4, "use_additional_conditions": True}
    if condition == "labels":
        settings = {"num_layers": 4, "caption_channels": None, "num_classes": 3}
        pipe = LocalDiTClassPipeline(
            vae=None, transformer=tiny_transformer(**settings), scheduler=FlowMatchEulerDiscreteScheduler()
        )
    else:
        pipe = make_pipeline(transformer=tiny_transformer(**settings))
    batches = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    pipe.transformer.enable_cache(CACHES["faster"](pipe))
    given = ([1, 2],) if condition == "labels" else (["a red seven", "a blue two"],)
    pictures = pipe(*given, num_inference_steps=STEPS, guidance_scale=2.0, output_type="pt").images
    assert torch.isfinite(pictures).all()
    assert set(batches) == {2, 4}


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_changes_nothing(pipeline, offload_type):
    plain = draw(pipeline)
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    assert torch.equal(draw(pipeline), plain)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("window", {"global_context": 2, "relative_position_bias": True}),
        ("sliding_window", {"relative_position_bias": True}),
        ("linear", {}),
        ("ssm", {"state_size": 4}),
        ("full", {}),
    ],
)
def test_weights_that_are_offloaded_between_calls_change_nothing(tiny_transformer, mixer, options):
    model = tiny_transformer(token_mixers=(mixer,), mixer_options={mixer: options})
    given = {
        "hidden_states": torch.randn(1, 3, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, model.config.caption_channels),
        "timestep": torch.tensor([500.0]),
        "added_cond_kwargs": None,
    }
    with torch.no_grad():
        plain = model(**given).sample
        cpu_offload(model, "cpu")
        assert next(model.transformer_blocks.parameters()).is_meta
        assert torch.equal(model(**given).sample, plain)


def test_a_device_map_and_a_variant_load_the_same_weights(pipeline, tmp_path):
    transformer = pipeline.transformer
    transformer.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    shards = list(tmp_path.glob("*.ema-*.safetensors")) + list(tmp_path.glob("*-of-*.ema.safetensors"))
    assert len(shards) > 1
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, variant="ema", device_map="cpu")
    for mine, theirs in zip(loaded.parameters(), transformer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("safe", [True, False])
def test_a_pipeline_hands_variant_format_and_shard_size_on_to_its_transformer(pipeline, tmp_path, safe):
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB", safe_serialization=safe)
    suffix = ".safetensors" if safe else ".bin"
    files = [path.name for path in (tmp_path / "transformer").iterdir() if path.suffix == suffix]
    assert len(files) > 1 and all("fp16" in name for name in files)
    # transformers saves its text encoder as safetensors in any case
    rest = {} if safe else {"text_encoder": None, "tokenizer": None}
    loaded = LocalDiTPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=safe, **rest)
    for mine, theirs in zip(loaded.transformer.parameters(), pipeline.transformer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_prompts_are_encoded_once_kept_and_drawn_from_without_the_text_encoder(pipeline, model_folder, tmp_path):
    """The way to little memory: the large T5 is loaded, used and gone before the transformer comes."""
    texts = LocalDiTPipeline.from_pretrained(model_folder, transformer=None, vae=None)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    with torch.no_grad():
        torch.save(dict(zip(names, texts.encode_prompt("a red seven"), strict=True)), tmp_path / "prompt.pt")
    whole = LocalDiTPipeline.from_pretrained(model_folder)
    without = LocalDiTPipeline.from_pretrained(model_folder, text_encoder=None, tokenizer=None)
    arguments = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    drawn = without(**torch.load(tmp_path / "prompt.pt"), **arguments).images
    arguments["generator"].manual_seed(0)
    assert torch.equal(drawn, whole("a red seven", **arguments).images)
