"""The parts of the AR-DiT: a block, modulated by timestep and class, and the timestep's embedding.

Shapes: N packed frames (or whole sequences, if modulations differ from token to token), L tokens, C width, H heads, K
head width.
"""

import torch
from torch import Tensor, nn

from ardiff.dit.config import DiTConfig
from ardiff.layers import Attend, Mlp, Rotation, SelfAttention


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the frame's timestep and class (adaLN-zero).

    Modulations may differ from token to token: ``(N, L, 6 C)`` where ``(N, 1, 6 C)`` stands.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.normed_residual = config.residual == "normed"
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, modulation: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """``x (N, L, C)``, ``modulation (N, 1, 6 C)``, ``rotation`` of the N frames -> ``(N, L, C)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, C) each
        q, k, v = self.before_attention(x, shift1, scale1, rotation)
        return self.after_attention(x, attend(q, k, v), gate1, shift2, scale2, gate2)

    def before_attention(
        self, x: Tensor, shift: Tensor, scale: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``(N, H, L, K)`` each."""
        return self.attention.project(modulate(self.norm1(x), shift, scale), rotation)

    def after_attention(
        self, x: Tensor, mixed: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor
    ) -> Tensor:
        """Adds the attention's output ``mixed (N, H, L, K)``, then the MLP's; ``(N, L, C)``."""
        x = self.norm1(x) if self.normed_residual else x
        x = torch.addcmul(x, gate1, self.attention.merge(mixed))
        normed = self.norm2(x)
        x = normed if self.normed_residual else x
        return torch.addcmul(x, gate2, self.mlp(modulate(normed, shift, scale)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``: what adaLN does after a norm; ``x (N, L, C)``, the others ``(N, 1, C)``."""
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
        rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
        angles = timesteps.double()[:, None] * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(features)))
