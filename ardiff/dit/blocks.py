"""Building blocks of the AR-DiT: transformer blocks, final layer and timestep embedder.

Shapes: N packed frames (or whole sequences, if modulations differ from token to token), L tokens, D latent width,
C model width, H heads, K head width, P prompts, M text tokens.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.dit.config import DiTConfig
from ardiff.layers import Attend, AttendText, Mlp, Rotation, SelfAttention


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the frame's timestep and class (adaLN-zero).

    A modulation ``(N, 1, 6 C)`` holds for all tokens of a frame; ``(N, L, 6 C)`` differs from token to token.
    """

    computed_ahead: tuple[str, ...] = ("modulation",)
    """Submodules that the model evaluates for all blocks at once, before the first block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio)
        self.modulation_width = 6 * width
        self.modulation = nn.Linear(width, self.modulation_width)

    def forward(self, x: Tensor, modulation: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """``x (N, L, C)``, ``modulation (N, 1, 6 C)``, ``rotation`` of the N frames -> ``(N, L, C)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, C) each
        q, k, v = self.before_attention(x, shift1, scale1, rotation)  # (N, H, L, K) each
        return self.after_attention(x, attend(q, k, v), gate1, shift2, scale2, gate2)  # (N, L, C)

    def before_attention(
        self, x: Tensor, shift: Tensor, scale: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x (N, L, C)``, ``(N, H, L, K)`` each."""
        return self.attention.project(modulate(self.norm1(x), shift, scale), rotation)

    def after_attention(
        self, x: Tensor, mixed: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor
    ) -> Tensor:
        """Adds the attention's output, from mixed values ``(N, H, L, K)``, then the MLP's: ``(N, L, C)``."""
        x = torch.addcmul(x, gate1, self.attention.merge(mixed))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift, scale)))


class CrossAttention(nn.Module):
    """Multi-head attention from frame tokens to text tokens, ``softmax(q k^T / sqrt(K)) v`` (Vaswani et al., 2017,
    Eq. 1). The caller passes the attention function, which holds the keys and values of the prompts."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def query(self, x: Tensor) -> Tensor:
        """Queries ``(N, H, L, K)`` of ``x (N, L, C)``."""
        return rearrange(self.q(x), "n l (h k) -> n h l k", h=self.num_heads)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(P, H, M, K)`` of embedded prompts ``(P, M, C)``."""
        k, v = rearrange(self.kv(text), "p m (two h k) -> two p h m k", two=2, h=self.num_heads)
        return k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """The layer's output ``(N, L, C)`` from mixed values ``(N, H, L, K)``."""
        return self.proj(rearrange(mixed, "n h l k -> n l (h k)"))


class TextBlock(DiTBlock):
    """A block that also reads text: cross-attention between self-attention and MLP, as in PixArt-alpha (Chen et al.,
    2023) and Latte (Ma et al., 2024). Its queries are normed; it is neither modulated nor gated, and its output starts
    at zero."""

    computed_ahead = (*DiTBlock.computed_ahead, "text_attention.kv")

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.text_norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.text_attention = CrossAttention(config.width, config.num_heads)

    def forward(  # type: ignore[override]
        self, x: Tensor, modulation: Tensor, rotation: Rotation | None, attend: Attend, attend_text: AttendText
    ) -> Tensor:
        """``x (N, L, C)``, ``modulation (N, 1, 6 C)``, ``rotation`` of the N frames -> ``(N, L, C)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, C) each
        q, k, v = self.before_attention(x, shift1, scale1, rotation)  # (N, H, L, K) each
        x, q = self.before_text(x, attend(q, k, v), gate1)  # (N, L, C), (N, H, L, K)
        return self.after_text(x, attend_text(q), shift2, scale2, gate2)  # (N, L, C)

    def before_text(self, x: Tensor, mixed: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the self-attention's output, from mixed values ``(N, H, L, K)``: ``(N, L, C)`` and queries to text."""
        x = torch.addcmul(x, gate, self.attention.merge(mixed))
        return x, self.text_attention.query(self.text_norm(x))

    def after_text(self, x: Tensor, mixed: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Adds the cross-attention's output, from mixed values ``(N, H, L, K)``, then the MLP's: ``(N, L, C)``."""
        x = x + self.text_attention.merge(mixed)
        return torch.addcmul(x, gate, self.mlp(modulate(self.norm2(x), shift, scale)))


class FinalLayer(nn.Module):
    """The final norm, shifted and scaled by timestep and class, and the projection to latents."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation_width = 2 * config.width
        self.modulation: nn.Module = nn.Linear(config.width, self.modulation_width)
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.project = nn.Linear(config.width, config.token_dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x (N, L, C)``, ``modulation (N, 1, 2 C)`` -> ``(N, L, D)``."""
        shift, scale = modulation.chunk(2, dim=-1)  # (N, 1, C) each
        return self.project(modulate(self.norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``, the adaLN modulation; ``x (N, L, C)``, the others ``(N, 1, C)``."""
    return torch.addcmul(shift, x, 1 + scale)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep and a two-layer MLP, ``(N,) -> (N, C)``."""

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.fc1 = nn.Linear(num_features, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.num_features // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)  # (half,)
        angles = timesteps.double()[:, None] * rates  # (N, half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)  # (N, num_features)
        return self.fc2(nn.functional.silu(self.fc1(features)))  # (N, C)
