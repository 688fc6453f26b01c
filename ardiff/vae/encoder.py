"""The encoder of the AR-VAE: each frame alone, patches and learnable latent tokens through a Vision Transformer.

Shapes: N packed frames, H W pixels, P patches a frame, L latent tokens, D latent width, C width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.layers import Mlp, SelfAttention, attend_within_frame, sincos_grid

if TYPE_CHECKING:
    from ardiff.vae.autoencoder import AutoencoderConfig


class Encoder(nn.Module):
    """Frames ``(N, 3, H, W)`` to the moments of their latent tokens ``(N, L, 2 D)``: means, then log variances."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        side = config.resolution // config.patch_size
        self.patch_in = nn.Linear(3 * config.patch_size**2, config.width)
        self.patch_positions = nn.Parameter(sincos_grid(side, side, config.width))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.moments = nn.Linear(config.width, 2 * config.token_dim)

    def forward(self, frames: Tensor) -> Tensor:
        patches = rearrange(frames, "n c (h p) (w q) -> n (h w) (p q c)", p=self.patch_size, q=self.patch_size)
        x = self.patch_in(patches) + self.patch_positions  # (N, P, C)
        tokens = repeat(self.latent_tokens, "l c -> n l c", n=len(x))
        x = torch.cat([x, tokens], dim=1)  # (N, P + L, C)
        for block in self.blocks:
            x = block(x)
        return self.moments(self.norm(x[:, patches.shape[1] :]))  # (N, L, 2 D)


class FrameBlock(nn.Module):
    """A pre-norm transformer block with full attention inside each frame, ``(N, P + L, C) -> (N, P + L, C)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), attend_within_frame)
        return x + self.mlp(self.norm2(x))
