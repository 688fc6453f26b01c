"""The encoder of the AR-VAE: each frame alone, patches and learnable latent tokens through a Vision Transformer.

Shapes: N packed frames, H W pixels, P patches a frame, L latent tokens, D latent width, C width.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.layers import Mlp, SelfAttention, attend_within_frame, sincos_grid
from ardiff.vae.config import AutoencoderConfig


class Encoder(nn.Module):
    """Frames ``(N, 3, H, W)`` to the moments of their latent tokens ``(N, L, 2 D)``: means, then log variances."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.token_order = config.token_order
        self.patch_in = nn.Linear(3 * config.patch_size**2, config.width)
        self.patch_positions = nn.Parameter(patch_positions(config))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.stem = Stem(config)
        self.token_positions: Tensor | None = None
        if config.stem == "titok":
            self.token_positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.moments = nn.Linear(config.width, 2 * config.token_dim)

    def forward(self, frames: Tensor) -> Tensor:
        patches = rearrange(frames, "n c (h p) (w q) -> n (h w) (p q c)", p=self.patch_size, q=self.patch_size)
        tokens = self.latent_tokens if self.token_positions is None else self.latent_tokens + self.token_positions
        tokens = repeat(tokens, "l c -> n l c", n=len(frames))
        x = self.stem(self.patch_in(patches), self.patch_positions, tokens)  # (N, P + L, C)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -tokens.shape[1] :])  # (N, L, C)
        if self.token_order == "scrambled":
            x = rearrange(rearrange(x, "n l c -> n (l c)"), "n (c l) -> n l c", l=tokens.shape[1])
        return self.moments(x)  # (N, L, 2 D)


class Stem(nn.Module):
    """What enters the first block: patches with their positions, then latent tokens.

    In TiTok a class token stands before the patches, and a norm follows.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.class_token: Tensor | None = None
        self.norm: nn.LayerNorm | None = None
        match config.stem:
            case "plain":
                pass
            case "titok":
                self.class_token = nn.Parameter(0.02 * torch.randn(1, config.width))
                self.norm = nn.LayerNorm(config.width)

    def forward(self, patches: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        """``patches (N, P, C)``, ``positions (P or 1 + P, C)``, ``tokens (N, L, C)`` -> ``(N, P or 1 + P + L, C)``."""
        if self.class_token is not None:
            patches = torch.cat([repeat(self.class_token, "one c -> n one c", n=len(patches)), patches], dim=1)
        x = torch.cat([patches + positions, tokens], dim=1)
        return x if self.norm is None else self.norm(x)


def patch_positions(config: AutoencoderConfig) -> Tensor:
    """Sine-cosine embeddings of a frame's patches, ``(P, C)``; with TiTok's stem after a zero for its class token."""
    side = config.resolution // config.patch_size
    positions = sincos_grid(side, side, config.width)
    return positions if config.stem == "plain" else nn.functional.pad(positions, (0, 0, 1, 0))


class FrameBlock(nn.Module):
    """A pre-norm transformer block with full attention inside each frame, ``(N, P + L, C) -> (N, P + L, C)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_ratio, "tanh" if config.stem == "plain" else "none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), attend_within_frame)
        return x + self.mlp(self.norm2(x))
