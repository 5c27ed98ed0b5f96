"""From latents to tokens, with sin-cos positions that cost a row and a column instead of a picture."""

import torch
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid

# B batch, N tokens of the grid, C width of a token


class GridPatchEmbed(PatchEmbed):
    """diffusers' `PatchEmbed` with the same positions, computed per axis.

    Half of a position's channels depend on the column alone and half on the row, so that a table of each will do, where
    `PatchEmbed` makes one of all tokens in double precision, anew in every call whose size is not the default.

    Args:
        sample_size: side of the latents the model was made for; sets the scale of the positions.
        patch_size: side of the square of latents that makes one token.
        in_channels: channels of the latents.
        dim: width C of a token, even.
        interpolation_scale: divisor of the positions.
    """

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, dim: int, interpolation_scale: float):
        super().__init__(
            sample_size,
            sample_size,
            patch_size,
            in_channels,
            dim,
            interpolation_scale=interpolation_scale,  # pyright: ignore[reportArgumentType]
            pos_embed_type=None,  # pyright: ignore[reportArgumentType]
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Map latents [B, in_channels, H, W] to tokens [B, N, C], row-major."""
        tokens = self.proj(latent).permute(0, 2, 3, 1).contiguous()  # [B, height, width, C]
        height, width, dim = tokens.shape[1:]
        tokens[..., : dim // 2] += self.axis_table(width, dim // 2, tokens.device)
        tokens[..., dim // 2 :] += self.axis_table(height, dim // 2, tokens.device).unsqueeze(1)
        return tokens.flatten(1, 2)

    def axis_table(self, length: int, channels: int, device: torch.device) -> torch.Tensor:
        """The positions along one axis, fp32, [length, channels]."""
        positions = torch.arange(length, device=device, dtype=torch.float32)
        positions = positions / (length / self.base_size) / self.interpolation_scale
        return get_1d_sincos_pos_embed_from_grid(channels, positions).float()
