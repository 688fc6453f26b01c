"""The AR-DiT, a causal Diffusion Transformer."""

from ardiff.dit.blocks import DiTBlock
from ardiff.dit.condition import TextTokens
from ardiff.dit.config import DiTConfig
from ardiff.dit.model import DiT

__all__ = ["DiT", "DiTBlock", "DiTConfig", "TextTokens"]
