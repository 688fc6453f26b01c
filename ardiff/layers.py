"""Transformer layers that the AR-VAE and the AR-DiT share.

Shapes: N frames (batch and time packed), L tokens, C width, H heads, K head width, P positions.
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over frames: takes query, key and value ``(N, H, L, K)``, returns the mixed values ``(N, H, L, K)``."""

AttendText = Callable[[Tensor], Tensor]
"""Attention to text: takes queries ``(N, H, L, K)``, returns the mixed values ``(N, H, L, K)``."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, ``(N, 1, 1, pairs)`` each; see :func:`rotary`."""


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, ``(..., C) -> (..., C)``."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.approximate: Literal["tanh", "none"] = "tanh"  # of the GELU; "none" computes it exactly
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate=self.approximate))


class SelfAttention(nn.Module):
    """Multi-head self-attention. The caller passes the attention function, which holds masks and caches.

    With a ``rotation``, queries and keys are rotated by it (rotary positions, Su et al., 2021).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend, rotation: Rotation | None = None) -> Tensor:
        """``x (N, L, C) -> (N, L, C)``."""
        return self.merge(attend(*self.project(x, rotation)))

    def project(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x (N, L, C)``, ``(N, H, L, K)`` each."""
        qkv = rearrange(self.qkv(x), "n l (three h k) -> three n h l k", three=3, h=self.num_heads)
        q, k = qkv[:2] if rotation is None else rotate(qkv[:2], rotation)
        return q, k, qkv[2]

    def merge(self, mixed: Tensor) -> Tensor:
        """The layer's output ``(N, L, C)`` from mixed values ``(N, H, L, K)``."""
        return self.proj(rearrange(mixed, "n h l k -> n l (h k)"))


def attend_within_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention among the tokens of each frame."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


def rotary(positions: Tensor, pairs: int, dtype: torch.dtype, base: float = 10000.0) -> Rotation:
    """The rotation of frame positions ``(N,)``, with one frequency for each of the ``pairs`` channel pairs.

    Angles are computed in float64, so that far frames stay exact.
    """
    rates = base ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / max(pairs, 1))
    angles = rearrange(positions.double()[:, None] * rates, "n p -> n 1 1 p")
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the first ``2 * pairs`` channels of ``x (..., N, H, L, K)`` and leaves the rest."""
    cos, sin = rotation
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    rotated = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat([*rotated, rest], dim=-1)


def sincos_positions(positions: Tensor, width: int) -> Tensor:
    """Fixed sine-cosine embeddings ``(P, width)`` of positions ``(P,)``: sines in the first half, then cosines."""
    half = width // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_grid(height: int, width: int, channels: int) -> Tensor:
    """Sine-cosine embeddings of a 2-D grid, ``(height * width, channels)``: first half row, second half column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = [sincos_positions(axis.flatten(), channels // 2) for axis in (rows, columns)]
    return torch.cat(halves, dim=1)


def init_linear(module: nn.Module) -> None:
    """Initialises linear layers as DiT does, Xavier-uniform weights and zero biases. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
