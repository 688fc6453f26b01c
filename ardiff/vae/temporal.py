"""How a decoded frame reads the frames before it.

Shapes: B batch, F frames, N = B F packed frames, P patches a frame, L latent tokens, C width, W frames of the temporal
window, M frames of a clip that are known, H heads, K head width.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.vae.config import AutoencoderConfig

Known = tuple[Tensor, Tensor]
"""What a layer remembers of a clip: its patches ``(B, M, P, C)`` and latent tokens ``(B, M, L, C)``."""


@dataclass(slots=True)
class DecoderCache:
    """What decoding the next frames needs of the frames before; its size does not grow with the video.

    With ``temporal=window``, ``tokens`` is the embedded latent tokens ``(B, up to W - 1, L, C)``, or None before the
    first frame. With ``temporal=clip``, ``clip`` is what each layer knows of the clip begun, up to W - 1 frames.
    """

    tokens: Tensor | None = None
    clip: list[Known] = field(default_factory=list)


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
        """Makes it add nothing, whatever it reads."""
        nn.init.zeros_(self.proj.weight)

    def forward(self, patches: Tensor, history: Tensor, visible: Tensor) -> Tensor:
        """``patches (N, P, C)``, ``history (N, W, L, C)``, ``visible (N, W)`` -> ``(N, P, C)``."""
        q = rearrange(self.query(self.norm(patches)), "n p (h k) -> n h p k", h=self.num_heads)
        k, v = self.key_value(self.history_norm(history)).chunk(2, dim=-1)  # (N, W, L, C) each
        k = rearrange(k + self.lag_embedding, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        v = rearrange(v, "n w l (h k) -> n h (w l) k", h=self.num_heads)
        mask = repeat(visible, "n w -> n 1 1 (w l)", l=history.shape[2])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (N, H, P, K)
        return self.proj(rearrange(mixed, "n h p k -> n p (h k)"))


class ClipAttention(nn.Module):
    """What the authors' decoder does before each block, within a clip of W frames; its output starts at zero.

    First each patch reads the same patch of earlier frames (fine), then patches and latent tokens read the latent
    tokens of earlier frames (coarse), in both their own frame included. Attention is causal.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.fine_norm = nn.LayerNorm(config.width)
        self.fine = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(config.width) for _ in range(3))
        self.coarse = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)

    def zero_output(self) -> None:
        """Makes it add nothing, whatever it reads."""
        for attention in (self.fine, self.coarse):
            nn.init.zeros_(attention.out_proj.weight)

    def forward(self, patches: Tensor, tokens: Tensor, past: Known | None = None) -> tuple[Tensor, Tensor, Known]:
        """Patches ``(B, F, P, C)`` and latent tokens ``(B, F, L, C)`` after reading, and all that is known then.

        They go on from ``past``, which is what an earlier call said is known.
        """
        known = (patches, tokens)
        if past is not None:
            known = (torch.cat([past[0], patches], dim=1), torch.cat([past[1], tokens], dim=1))
        frames, seen = patches.shape[1], known[0].shape[1]
        frame = torch.arange(seen, device=patches.device)
        hidden = frame > frame[seen - frames :, None]  # (F, M)

        pack = "b f p c -> (b p) f c"
        query, keys = (rearrange(self.fine_norm(x), pack) for x in (patches, known[0]))
        read, _ = self.fine(query, keys, keys, attn_mask=hidden, need_weights=False)
        patches = patches + rearrange(read, "(b p) f c -> b f p c", b=len(patches))

        x = torch.cat([tokens, patches], dim=2)  # (B, F, L + P, C)
        query = rearrange(self.query_norm(x), "b f q c -> b (f q) c")
        keys, values = (rearrange(norm(known[1]), "b m l c -> b (m l) c") for norm in (self.key_norm, self.value_norm))
        mask = repeat(hidden, "f m -> (f q) (m l)", q=x.shape[2], l=tokens.shape[2])
        read, _ = self.coarse(query, keys, values, attn_mask=mask, need_weights=False)
        x = x + rearrange(read, "b (f q) c -> b f q c", f=frames)
        tokens, patches = x.split([tokens.shape[2], patches.shape[2]], dim=2)
        return patches, tokens, known
