"""Configuration of the AR-VAE and of its discriminator."""

from dataclasses import dataclass
from typing import Literal

PATCH_SIZE = 16
"""Patch size of TiTok's pixel decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Sizes of the AR-VAE. The defaults are the paper's (Table 6)."""

    resolution: int = 256
    """Height and width of a frame in pixels."""
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
    """Frames whose latent tokens a frame's patches may read in the decoder, the frame itself included; with
    ``temporal=clip``, frames of a clip."""
    temporal: Literal["window", "clip", "none"] = "window"
    """How the decoder reads earlier frames. ``window``: a frame's patches read the latent tokens of the last
    ``temporal_window`` frames. ``clip``: as the authors' decoder, see :class:`ardiff.vae.temporal.ClipAttention`; a
    longer video is decoded as clips that do not know each other. ``none``: every frame stands alone."""
    stem: Literal["plain", "titok"] = "plain"
    """``titok``: as in TiTok, on which the authors' AR-VAE builds: a class token, a norm before the first block,
    positions of their own for the encoder's latent tokens, and the exact GELU."""
    token_order: Literal["plain", "scrambled"] = "plain"
    """``scrambled``: before the moments, the encoder's output is read as if its channels lay where its tokens lie, as
    in TiTok and the authors' code; weights trained so need it."""
    pixels: Literal["linear", "convolutional"] = "linear"
    """What makes pixels of a decoded patch. ``convolutional``: TiTok's, which is for patches of 16 pixels."""
    pixel_range: Literal["signed", "unit"] = "signed"
    """Pixels that the networks themselves work on: [-1, 1] or, in TiTok, [0, 1]. Video in and out is in [-1, 1] in
    either case."""
    unit_latents: bool = False
    """Whether the decoder scales every latent token to length 1, as TiTok's; the diffusion model is then given tokens
    of length 1."""

    def __post_init__(self) -> None:
        sizes = (self.resolution, self.patch_size, self.num_tokens, self.token_dim)
        if min(*sizes, self.width, self.depth, self.num_heads, self.temporal_window) < 1:
            raise ValueError(
                "resolution, patch_size, num_tokens, token_dim, width, depth, num_heads and temporal_window must be at "
                "least 1"
            )
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} must be a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} and of 4")
        if self.pixels == "convolutional" and self.patch_size != PATCH_SIZE:
            raise ValueError(f"pixels=convolutional needs patch_size {PATCH_SIZE}, got {self.patch_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are the usual 70 x 70 patches."""

    width: int = 64
    """Channels of the first layer; they double with every halving of the frame, up to eightfold."""
    depth: int = 3
    """Layers that halve the frame."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise ValueError("width and depth of the discriminator must be at least 1")
