"""Transformer parts that the AR-VAE and the AR-DiT share.

Shapes: N frames (batch and time packed), L tokens, C width, H heads, K head width.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over frames: takes query, key, value ``(N, H, L, K)``, returns the mixed values ``(N, H, L, K)``."""


class Mlp(nn.Module):
    """Two linear layers with the tanh-approximated GELU between them, ``(..., C) -> (..., C)``."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Multi-head self-attention whose mixing is done by a function, so that masks and caches live with the caller.

    With ``rotary_share`` above 0 that share of every head is rotated by the token's frame position (Su et al., 2021).
    """

    def __init__(self, width: int, num_heads: int, rotary_share: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rotary_pairs = int(width // num_heads * rotary_share) // 2

    def forward(self, x: Tensor, attend: Attend, positions: Tensor | None = None) -> Tensor:
        """Mixes ``x (N, L, C)`` by ``attend``; ``positions (N,)`` are frame indices, needed with rotary positions."""
        q, k, v = rearrange(self.qkv(x), "n l (three h k) -> three n h l k", three=3, h=self.num_heads)
        if self.rotary_pairs:
            if positions is None:
                raise ValueError("rotary attention needs the frame positions")
            angles = rotary_angles(positions, self.rotary_pairs)
            q, k = rotate(q, angles), rotate(k, angles)
        return self.proj(rearrange(attend(q, k, v), "n h l k -> n l (h k)"))


def attend_within_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention among the tokens of each frame."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


def rotary_angles(positions: Tensor, pairs: int, base: float = 10000.0) -> Tensor:
    """The angles ``(N, 1, 1, pairs)`` of frame positions ``(N,)``, in float64, so that far frames stay exact."""
    rates = base ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / max(pairs, 1))
    return rearrange(positions.double()[:, None] * rates, "n p -> n 1 1 p")


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the first ``2 * pairs`` channels of ``x (N, H, L, K)`` by ``angles (N, 1, 1, pairs)``."""
    pairs = angles.shape[-1]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def sincos_positions(positions: Tensor, width: int) -> Tensor:
    """Fixed sine-cosine embeddings ``(P, width)`` of positions ``(P,)``: sine half, then cosine half."""
    half = width // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_grid(height: int, width: int, channels: int) -> Tensor:
    """Sine-cosine embeddings of a 2-D grid, ``(height * width, channels)``: half the channels a row, half a column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = [sincos_positions(axis.flatten(), channels // 2) for axis in (rows, columns)]
    return torch.cat(halves, dim=1)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as in DiT; to be used with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
