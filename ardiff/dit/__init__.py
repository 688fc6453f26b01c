"""The causal Diffusion Transformer."""

from ardiff.dit.model import DiT, DiTBlock, DiTConfig

__all__ = ["DiT", "DiTBlock", "DiTConfig"]
