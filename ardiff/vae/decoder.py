"""The decoder of the AR-VAE: patch placeholders read the latent tokens of their own frame and of earlier frames.

Shapes: B videos, F frames, N = B F packed frames, H W pixels, P patches per frame, L latent tokens, D latent width,
C width, W frames of the temporal window.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.layers import sincos_grid
from ardiff.resolution import Resolution
from ardiff.vae.blocks import FrameBlock, positions_for, unpatchify
from ardiff.vae.config import AutoencoderConfig
from ardiff.vae.temporal import DecoderCache, TemporalAttention, sliding_windows


class Decoder(nn.Module):
    """Latents ``(B, F, L, D)`` to frames ``(B, F, 3, H, W)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_in = nn.Linear(config.token_dim, config.width)
        self.token_positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.placeholder = nn.Parameter(0.02 * torch.randn(config.width))
        self.patch_positions = nn.Parameter(sincos_grid(*config.patch_grid(), config.width))
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        layers = config.depth if config.temporal == "window" else 0
        self.temporal = nn.ModuleList(TemporalAttention(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.width)
        self.patch_out = nn.Linear(config.width, 3 * config.patch_size**2)

    def zero_temporal_output(self) -> None:
        """Makes temporal attention add nothing, so that a decoder of single frames becomes one of clips smoothly."""
        for attention in self.temporal:
            attention.zero_output()  # type: ignore[operator]

    @property
    def last_layer(self) -> nn.Module:
        """The layer that outputs pixels."""
        return self.patch_out

    def forward(self, latents: Tensor, cache: DecoderCache | None, temporal: bool, shape: Resolution) -> Tensor:
        """Decodes frames of ``shape`` that continue those of earlier calls with the same ``cache``.

        ``temporal=False`` decodes each frame alone.
        """
        positions = positions_for(self.config, self.patch_positions, shape)  # (P, C)
        batch, num_patches = len(latents), len(positions)
        tokens = self.token_in(latents) + self.token_positions  # (B, F, L, C)
        own = rearrange(tokens, "b f l c -> (b f) l c")  # (N, L, C)
        patches = repeat(self.placeholder + positions, "p c -> n p c", n=len(own))  # (N, P, C)
        x = torch.cat([patches, own], dim=1)  # (N, P + L, C)
        if not temporal or not self.temporal:
            for block in self.blocks:
                x = block(x)  # (N, P + L, C)
        else:
            history, visible = sliding_windows(tokens, self.config.temporal_window, cache)  # (N, W, L, C), (N, W)
            for block, attention in zip(self.blocks, self.temporal, strict=True):
                patches, own = x[:, :num_patches], x[:, num_patches:]  # (N, P, C), (N, L, C)
                x = block(torch.cat([patches + attention(patches, history, visible), own], dim=1))  # (N, P + L, C)
        x = self.patch_out(self.norm(x[:, :num_patches]))  # (N, P, p q 3)
        frames = unpatchify(x, self.config.patch_size, self.config.patch_grid(shape))  # (N, 3, H, W)
        return rearrange(frames, "(b f) c h w -> b f c h w", b=batch)
