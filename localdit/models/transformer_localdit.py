"""LocalDiT: a PixArt-style diffusion transformer whose token mixer is chosen layer by layer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.utils import apply_lora_scale
from torch import nn

from localdit.mixers import MIXERS, check_mixers, mixer_names, options_of_layer
from localdit.mixers.base import TokenMixer
from localdit.models.block import LocalDiTBlock, tokens_of_chunk
from localdit.models.checks import check_labels, check_settings, check_sizes, check_whole
from localdit.models.loading import LoadingMixin
from localdit.models.patch_embed import GridPatchEmbed
from localdit.models.text_states import TextStates

# B batch, N image tokens (grid height * grid width), L text tokens, C width of a token


class LocalDiTTransformer2DModel(
    LoadingMixin,
    ModelMixin,
    ConfigMixin,
    AttentionMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    CacheMixin,
):
    """A diffusion transformer in the manner of PixArt (arXiv 2310.00426) with interchangeable token mixers.

    It is conditioned on a text (`caption_channels`), on class labels (`num_classes`), or, with neither, on nothing but
    the timestep.

    Args:
        num_attention_heads: heads H of every attention.
        attention_head_dim: width D of a head; a token is C = H * D wide.
        in_channels: channels of the latents (or of the picture, for a model without a VAE).
        out_channels: channels of the output; None for as many as come in.
        num_layers: number of blocks.
        dropout: dropout after every attention and inside the feed-forward, in [0, 1).
        attention_bias: whether query, key and value projections have a bias.
        sample_size: side of the latents the model was made for; sets the scale of the sin-cos positions.
        patch_size: side of the square of latents that makes one token.
        activation_fn: activation of the feed-forward, by its name in diffusers.
        norm_eps: epsilon of the layer norms.
        interpolation_scale: divisor of the sin-cos positions; None for `max(sample_size // 64, 1)`.
        use_additional_conditions: whether resolution and aspect ratio condition the model (C must be a multiple of 3);
            None for yes if sample_size is 128, as in PixArt.
        caption_channels: width of the text encoder's states, or None for a model without text.
        num_classes: number of class labels, or None; label `num_classes` is the null class of guidance.
        token_mixers: a mixer's name, or names tiled over the layers: ("window", "window", "full").
        mixer_options: for each mixer name its options, such as {"window": {"window_size": 8}}, or a list of such
            options, tiled over the layers of that mixer.
        rope_theta: base of the rotary embedding of queries and keys, or None for none.
        qk_norm: "rms_norm" over each head's queries and keys, or None.
        qk_norm_eps: epsilon of that norm.
        attention_residual: add a mixer's input to its output inside the gate, as the released LocalDiT does.
        feed_forward: "mlp", which works token by token, or "mix_ffn", SANA's gated unit with a depthwise 3 x 3
            convolution over the grid (arXiv 2410.10629), which lets mixers without positions tell near from far. It
            has SiLU for `activation_fn` and no dropout.
        mlp_ratio: width of the feed-forward as a multiple of C. SANA's is 2.5, which costs what an "mlp" of 4 does.

    Raises:
        ValueError: for an unknown mixer or option, or sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LocalDiTBlock"]
    _repeated_blocks = ["LocalDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single", "kernel"]
    _keep_in_fp32_modules = ["kernel"]  # of the ssm mixer, whose steps and frequencies half precision would detune

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 18,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = 4096,
        num_classes: int | None = None,
        token_mixers: str | tuple[str, ...] = ("window",),
        mixer_options: dict[str, dict[str, Any] | list[dict[str, Any]]] | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: str | None = "rms_norm",
        qk_norm_eps: float = 1e-6,
        attention_residual: bool = False,
        feed_forward: str = "mlp",
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        # one name is a list of one, and the caller may go on to change the options
        self.register_to_config(token_mixers=mixer_names(token_mixers), mixer_options=deepcopy(mixer_options))
        check_settings(dict(self.config))
        dim = num_attention_heads * attention_head_dim
        if use_additional_conditions is None:
            use_additional_conditions = sample_size == 128
        check_sizes(dim, sample_size, patch_size, caption_channels, num_classes, use_additional_conditions, mlp_ratio)
        if interpolation_scale is None:
            interpolation_scale = max(sample_size // 64, 1)
        mixers = _build_mixers(
            num_layers, token_mixers, mixer_options, num_attention_heads, attention_head_dim, rope_theta
        )

        self.inner_dim = dim
        self.out_channels = out_channels or in_channels
        self.use_additional_conditions = use_additional_conditions
        self.gradient_checkpointing = False
        self._keeps_text_states = False
        self._text_states: TextStates | None = None
        self._streams = False
        self._chunk_tokens: int | None = None

        self.pos_embed = GridPatchEmbed(sample_size, patch_size, in_channels, dim, interpolation_scale)
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim) if caption_channels else None
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.transformer_blocks = nn.ModuleList(
            LocalDiTBlock(
                dim,
                mixer,
                num_attention_heads,
                attention_head_dim,
                cross_attention=self.caption_projection is not None,
                attention_residual=attention_residual,
                dropout=dropout,
                attention_bias=attention_bias,
                activation_fn=activation_fn,
                norm_eps=norm_eps,
                qk_norm=qk_norm,
                qk_norm_eps=qk_norm_eps,
                feed_forward=feed_forward,
                mlp_ratio=mlp_ratio,
            )
            for mixer in mixers
        )
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

    def initialize_weights(self) -> None:
        """Draw the weights anew as PixArt's training does: text is not heard yet, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        conditioning = [self.adaln_single, self.caption_projection, self.class_embedder]
        for module in (part for parent in conditioning if parent is not None for part in parent.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.transformer_blocks:
            if block.cross_attn is not None:
                nn.init.zeros_(block.cross_attn.to_out[0].weight)
        nn.init.zeros_(self.proj_out.weight)

    def set_token_mixers(
        self,
        token_mixers: str | tuple[str, ...],
        mixer_options: dict[str, dict[str, Any] | list[dict[str, Any]]] | None = None,
    ) -> None:
        """Give every layer a new mixer, and the registered config the new names, so that saving and loading agree.

        What a layer's mixer learned stays where its new one has a parameter of the same name and shape.

        Args:
            token_mixers: mixer names, tiled over the layers.
            mixer_options: for each mixer name its options, or a list of them for its layers; None for the defaults.
        """
        config = self.config
        mixers = _build_mixers(
            config.num_layers,
            token_mixers,
            mixer_options,
            config.num_attention_heads,
            config.attention_head_dim,
            config.rope_theta,
        )
        for block, mixer in zip(self.transformer_blocks, mixers, strict=True):
            old = block.attn.get_processor()
            if isinstance(old, TokenMixer):
                mixer.load_state_dict(_of_same_shape(old, mixer), strict=False)
            mixer._attention_backend = old._attention_backend
            mixer.requires_grad_(next(block.parameters()).requires_grad)  # a frozen model stays frozen
            self._cast(mixer)
            block.attn.set_processor(mixer)
        self.register_to_config(token_mixers=mixer_names(token_mixers), mixer_options=deepcopy(mixer_options))

    def _cast(self, mixer: TokenMixer) -> None:
        """Bring a new mixer to the model's device and precision, but for what loading would keep in fp32 too."""
        for name, parameter in mixer.named_parameters():
            kept = not set(self._keep_in_fp32_modules).isdisjoint(name.split("."))
            parameter.data = parameter.data.to(self.device, None if kept else self.dtype)

    def enable_window_streaming(self, chunk_tokens: int | None = None) -> None:
        """Without gradients, run each block chunk by chunk of windows, so that only its input and output are whole.

        The result is the same but for rounding. Windows couple only their own tokens, so the whole block runs on a few
        of them at a time. Of a block with another mixer only what follows the mixer runs on chunks, and nothing of one
        with a "mix_ffn", whose convolution looks beyond.

        Args:
            chunk_tokens: tokens of a chunk, all pictures of a batch together, at least 1; the windows in it stay whole.
                None for 1,024 on a CPU, which stay in its cache, and 8,192 elsewhere.

        Raises:
            ValueError: for a chunk without tokens, and beside a cache that counts the calls of an attention.
        """
        if chunk_tokens is not None:
            check_whole("chunk_tokens", chunk_tokens)
        self._check_cache_beside_streaming(self._cache_config, streams=True)
        self._set_streaming(True, chunk_tokens)

    def disable_window_streaming(self) -> None:
        """Run each block on all tokens at once again."""
        self._set_streaming(False, None)

    def _set_streaming(self, streams: bool, chunk_tokens: int | None) -> None:
        self._streams, self._chunk_tokens = streams, chunk_tokens
        for block in self.transformer_blocks:
            cast(LocalDiTBlock, block).set_streaming(streams, chunk_tokens)

    @staticmethod
    def _check_cache_beside_streaming(config: Any, streams: bool) -> None:
        if streams and isinstance(config, FasterCacheConfig | PyramidAttentionBroadcastConfig):
            raise ValueError(
                f"{type(config).__name__} counts the calls of each attention, which window streaming makes chunk by "
                "chunk; use one of the two, or a cache of whole blocks such as FirstBlockCacheConfig."
            )

    @contextmanager
    def keep_text_states(self) -> Iterator[None]:
        """In this context, project a text once for all calls that are given the same tensor of it.

        Neither its projection nor its keys and values in the cross-attentions depend on the timestep, so a pipeline
        keeps them over the steps of a generation. Another tensor is projected anew; to change weights or the tensor
        itself, leave the context first. Nothing is kept while gradients are recorded.
        """
        self._keeps_text_states = True
        try:
            yield
        finally:
            self._keeps_text_states, self._text_states = False, None

    def _project_text(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor | TextStates:
        """The text [B, L, caption_channels] as the blocks read it: [B, L, C], or kept since an earlier call."""
        if not self._keeps_text_states or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.caption_projection(encoder_hidden_states)
        if self._text_states is None or self._text_states.source is not encoder_hidden_states:
            self._text_states = TextStates(encoder_hidden_states, self.caption_projection(encoder_hidden_states))
        return self._text_states

    def enable_cache(self, config: Any) -> None:
        """As `CacheMixin.enable_cache`, but that FasterCache, which halves a guided batch, halves its labels too."""
        if isinstance(config, FasterCacheConfig):
            halved = config._unconditional_conditional_input_kwargs_identifiers
            config._unconditional_conditional_input_kwargs_identifiers = [*{*halved, "class_labels"}]
        self._check_cache_beside_streaming(config, self._streams)
        super().enable_cache(config)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict what the model was trained to predict (noise, velocity or the clean picture) from noisy latents.

        Args:
            hidden_states: noisy latents, shape [B, in_channels, H, W]; H and W multiples of the patch size.
            encoder_hidden_states: text states, shape [B, L, caption_channels].
            timestep: shape [B] or a single number, in [0, 1000], 0 for clean.
            added_cond_kwargs: "resolution" [B, 2] (height, width in pixels) and "aspect_ratio" [B, 1], where the model
                has `use_additional_conditions`.
            encoder_attention_mask: [B, L] with 1 to keep, or a bias [B, 1, L] that is added to the scores.
            class_labels: shape [B], in [0, num_classes]; `num_classes` stands for no label.
            attention_kwargs: may hold "scale", the weight of the LoRA adapters.
            return_dict: whether to return an output object or a tuple.

        Returns:
            `Transformer2DModelOutput` (or a tuple) with the sample, shape [B, out_channels, H, W].

        Raises:
            ValueError: for sizes that are not whole patches, widths that do not match, a missing condition, or a label
                out of range (on a CPU; elsewhere torch says so).
        """
        self._check_inputs(
            hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, encoder_attention_mask, class_labels
        )
        batch_size, _, height, width = hidden_states.shape
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch_size)
        patch_size = self.config.patch_size
        grid = height // patch_size, width // patch_size

        hidden_states = self.pos_embed(hidden_states)  # [B, N, C]
        sizes = {
            name: None if values is None else values.expand(batch_size, -1)
            for name, values in {"resolution": None, "aspect_ratio": None, **(added_cond_kwargs or {})}.items()
        }
        condition = self.adaln_single.emb(
            timestep, **sizes, batch_size=batch_size, hidden_dtype=hidden_states.dtype
        )  # [B, C]
        if self.class_embedder is not None:
            condition = condition + self.class_embedder(class_labels)
        modulation = self.adaln_single.linear(self.adaln_single.silu(condition)).unflatten(1, (6, -1))  # [B, 6, C]

        text = None
        if self.caption_projection is not None:
            text = self._project_text(cast(torch.Tensor, encoder_hidden_states))
        if encoder_attention_mask is not None:
            if encoder_attention_mask.ndim == 2:
                encoder_attention_mask = encoder_attention_mask.bool()[:, None]
            encoder_attention_mask = encoder_attention_mask[:, None]  # [B, 1, 1, L]

        for block in self.transformer_blocks:
            block_inputs = (hidden_states, modulation, grid, text, encoder_attention_mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *block_inputs)
            else:
                hidden_states = block(*block_inputs)

        shift, scale = (self.scale_shift_table + condition[:, None]).chunk(2, dim=1)  # [B, 1, C] each
        streams = self._streams and not torch.is_grad_enabled()
        at_once = tokens_of_chunk(hidden_states, self._chunk_tokens) if streams else hidden_states.shape[1]
        chunks = hidden_states.split(at_once, dim=1)
        projected = [self.proj_out(torch.addcmul(shift, self.norm_out(chunk), 1 + scale)) for chunk in chunks]
        hidden_states = torch.cat(projected, dim=1)  # [B, N, patch * patch * out_channels]
        hidden_states = hidden_states.unflatten(-1, (patch_size, patch_size, self.out_channels))
        hidden_states = hidden_states.unflatten(1, grid)  # [B, grid height, grid width, patch, patch, out_channels]
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, self.out_channels, height, width)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _check_inputs(
        self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, encoder_attention_mask, class_labels
    ) -> None:
        config = self.config
        if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
            raise ValueError(
                f"hidden_states has shape {list(hidden_states.shape)}; "
                f"expected [batch, {config.in_channels}, height, width]."
            )
        height, width = hidden_states.shape[-2:]
        if height < 1 or width < 1 or height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"hidden_states is {height} x {width}, which is not a whole number of tokens; "
                f"give sides that are multiples of patch_size={config.patch_size}."
            )
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden_states is of {hidden_states.dtype}; give a floating-point tensor.")
        if timestep is None:
            raise ValueError("timestep is missing; give a tensor of shape [batch] with values in [0, 1000].")
        batch_size = len(hidden_states)
        if isinstance(timestep, torch.Tensor) and timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"timestep has shape {list(timestep.shape)}; give one number, or [{batch_size}].")
        if self.caption_projection is not None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states is missing; this model is conditioned on text.")
            if encoder_hidden_states.shape[-1] != config.caption_channels:
                raise ValueError(
                    f"encoder_hidden_states is {encoder_hidden_states.shape[-1]} wide, but this model was made for "
                    f"caption_channels={config.caption_channels}; use the text encoder it was trained with."
                )
            tokens = encoder_hidden_states.shape[1]
            allowed = ((batch_size, tokens), (1, tokens), (batch_size, 1, tokens), (1, 1, tokens))
            if encoder_attention_mask is not None and encoder_attention_mask.shape not in allowed:
                raise ValueError(
                    f"encoder_attention_mask has shape {list(encoder_attention_mask.shape)} for {batch_size} texts of "
                    f"{tokens} tokens; give [{batch_size}, {tokens}] or a bias [{batch_size}, 1, {tokens}]."
                )
        elif encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states was given, but this model has no text; leave it out.")
        if self.class_embedder is None and class_labels is not None:
            raise ValueError("class_labels was given, but this model has no classes; leave it out.")
        if self.class_embedder is not None:
            check_labels(class_labels, batch_size, config.num_classes)
        missing = sorted({"resolution", "aspect_ratio"} - set(added_cond_kwargs or {}))
        if self.use_additional_conditions and missing:
            raise ValueError(
                f"added_cond_kwargs lacks {missing}; "
                "this model needs 'resolution' [batch, 2] and 'aspect_ratio' [batch, 1], or one row for all."
            )


def _of_same_shape(old: nn.Module, new: nn.Module) -> dict[str, torch.Tensor]:
    """What `new` can load of the state of `old`."""
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    return {name: tensor for name, tensor in old.state_dict().items() if shapes.get(name) == tensor.shape}


def _build_mixers(
    num_layers: int,
    token_mixers: str | tuple[str, ...],
    mixer_options: dict[str, dict[str, Any] | list[dict[str, Any]]] | None,
    num_attention_heads: int,
    attention_head_dim: int,
    rope_theta: float | None,
) -> list[TokenMixer]:
    """One mixer per layer, its names tiled; a mixer's `layer` counts the layers of its own kind before it."""
    mixer_options = {} if mixer_options is None else mixer_options
    token_mixers = mixer_names(token_mixers)
    check_mixers(token_mixers, mixer_options)
    seen: Counter[str] = Counter()
    mixers = []
    for layer in range(num_layers):
        name = token_mixers[layer % len(token_mixers)]
        options = options_of_layer(mixer_options, name, seen[name])
        mixers.append(MIXERS[name](num_attention_heads, attention_head_dim, seen[name], rope_theta, **options))
        seen[name] += 1
    return mixers
