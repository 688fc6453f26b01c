"""The causal Diffusion Transformer."""

from ardiff.dit.model import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
