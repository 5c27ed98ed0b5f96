"""One block of the transformer: token mixer, cross-attention to the text, feed-forward."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import nn

from localdit.mixers.base import TokenMixer, TokenRun
from localdit.models.attention import CrossAttnProcessor, LocalDiTAttention
from localdit.models.text_states import TextStates

# B batch, N image tokens (grid height * grid width), n tokens of a chunk, L text tokens, C width of a token

# Tokens of a chunk, all pictures of the batch together: what a CPU's cache holds, and what keeps an accelerator busy.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 8192


def tokens_of_chunk(hidden_states: torch.Tensor, asked: int | None) -> int:
    """Tokens of each picture of [B, N, C] in a chunk of `asked` tokens; None for what suits the device."""
    at_once = asked or (CPU_TOKENS if hidden_states.device.type == "cpu" else ACCELERATOR_TOKENS)
    return max(1, at_once // max(1, len(hidden_states)))


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
        self.streams = False
        self.chunk_tokens: int | None = None
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
        encoder_hidden_states: torch.Tensor | TextStates | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, C].

        Args:
            hidden_states: image tokens, row-major.
            modulation: shift, scale and gate of the mixer, then of the feed-forward, shape [B, 6, C].
            grid: (height, width) in tokens.
            encoder_hidden_states: projected text, shape [B, L, C], or `TextStates` that keep their keys and values.
            encoder_attention_mask: broadcastable to [B, heads, N, L]; bool keeps, float is added to the scores.
        """
        first, second = (self.scale_shift_table + modulation).unsqueeze(2).chunk(2, dim=1)  # [B, 3, 1, C] each
        text = self.text_of(encoder_hidden_states)
        if self.in_chunks:
            return self.stream(hidden_states, first, second, grid, text, encoder_attention_mask)
        hidden_states = self.mix(hidden_states, first, grid)
        return self.refine(hidden_states, second, grid, text, encoder_attention_mask)

    def text_of(
        self, text: torch.Tensor | TextStates | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """What the cross-attention is given: the text, or key and value of it where more than one call is to come."""
        if self.cross_attn is None or text is None:
            return None
        if isinstance(text, TextStates):
            return text.key_value(self.cross_attn)
        return self.cross_attn.to_key_value(text) if self.in_chunks else text

    @property
    def in_chunks(self) -> bool:
        """Whether a call is to go chunk by chunk."""
        return self.streams and not self.convolves and not torch.is_grad_enabled()

    def set_streaming(self, streams: bool, chunk_tokens: int | None) -> None:
        """Whether to run chunk by chunk where no gradients are recorded, and how many tokens a chunk has."""
        self.streams, self.chunk_tokens = streams, chunk_tokens

    def stream(
        self,
        hidden_states: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        grid: tuple[int, int],
        text: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Map tokens [B, N, C] to [B, N, C], one chunk after the other, in the memory of a chunk.

        Where the tokens of a chunk of windows meet no others, the whole block runs on that chunk. A mixer that lets
        every token meet every other runs on all of them, and only what follows it on chunks.
        """
        chunk_tokens = tokens_of_chunk(hidden_states, self.chunk_tokens)
        mixer = self.attn.get_processor()
        if not mixer.local:
            output = self.mix(hidden_states, first, grid)
            for chunk in output.split(chunk_tokens, dim=1):
                chunk.copy_(self.refine(chunk, second, grid, text, attention_mask))
            return output

        output = torch.empty_like(hidden_states)
        rows = max(1, chunk_tokens // grid[1])
        bands = (self.normed(band, first) for band in hidden_states.split(rows * grid[1], dim=1))
        compiled = "mix" in vars(self)  # by `compile`, and then few graphs are worth more than even runs
        for run in mixer.runs(bands, grid, chunk_tokens, hidden_states, alike=compiled):
            chunk = self.mix(hidden_states.index_select(1, run.tokens), first, grid, run)
            output.index_copy_(1, run.tokens, self.refine(chunk, second, grid, text, attention_mask))
        return output

    def mix(
        self, hidden_states: torch.Tensor, modulation: torch.Tensor, grid: tuple[int, int], run: TokenRun | None = None
    ) -> torch.Tensor:
        """The first half, where tokens meet: all of the grid [B, N, C], or those of one run [B, n, C].

        Args:
            hidden_states: the tokens.
            modulation: shift, scale and gate, shape [B, 3, 1, C].
            grid: (height, width) in tokens.
            run: which tokens they are, where they are not all.
        """
        normed = self.normed(hidden_states, modulation)
        mixed = self.attn(normed, grid) if run is None else self.attn(normed, grid, run)
        if self.attention_residual:
            mixed = mixed + normed
        return torch.addcmul(hidden_states, modulation[:, 2], mixed)

    def normed(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """What the mixer sees of tokens [B, n, C]."""
        # one pass over the memory, where a product and a sum are two
        return torch.addcmul(modulation[:, 0], self.norm1(hidden_states), 1 + modulation[:, 1])

    def refine(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        grid: tuple[int, int],
        text: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The second half, which takes each token for itself (but for a convolution): [B, n, C] to [B, n, C]."""
        if self.cross_attn is not None:
            hidden_states = hidden_states + self.cross_attn(hidden_states, text, attention_mask)
        shift, scale, gate = modulation.unbind(1)
        normed = torch.addcmul(shift, self.norm2(hidden_states), 1 + scale)
        return torch.addcmul(hidden_states, gate, self.feed_forward(normed, grid))

    def feed_forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The feed-forward of tokens [B, N, C], which a convolution sees as the picture [B, C, height, width]."""
        if not self.convolves:
            return self.ff(hidden_states)
        return self.ff(hidden_states.mT.unflatten(-1, grid)).flatten(2).mT

    @property
    def convolves(self) -> bool:
        """Whether the feed-forward looks at a token's neighbours."""
        return isinstance(self.ff, GLUMBConv)

    def compile(self, *args, **kwargs) -> None:
        """As `nn.Module.compile`, but half by half, so that the loop of a streamed block stays outside."""
        self.mix = torch.compile(self.mix, *args, **kwargs)
        self.refine = torch.compile(self.refine, *args, **kwargs)

    def __getstate__(self) -> dict:
        # a copy's halves are its own, not those that were compiled for this block
        return {name: value for name, value in super().__getstate__().items() if name not in ("mix", "refine")}
