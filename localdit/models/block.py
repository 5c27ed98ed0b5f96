"""One block of the transformer: token mixer, cross-attention to the text, feed-forward."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import nn

from localdit.mixers.base import TokenMixer
from localdit.models.attention import CrossAttnProcessor, LocalDiTAttention

# B batch, N image tokens (grid height * grid width), L text tokens, C width of a token


class LocalDiTBlock(nn.Module):
    """Token mixer, cross-attention to the text (where there is text) and feed-forward, modulated by adaLN-single.

    Args:
        dim: width C of a token.
        mixer: the layer's token mixer.
        num_attention_heads, attention_head_dim: heads and their width.
        cross_attention: whether the block attends to a text.
        attention_residual: add the mixer's input to its output before the gate, as the released LocalDiT does.
        dropout, attention_bias, activation_fn, norm_eps, qk_norm, qk_norm_eps, feed_forward, mlp_ratio: as in
            the transformer.
    """

    def __init__(
        self,
        dim: int,
        mixer: TokenMixer,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention: bool,
        attention_residual: bool,
        dropout: float,
        attention_bias: bool,
        activation_fn: str,
        norm_eps: float,
        qk_norm: str | None,
        qk_norm_eps: float,
        feed_forward: str,
        mlp_ratio: float,
    ):
        super().__init__()
        attention = {
            "query_dim": dim,
            "heads": num_attention_heads,
            "dim_head": attention_head_dim,
            "bias": attention_bias,
            "qk_norm": qk_norm,
            "qk_norm_eps": qk_norm_eps,
            "dropout": dropout,
        }
        self.attention_residual = attention_residual
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = LocalDiTAttention(processor=mixer, **attention)
        self.cross_attn = None
        if cross_attention:
            self.cross_attn = LocalDiTAttention(processor=CrossAttnProcessor(), is_cross_attention=True, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        if feed_forward == "mix_ffn":
            self.ff = GLUMBConv(dim, dim, mlp_ratio, norm_type=None, residual_connection=False)
        else:
            self.ff = FeedForward(dim, inner_dim=int(mlp_ratio * dim), dropout=dropout, activation_fn=activation_fn)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        grid: tuple[int, int],
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, C].

        Args:
            hidden_states: image tokens, row-major.
            modulation: shift, scale and gate of the mixer, then of the feed-forward, shape [B, 6, C].
            grid: (height, width) in tokens.
            encoder_hidden_states: projected text, shape [B, L, C].
            encoder_attention_mask: broadcastable to [B, heads, N, L]; bool keeps, float is added to the scores.
        """
        modulation = (self.scale_shift_table + modulation).unsqueeze(2)  # [B, 6, 1, C]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)

        normed = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        mixed = self.attn(normed, grid)
        if self.attention_residual:
            mixed = mixed + normed
        hidden_states = hidden_states + gate_msa * mixed

        if self.cross_attn is not None:
            hidden_states = hidden_states + self.cross_attn(
                hidden_states, encoder_hidden_states, encoder_attention_mask
            )

        normed = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.feed_forward(normed, grid)

    def feed_forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The feed-forward of tokens [B, N, C], which a convolution sees as the picture [B, C, height, width]."""
        if isinstance(self.ff, FeedForward):
            return self.ff(hidden_states)
        return self.ff(hidden_states.mT.unflatten(-1, grid)).flatten(2).mT
