"""The encoder of the AR-VAE: a Vision Transformer over the patches and learned latent tokens of each frame.

Shapes: N packed frames, H W pixels, P patches per frame, L latent tokens, D latent width, C width.
"""

import torch
from einops import repeat
from torch import Tensor, nn

from ardiff.layers import sincos_grid
from ardiff.resolution import Resolution
from ardiff.vae.blocks import FrameBlock, patchify, positions_for
from ardiff.vae.config import AutoencoderConfig


class Encoder(nn.Module):
    """Frames ``(N, 3, H, W)`` to the moments of their latent tokens ``(N, L, 2 D)``: means, then log variances."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(3 * config.patch_size**2, config.width)
        self.patch_positions = nn.Parameter(sincos_grid(*config.patch_grid(), config.width))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.moments = nn.Linear(config.width, 2 * config.token_dim)

    def forward(self, frames: Tensor) -> Tensor:
        positions = positions_for(self.config, self.patch_positions, Resolution(*frames.shape[2:]))  # (P, C)
        patches = self.patch_in(patchify(frames, self.config.patch_size)) + positions  # (N, P, C)
        tokens = repeat(self.latent_tokens, "l c -> n l c", n=len(frames))  # (N, L, C)
        x = torch.cat([patches, tokens], dim=1)  # (N, P + L, C)
        for block in self.blocks:
            x = block(x)  # (N, P + L, C)
        return self.moments(self.norm(x[:, patches.shape[1] :]))  # (N, L, 2 D)
