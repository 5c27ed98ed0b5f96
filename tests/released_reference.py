"""The released LocalDiT, written anew: a PixArt whose attention is changed as the release changes it."""

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.normalization import RMSNorm

HEADS, HEAD_DIM, CAPTION = 4, 12, 24


class ReleasedAttention:
    """The released model's token attention, written anew as a mask over dense attention."""

    def __init__(self, window_size: int, shift: int, grid: tuple[int, int], global_branch: str):
        self.window_size, self.shift, self.grid, self.global_branch = window_size, shift, grid, global_branch

    def rotate(self, states: torch.Tensor) -> torch.Tensor:
        height, width = self.grid
        head_dim = states.shape[-1]
        turned = states.clone()
        for token in range(height * width):
            y, x = divmod(token, width)
            for pair in range(head_dim // 2):
                j = pair % (head_dim // 4)
                angle = torch.tensor((x if pair < head_dim // 4 else y) * 10000 ** (-4 * j / head_dim))
                even, odd = states[:, :, token, 2 * pair], states[:, :, token, 2 * pair + 1]
                turned[:, :, token, 2 * pair] = even * angle.cos() - odd * angle.sin()
                turned[:, :, token, 2 * pair + 1] = odd * angle.cos() + even * angle.sin()
        return turned

    def mask(self) -> torch.Tensor:
        """Who may see whom: tokens whose rolled places share a window and that no border of the picture parts."""
        height, width = self.grid
        groups = []
        for token in range(height * width):
            y, x = divmod(token, width)
            rolled = ((y - self.shift) % height, (x - self.shift) % width)
            wrapped = (y < self.shift, x < self.shift)
            groups.append((rolled[0] // self.window_size, rolled[1] // self.window_size, *wrapped))
        return torch.tensor([[mine == theirs for theirs in groups] for mine in groups])

    def __call__(self, attn, hidden_states, **kwargs):
        qkv = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in qkv)
        query, key = self.rotate(attn.norm_q(query)), self.rotate(attn.norm_k(key))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask())
        if self.global_branch == "expected":
            mixed = mixed / 2
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2)) + hidden_states


def released_model(sample_size: int = 32, layers: int = 3) -> PixArtTransformer2DModel:
    """A small PixArt changed as the release changes it, with random weights everywhere."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=HEADS * HEAD_DIM,
        sample_size=sample_size,
        caption_channels=CAPTION,
        use_additional_conditions=True,
    )
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.fuse_projections()
            attention.norm_q = RMSNorm(HEAD_DIM, eps=1e-10)
            attention.norm_k = RMSNorm(HEAD_DIM, eps=1e-10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": torch.randn(2, 4, height, width),
        "encoder_hidden_states": torch.randn(2, 7, CAPTION),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "timestep": torch.tensor([17.0, 801.0]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[256.0, 128.0]] * 2),
            "aspect_ratio": torch.tensor([[0.5]] * 2),
        },
    }
