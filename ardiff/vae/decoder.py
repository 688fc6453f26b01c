"""The decoder of the AR-VAE: patch placeholders that read their own frame's latent tokens and those of earlier frames.

Shapes: B batch, F frames, N = B F packed frames, P patches a frame, L latent tokens, D latent width, C width,
W frames of the temporal window, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.layers import sincos_grid
from ardiff.vae.encoder import FrameBlock

if TYPE_CHECKING:
    from ardiff.vae.autoencoder import AutoencoderConfig


@dataclass(slots=True)
class DecoderCache:
    """What decoding the next frames needs of the frames before: their embedded latent tokens.

    ``tokens`` is ``(B, up to W - 1, L, C)``, or None before the first frame; its size does not grow with the video.
    """

    tokens: Tensor | None = None


class Decoder(nn.Module):
    """Latents ``(B, F, L, D)`` to frames ``(B, F, 3, H, W)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.window = config.temporal_window
        self.side = config.resolution // config.patch_size
        self.token_in = nn.Linear(config.token_dim, config.width)
        self.token_positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.placeholder = nn.Parameter(0.02 * torch.randn(config.width))
        self.patch_positions = nn.Parameter(sincos_grid(self.side, self.side, config.width))
        self.blocks = nn.ModuleList(FrameBlock(config) for _ in range(config.depth))
        self.temporal = nn.ModuleList(TemporalAttention(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.patch_out = nn.Linear(config.width, 3 * config.patch_size**2)

    def zero_temporal_output(self) -> None:
        """Makes temporal attention add nothing, so that a decoder of single frames turns into one of clips smoothly."""
        for attention in self.temporal:
            nn.init.zeros_(attention.proj.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, latents: Tensor, cache: DecoderCache | None = None, temporal: bool = True) -> Tensor:
        batch, frames = latents.shape[:2]
        tokens = self.token_in(latents) + self.token_positions  # (B, F, L, C)
        history, visible = self._windows(tokens, cache) if temporal else (None, None)
        placeholders = repeat(self.placeholder + self.patch_positions, "p c -> n p c", n=batch * frames)
        x = torch.cat([placeholders, rearrange(tokens, "b f l c -> (b f) l c")], dim=1)  # (N, P + L, C)
        for block, attention in zip(self.blocks, self.temporal, strict=True):
            if history is not None:
                patches, own = x.split([placeholders.shape[1], tokens.shape[2]], dim=1)
                x = torch.cat([patches + attention(patches, history, visible), own], dim=1)
            x = block(x)
        pixels = self.patch_out(self.norm(x[:, : placeholders.shape[1]]))  # (N, P, 3 p q)
        return rearrange(
            pixels,
            "(b f) (h w) (p q c) -> b f c (h p) (w q)",
            b=batch,
            h=self.side,
            p=self.patch_size,
            q=self.patch_size,
        )

    def _windows(self, tokens: Tensor, cache: DecoderCache | None) -> tuple[Tensor, Tensor]:
        """Latent tokens of the last W frames of every frame, ``(N, W, L, C)``, and which exist, bool ``(N, W)``."""
        batch, frames = tokens.shape[:2]
        past = tokens[:, :0] if cache is None or cache.tokens is None else cache.tokens
        known = torch.cat([past, tokens], dim=1)  # (B, past + F, L, C)
        if cache is not None:
            cache.tokens = known[:, max(known.shape[1] - self.window + 1, 0) :].detach()
        missing = self.window - 1 - past.shape[1]
        padded = nn.functional.pad(known, (0, 0, 0, 0, missing, 0))  # (B, W - 1 + F, L, C)
        windows = rearrange(padded.unfold(1, self.window, 1), "b f l c w -> (b f) w l c")
        slot = torch.arange(self.window, device=tokens.device)
        frame = torch.arange(frames, device=tokens.device)
        visible = slot >= missing - frame[:, None]  # (F, W)
        return windows, repeat(visible, "f w -> (b f) w", b=batch)


class TemporalAttention(nn.Module):
    """Cross-attention of a frame's patches to the latent tokens of the last W frames; its output starts at zero."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.width)
        self.history_norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.lag_embedding = nn.Parameter(0.02 * torch.randn(config.temporal_window, 1, config.width))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, patches: Tensor, history: Tensor, visible: Tensor) -> Tensor:
        """``patches (N, P, C)``, ``history (N, W, L, C)``, ``visible (N, W)`` -> ``(N, P, C)``."""
        q = rearrange(self.query(self.norm(patches)), "n p (h k) -> n h p k", h=self.num_heads)
        k, v = self.key_value(self.history_norm(history)).chunk(2, dim=-1)  # (N, W, L, C) each
        k = rearrange(k + self.lag_embedding, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        v = rearrange(v, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        mask = repeat(visible, "n w -> n 1 1 (w l)", l=history.shape[2])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (N, H, P, K)
        return self.proj(rearrange(mixed, "n h p k -> n p (h k)"))
