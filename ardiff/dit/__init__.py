"""The causal Diffusion Transformer."""

from ardiff.dit.blocks import DiTBlock
from ardiff.dit.model import DiT, DiTConfig

__all__ = ["DiT", "DiTBlock", "DiTConfig"]
