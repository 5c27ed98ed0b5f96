"""The projections of one attention layer; its processor decides who attends to whom."""

from collections.abc import Callable
from typing import cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import nn

from localdit.models.head_norm import HeadNorm, HeadRMSNorm

# B batch, N image tokens, L text tokens, H heads, D head dim

# diffusers' backends that take no mask
MASKLESS = tuple(backend for backend in AttentionBackendName if "flash" in backend.value or "sage" in backend.value)

# Up to so many keys, plain matrix products beat torch's fused attention on a CPU in half precision, backward above all.
SMALL_KEYS = 256


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, processor
) -> torch.Tensor:
    """Softmax attention through the backend that diffusers has active for `processor`.

    Args:
        query: shape [B, N, H, D].
        key, value: shape [B, L, H, D].
        attention_mask: broadcastable to [B, H, N, L]; bool keeps, float is added to the scores.
        processor: holds `_attention_backend` and `_parallel_config`, which diffusers sets.

    Returns:
        The attended values, shape [B, N, H, D].
    """
    half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if half_on_cpu and key.shape[1] <= SMALL_KEYS and processor._attention_backend is None:
        return attend_by_matmul(query, key, value, attention_mask)
    backend = processor._attention_backend
    # a backend can be active for a model, whose processors know it, or for everything
    active = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    if attention_mask is not None and active in MASKLESS:
        backend = AttentionBackendName.NATIVE  # these kernels refuse any mask
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attention_mask,
        backend=backend,
        parallel_config=processor._parallel_config,
    )


def attend_by_matmul(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The textbook form of `attend`: scores, softmax, weighted sum."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, H, N or L, D]
    scores = (query * query.shape[-1] ** -0.5) @ key.mT  # [B, H, N, L]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    return (scores.softmax(-1) @ value).transpose(1, 2)


class CrossAttnProcessor:
    """Every image token attends to every text token that the mask keeps."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "LocalDiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from [B, N, C] to [B, L, C], or to key and value that `attn.to_key_value` made of it before.

        `attention_mask` broadcasts to [B, H, N, L] (bool keeps, float adds).
        """
        text = encoder_hidden_states
        key, value = text if isinstance(text, tuple) else attn.to_key_value(text)
        query = attn.norm_q(attn.to_heads(attn.to_q(hidden_states)))
        return attn.to_output(attend(query, key, value, attention_mask, self))


class LocalDiTAttention(nn.Module, AttentionModuleMixin):
    """Query, key, value and output projections, with optional RMSNorm over each head's query and key.

    Args:
        query_dim: width of the image tokens.
        heads: number of heads.
        dim_head: width of one head.
        processor: a `TokenMixer` (self-attention) or a `CrossAttnProcessor`.
        is_cross_attention: whether keys and values come from a second sequence of the same width.
        bias: whether query, key and value projections have a bias.
        qk_norm: `"rms_norm"` or None.
        qk_norm_eps: epsilon of that norm.
        dropout: dropout of the output, in [0, 1).
    """

    _default_processor_cls = CrossAttnProcessor
    _available_processors = [CrossAttnProcessor]

    def __init__(
        self,
        query_dim: int,
        heads: int,
        dim_head: int,
        processor,
        is_cross_attention: bool = False,
        bias: bool = True,
        qk_norm: str | None = "rms_norm",
        qk_norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={qk_norm!r} is not known; choose 'rms_norm' or None.")
        inner_dim = heads * dim_head
        self.heads = heads
        self.is_cross_attention = is_cross_attention
        self.use_bias = bias  # the name diffusers' projection fusing looks for
        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])
        self.norm_q = HeadRMSNorm(dim_head, eps=qk_norm_eps) if qk_norm else HeadNorm()
        self.norm_k = HeadRMSNorm(dim_head, eps=qk_norm_eps) if qk_norm else HeadNorm()
        self.set_processor(processor)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        processor = cast(Callable, self.processor)  # diffusers annotates its own processors only
        return processor(self, hidden_states, *args, **kwargs)

    def to(self, *args, **kwargs) -> "LocalDiTAttention":
        """As ever, but that offloaded weights stay where they are.

        accelerate moves every argument of a module to the module's device, and this one is its mixer's argument.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            return self
        return super().to(*args, **kwargs)

    def to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Split [..., H * D] into [..., H, D]."""
        return states.unflatten(-1, (self.heads, -1))

    def to_query_key_value(
        self, hidden_states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project [B, N, C] to query, key and value [B, N, H, D].

        Query and key come normalised, and turned by `table`: cosine and sine, broadcastable to [B, N, H, D / 2].
        """
        query, key, value = self.project(hidden_states)
        return self.norm_q(query, table), self.norm_k(key, table), value

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project [B, N, C] to query, key and value [B, N, H, D], as they are."""
        if self.fused_projections:
            query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        return self.to_heads(query), self.to_heads(key), self.to_heads(value)

    def to_key_value(
        self, hidden_states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project another sequence [B, L, C] to key and value [B, L, H, D], which no query goes with.

        The key comes normalised and turned, as in `to_query_key_value`.
        """
        if self.fused_projections and self.is_cross_attention:
            key, value = self.to_kv(hidden_states).chunk(2, dim=-1)
        elif self.fused_projections:
            _, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            key, value = self.to_k(hidden_states), self.to_v(hidden_states)
        return self.norm_k(self.to_heads(key), table), self.to_heads(value)

    def to_output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Merge the heads of [B, N, H, D] and project to [B, N, C]."""
        projection, dropout = self.to_out
        return dropout(projection(hidden_states.flatten(-2)))
