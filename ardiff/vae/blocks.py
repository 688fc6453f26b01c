"""Building blocks that the AR-VAE's encoder and decoder share.

Shapes: N packed frames, H W pixels, P = h w patches per frame, p x q pixels of a patch, L latent tokens, C width.
"""

from einops import rearrange
from torch import Tensor, nn

from ardiff.layers import Mlp, SelfAttention, attend_within_frame
from ardiff.resolution import Resolution
from ardiff.vae.config import AutoencoderConfig


class FrameBlock(nn.Module):
    """A pre-norm transformer block with full attention inside each frame, ``(N, P + L, C) -> (N, P + L, C)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), attend_within_frame)  # (N, P + L, C)
        return x + self.mlp(self.norm2(x))  # (N, P + L, C)


def positions_for(config: AutoencoderConfig, positions: Tensor, shape: Resolution) -> Tensor:
    """The embeddings of the patches of frames of ``shape``, ``(P, C)``, from those for ``config.resolution``."""
    if shape == config.resolution:
        return positions
    return interpolated_positions(positions, config.patch_grid(), config.patch_grid(shape))


def interpolated_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The positions of patches ``(P, C)``, by rows and columns, interpolated to other rows and columns of patches.

    Bicubic, as Vision Transformers are fine-tuned at other resolutions (Dosovitskiy et al., 2021, Sec. 3.2). Both grids
    cover the whole frame, so a patch keeps about the embedding of its relative position.
    """
    grid = rearrange(positions.float(), "(h w) c -> 1 c h w", h=source[0], w=source[1])
    resized = nn.functional.interpolate(grid, target, mode="bicubic", align_corners=False)
    return rearrange(resized, "1 c h w -> (h w) c").to(positions.dtype)


def patchify(frames: Tensor, patch_size: int) -> Tensor:
    """Frames ``(N, 3, H, W)`` to flat patches ``(N, P, p q 3)``."""
    return rearrange(frames, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify` for frames with the rows and columns ``grid`` of patches."""
    p, (rows, columns) = patch_size, grid
    return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=rows, w=columns, p=p, q=p)
