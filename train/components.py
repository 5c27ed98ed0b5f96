"""The networks of a run: built or loaded, wrapped for training, made into a pipeline."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from config import ModelConfig, SampleConfig, TextEncoderConfig, TrainConfig
from localdit import LocalDiTClassPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from train.data import Condition, Source
from train.frozen import load_text_encoder, load_tokenizer, load_vae, on_disk, text_width, vae_skeleton
from train.objective import sampling_scheduler

logger = logging.getLogger(__name__)


def build_tokenizer(words: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, deaf to case and punctuation, that ends a text with </s> as T5's does."""
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s'-]"), " ")])
    known = sorted({word for text in words for word in normalizer.normalize_str(text).split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_text_encoder(config: TextEncoderConfig, vocab_size: int) -> T5EncoderModel:
    """A small T5 encoder with random weights."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class Denoiser(nn.Module):
    """Transformer and text encoder as one module, so that one forward pass trains both under any launcher."""

    def __init__(self, transformer: LocalDiTTransformer2DModel, text_encoder: T5EncoderModel | None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(
        self,
        inputs: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        resolution: torch.Tensor | None = None,
        aspect_ratio: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict [B, C, H, W] from noisy inputs [B, C, H, W], timesteps [B] and text or labels [B].

        Text are token ids [B, L] with their mask, or the states [B, L, D] that a text encoder made of them. The
        transformer sees those states that `encoder_attention_mask` [B, L] says.
        Where the transformer is conditioned on sizes, `resolution` is [B, 2] and `aspect_ratio` [B, 1].
        """
        states = encoder_hidden_states
        if states is None and self.text_encoder is not None:
            states = self.text_encoder(input_ids, attention_mask=attention_mask)[0]
        sizes = {"resolution": resolution, "aspect_ratio": aspect_ratio} if resolution is not None else None
        prediction = self.transformer(
            inputs,
            encoder_hidden_states=states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            added_cond_kwargs=sizes,
            class_labels=class_labels,
            return_dict=False,
        )[0]
        if prediction.shape[1] == inputs.shape[1]:
            return prediction
        return prediction[:, : inputs.shape[1]]  # the rest of a PixArt's output is a variance, which stays untrained

    def train(self, mode: bool = True) -> "Denoiser":
        """As ever, but that a frozen text encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.text_encoder is not None and not any(part.requires_grad for part in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self


FrozenNetworks = tuple[AutoencoderKL | None, T5EncoderModel | None]


@dataclass
class Networks:
    """What a run trains, and what it needs beside: a tokenizer for captions, an autoencoder for latents (or None)."""

    denoiser: Denoiser
    tokenizer: PreTrainedTokenizerBase | None
    vae: AutoencoderKL | None
    call_defaults: dict = field(default_factory=dict)  # of the pipeline that the run started from
    classes: list[str] | None = None  # names of the class labels
    reload: Callable[[], FrozenNetworks] | None = None  # of a run on precomputed data, which is without them

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along the side of a latent; 1 without an autoencoder."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def pipeline(self, config: TrainConfig, complete: bool = True) -> DiffusionPipeline:
        """The pipeline of a run, with the run's sampling settings as its defaults.

        What a run on precomputed data is without is loaded for it, unless it need not be `complete`.
        """
        vae, text_encoder = self.vae, self.denoiser.text_encoder
        if self.reload is not None and complete:
            vae, text_encoder = self.reload()
        sample = config.sample
        learned: dict[str, float] = {}
        if config.few_step.teacher is not None:  # guidance is in what was learned
            learned |= dict.fromkeys(("guidance_scale", "img2img_guidance_scale"), 1.0)
            learned["num_inference_steps"] = config.few_step.steps
        defaults = {
            "height": sample.height,
            "width": sample.width,
            "num_inference_steps": sample.num_inference_steps,
            "guidance_scale": sample.guidance_scale,
            "img2img_guidance_scale": sample.img2img_guidance_scale,
            "strength": sample.strength,
            "max_sequence_length": self.tokenizer.model_max_length if self.tokenizer is not None else None,
        }
        common = {
            "vae": vae,
            "transformer": self.denoiser.transformer,
            "scheduler": sampling_scheduler(config.objective, first_order=config.few_step.teacher is not None),
            "call_defaults": self.call_defaults
            | learned
            | {name: value for name, value in defaults.items() if value is not None},
        }
        if self.tokenizer is None:
            return LocalDiTClassPipeline(id2label=dict(enumerate(self.classes or [])), **common)
        return LocalDiTPipeline(tokenizer=self.tokenizer, text_encoder=text_encoder, **common)


def build_networks(config: TrainConfig, words: Callable[[], list[str]]) -> Networks:
    """New networks as the config describes them, or those of the pipeline that `config.pretrained` names."""
    if config.data.name == "precomputed":
        networks = networks_without_frozen(config)
    else:
        networks = new_networks(config, words) if config.pretrained is None else load_networks(config.pretrained)
    if config.mixers.token_mixers is not None:
        networks.denoiser.transformer.set_token_mixers(config.mixers.token_mixers, config.mixers.mixer_options)
    if config.text_encoder.frozen and networks.denoiser.text_encoder is not None:
        networks.denoiser.text_encoder.requires_grad_(False)
    networks.denoiser.train()
    if config.gradient_checkpointing:
        networks.denoiser.transformer.enable_gradient_checkpointing()
    return networks


def new_networks(config: TrainConfig, words: Callable[[], list[str]]) -> Networks:
    """Networks with random weights, but for the autoencoder, which is trained before."""
    vae = load_vae(config.vae)
    if config.model.caption_channels is None:
        return Networks(Denoiser(new_transformer(config.model), None), None, vae)
    tokenizer, text_encoder = text_networks(config.text_encoder, words)
    check_width(config, text_encoder.config.d_model)
    return Networks(Denoiser(new_transformer(config.model), text_encoder), tokenizer, vae)


def check_width(config: TrainConfig, width: int) -> None:
    if config.model.caption_channels != width:
        raise ValueError(
            f"model.caption_channels={config.model.caption_channels} differs from text_encoder.d_model={width}; make "
            "them equal."
        )


def networks_without_frozen(config: TrainConfig) -> Networks:
    """The networks of a run on precomputed data: no text encoder, and of the autoencoder the sizes alone."""
    frozen = on_disk(config)

    def reload() -> FrozenNetworks:
        has_text = networks.tokenizer is not None
        return load_vae(frozen.vae), load_text_encoder(frozen.text_encoder)[1] if has_text else None

    if config.pretrained is not None:
        networks = load_networks(config.pretrained, frozen=False)
    else:
        networks = Networks(Denoiser(new_transformer(config.model), None), None, None)
        if config.model.caption_channels is not None:
            networks.tokenizer = load_tokenizer(frozen.text_encoder)
            check_width(config, text_width(frozen.text_encoder))
    networks.vae = vae_skeleton(frozen.vae)
    networks.reload = reload
    return networks


def check_samples(pipeline: DiffusionPipeline, sample: SampleConfig) -> None:
    """Raise a ValueError where a run could not draw its samples, before it has trained for them."""
    pipeline.check_size(*pipeline.default_size(sample.height, sample.width))


def new_transformer(config: ModelConfig) -> LocalDiTTransformer2DModel:
    """A transformer to be trained from scratch."""
    transformer = LocalDiTTransformer2DModel(**vars(config))
    transformer.initialize_weights()
    return transformer


def text_networks(
    config: TextEncoderConfig, words: Callable[[], list[str]]
) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    """The tokenizer and T5 encoder that the config names, or new ones over the words that the data have."""
    if config.pretrained is not None:
        return load_text_encoder(config)
    tokenizer = build_tokenizer(words(), config.max_sequence_length)
    return tokenizer, build_text_encoder(config, len(tokenizer))


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """The transformer's settings: those of `config.model`, or of the pipeline that `config.pretrained` names."""
    if config.pretrained is None:
        return vars(config.model)
    with one_sentence(config.pretrained):
        settings, _ = LocalDiTTransformer2DModel.load_config(
            config.pretrained, subfolder="transformer", return_unused_kwargs=True
        )
    return {"caption_channels": None, "num_classes": None, **settings}


def condition_of(model: Mapping[str, Any]) -> Condition | None:
    """What the pictures have to come with, for a transformer of these settings."""
    if model["caption_channels"] is not None:
        return "caption"
    return "label" if model["num_classes"] is not None else None


def load_networks(source: str, frozen: bool = True) -> Networks:
    """The networks of a pipeline folder or Hub id, in fp32; the autoencoder and text encoder only if `frozen`."""
    with one_sentence(source):
        parts = {"vae", "text_encoder"} & DiffusionPipeline.load_config(source).keys() if not frozen else ()
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32, **dict.fromkeys(parts))
    if not isinstance(pipeline, LocalDiTPipeline | LocalDiTClassPipeline):
        raise ValueError(
            f"pretrained={source!r} holds a {type(pipeline).__name__}; name a LocalDiTPipeline or "
            "LocalDiTClassPipeline."
        )
    if pipeline.vae is not None:
        pipeline.vae.eval().requires_grad_(False)
    text_encoder, tokenizer = (getattr(pipeline, name, None) for name in ("text_encoder", "tokenizer"))
    denoiser = Denoiser(pipeline.transformer, text_encoder)
    return Networks(denoiser, tokenizer, pipeline.vae, dict(pipeline.config.call_defaults))


@contextmanager
def one_sentence(source: str):
    """Say in one sentence that a pipeline cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained={source!r} cannot be loaded ({str(error).splitlines()[0]}); "
            "name a complete folder or Hub id of a LocalDiT pipeline."
        ) from error


def check_networks(networks: Networks, data: Source) -> None:
    """Raise a ValueError where the model does not fit the data or the autoencoder."""
    model, vae, channels = networks.denoiser.transformer.config, networks.vae, data.channels
    if vae is not None:
        channels = vae.config.latent_channels
    if model.in_channels != channels:
        source = "data" if vae is None else "autoencoder"
        raise ValueError(
            f"model.in_channels={model.in_channels}, but the {source} has {channels} channels; set {channels}."
        )
    token = model.patch_size * networks.vae_scale_factor
    if odd := [size for size in data.sizes if size[0] % token or size[1] % token]:
        raise ValueError(
            f"Pictures of {odd[0][0]} x {odd[0][1]} pixels are no whole number of tokens, {token} pixels wide; make "
            f"data.resolution, or data.bucket_multiple, a multiple of {token}."
        )
    side = round(math.sqrt(data.sizes[0][0] * data.sizes[0][1])) // (token // model.patch_size)
    if model.sample_size != side:
        logger.warning(
            "model.sample_size=%d, but the data is %d wide for the model; without a size the pipeline will draw "
            "pictures of %d pixels.",
            *(model.sample_size, side, model.sample_size * token // model.patch_size),
        )
    if model.out_channels not in (None, channels, 2 * channels):
        raise ValueError(
            f"model.out_channels={model.out_channels} is neither null nor {channels}, nor the {2 * channels} of a "
            "PixArt that also predicts a variance; leave it null."
        )
    if data.classes is not None and len(data.classes) != model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but the data has {len(data.classes)}: {data.classes}."
        )
