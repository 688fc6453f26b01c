"""Configurations of the AR-VAE and of its discriminator."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ardiff.resolution import Resolution


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Sizes and options of the AR-VAE. The defaults are the paper's (Table 6)."""

    kind: Literal["standard"] = "standard"
    """Kind of model: ``standard``, or ``upstream`` for the authors' checkpoints, which has options of its own."""
    resolution: Resolution = Resolution(256, 256)
    """Height and width of a frame in pixels: one number, or [height, width]. Both are multiples of ``patch_size``."""
    buckets: tuple[Resolution, ...] = field(default=(), metadata={"omit_default": True})
    """Further shapes of frames, each [height, width]. Set by training with ``clips.buckets``."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    num_tokens: int = 32
    """Latent tokens per frame, L."""
    token_dim: int = 4
    """Width of a latent token, D."""
    width: int = 1024
    """Hidden width of encoder and decoder."""
    depth: int = 24
    """Blocks in the encoder, and again in the decoder."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the model width."""
    temporal_window: int = 16
    """Frames, the current one included, whose latent tokens the decoder reads to decode a frame."""
    temporal: Literal["window", "none"] = "window"
    """``window``: each decoded frame reads the latent tokens of the last ``temporal_window`` frames. ``none``: each
    frame is decoded alone."""

    def __post_init__(self) -> None:
        # Python code may give numbers and lists.
        object.__setattr__(self, "resolution", Resolution.parse(self.resolution))
        object.__setattr__(self, "buckets", tuple(Resolution.parse(shape) for shape in self.buckets))
        sizes = (*self.resolution, self.patch_size, self.num_tokens, self.token_dim)
        if min(*sizes, self.width, self.depth, self.num_heads, self.temporal_window) < 1:
            raise ValueError(
                "resolution, patch_size, num_tokens, token_dim, width, depth, num_heads and temporal_window must be at "
                "least 1"
            )
        for shape in self.shapes:
            if any(side < 1 or side % self.patch_size for side in shape):
                raise ValueError(f"resolution {shape.plain} must be a multiple of patch_size {self.patch_size}")
        if len(set(self.shapes)) < len(self.shapes):
            raise ValueError(f"resolution and buckets must be different shapes, got {', '.join(map(str, self.shapes))}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} and of 4")

    @property
    def shapes(self) -> tuple[Resolution, ...]:
        """All shapes of frames that the model knows; the first is the default."""
        return (self.resolution, *self.buckets)

    def check_shape(self, shape: Resolution) -> None:
        """Raises ValueError if the model does not know frames of ``shape``."""
        if shape not in self.shapes:
            known = ", ".join(map(str, self.shapes))
            raise ValueError(f"the AR-VAE knows frames of {known} (height x width), got {shape}")

    @property
    def described_shapes(self) -> list[list[int]]:
        """The shapes, if there are several, for the description of latents."""
        return [list(shape) for shape in self.shapes] if self.buckets else []

    def patch_grid(self, shape: Resolution | None = None) -> tuple[int, int]:
        """Rows and columns of patches in a frame of ``shape``, by default of ``resolution``."""
        height, width = shape or self.resolution
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a frame of ``resolution``."""
        return math.prod(self.patch_grid())

    @property
    def unit_latents(self) -> bool:
        """Whether latent tokens have length 1. Then there is nothing to normalise before diffusion."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Sizes of the discriminator. The defaults score patches of 70 x 70 pixels, as is usual."""

    width: int = 64
    """Channels of the first layer. They double with every halving of the resolution, up to eightfold."""
    depth: int = 3
    """Layers that halve the resolution."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError("width and depth of the discriminator must be at least 1")
