"""V-JEPA (Bardes et al. 2024), the network of JEDi: a Vision Transformer of clips and the attentive probe over it.

JEDi takes ViT-H/16 of 16 frames of 224x224, and the pooling of the probe trained on Something-Something v2. The
authors publish both as PyTorch checkpoints, ``vith16.pth.tar`` and ``ssv2-probe.pth.tar``. V-JEPA 2 is another network,
with rotary positions: :mod:`ardiff.metrics.networks.vjepa2`.

Shapes: B clips, T frames, N tokens, H heads, D width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.errors import ConfigError
from ardiff.metrics.registry import Extractor, State, register_network

FRAMES = 16
SIZE = 224
PATCH = (2, 16, 16)
"""Frames, height and width of a token."""


class VJEPA(nn.Module):
    """Features of clips. Parameters have the authors' names below ``encoder`` and ``pooler``.

    Args:
        width: Width of a token, D.
        depth: Blocks of the encoder.
        heads: Attention heads.
    """

    def __init__(self, width: int = 1280, depth: int = 32, heads: int = 16) -> None:
        super().__init__()
        self.encoder = _Encoder(width, depth, heads)
        self.pooler = _Pooler(width, heads)

    def forward(self, video: Tensor) -> Tensor:
        """float ``(B, 3, 16, 224, 224)``, normalised as ImageNet, to ``(B, D)``."""
        return self.pooler(self.encoder(video))


class _Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        tokens = FRAMES // PATCH[0] * (SIZE // PATCH[1]) * (SIZE // PATCH[2])
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))  # sines and cosines; files hold them
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, width, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video: Tensor) -> Tensor:
        patches = self.patch_embed.get_submodule("proj")(video)
        x = rearrange(patches, "b d t h w -> b (t h w) d") + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Pooler(nn.Module):
    """One learned query attends to all tokens. Its layer norms have PyTorch's epsilon, unlike the encoder's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.cross_attention_block = _CrossBlock(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` to ``(B, D)``."""
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)[:, 0]


class _CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.xattn = _CrossAttention(width, heads)
        self.mlp = _MLP(width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return self.proj(rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


def adopt(state: State) -> State | None:
    """The tensors of one of the authors' two files: the encoder's, or the probe's without its classifier."""
    if "backbone.pos_embed" in state:
        return {f"encoder.{key.removeprefix('backbone.')}": value for key, value in state.items()}
    if "pooler.query_tokens" in state and "linear.weight" in state:
        return {key: value for key, value in state.items() if key.startswith("pooler.")}
    return None


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row per clip: ``(n F, 3, 224, 224)`` to ``(n, 1, D)``."""
    return model(rearrange(frames, "(n f) c h w -> n c f h w", n=count))[:, None]


def _check_frames(num_frames: int) -> None:
    if num_frames != FRAMES:
        raise ConfigError(f"V-JEPA takes clips of {FRAMES} frames, not {num_frames}: give --frames {FRAMES}.")


VJEPA_EXTRACTOR = Extractor(
    name="vjepa",
    build=VJEPA,
    adopt=adopt,
    size=SIZE,
    value_range="ImageNet",
    features=_features,
    check_frames=_check_frames,
)
register_network(VJEPA_EXTRACTOR)
