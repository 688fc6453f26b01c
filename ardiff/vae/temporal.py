"""Attention of a decoded frame to the frames before it.

Shapes: B videos, F frames, N = B F packed frames, P patches per frame, L latent tokens, C width, W frames of the
temporal window, H heads, K head width.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.vae.config import AutoencoderConfig


@dataclass(slots=True)
class DecoderCache:
    """What a decoder needs of earlier frames. Start with an empty one and pass it to every call for the same videos.

    Its size does not grow with the videos.
    """

    tensors: list[Tensor] = field(default_factory=list)
    """The decoder's own; here the embedded latent tokens of the last frames, ``(B, up to W - 1, L, C)``."""


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

    def zero_output(self) -> None:
        """Makes the layer return zeros."""
        nn.init.zeros_(self.proj.weight)

    def forward(self, patches: Tensor, history: Tensor, visible: Tensor) -> Tensor:
        """``patches (N, P, C)``, ``history (N, W, L, C)``, ``visible (N, W)`` -> ``(N, P, C)``."""
        q = rearrange(self.query(self.norm(patches)), "n p (h k) -> n h p k", h=self.num_heads)
        k, v = self.key_value(self.history_norm(history)).chunk(2, dim=-1)  # (N, W, L, C) each
        k = rearrange(k + self.lag_embedding, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        v = rearrange(v, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        mask = repeat(visible, "n w -> n 1 1 (w l)", l=history.shape[2])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (N, H, P, K)
        return self.proj(rearrange(mixed, "n h p k -> n p (h k)"))  # (N, P, C)


def sliding_windows(tokens: Tensor, window: int, cache: DecoderCache | None) -> tuple[Tensor, Tensor]:
    """The latent tokens that each frame reads: those of the last W frames, the frame itself included.

    Args:
        tokens: Embedded latent tokens ``(B, F, L, C)``.
        window: W.
        cache: Earlier frames, if any; the new ones are added to it.

    Returns:
        ``(N, W, L, C)``, and bool ``(N, W)``: which of the W frames exist.
    """
    batch, frames = tokens.shape[:2]
    past = cache.tensors[0] if cache is not None and cache.tensors else tokens[:, :0]
    available = torch.cat([past, tokens], dim=1)  # (B, past + F, L, C)
    if cache is not None:
        cache.tensors = [available[:, max(available.shape[1] - window + 1, 0) :].detach()]
    missing = window - 1 - past.shape[1]
    padded = nn.functional.pad(available, (0, 0, 0, 0, missing, 0))  # (B, W - 1 + F, L, C)
    windows = rearrange(padded.unfold(1, window, 1), "b f l c w -> (b f) w l c")
    slot = torch.arange(window, device=tokens.device)
    frame = torch.arange(frames, device=tokens.device)
    visible = slot >= missing - frame[:, None]  # (F, W)
    return windows, repeat(visible, "f w -> (b f) w", b=batch)
