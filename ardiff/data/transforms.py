"""Conversion between stored pixels and model inputs. Shapes: any leading axes, H W pixels, 3 colours."""

import torch
from einops import rearrange
from torch import Tensor


def to_unit(video: Tensor) -> Tensor:
    """uint8 ``(..., H, W, 3)`` to float32 ``(..., 3, H, W)`` in [-1, 1]."""
    return rearrange(video.float() / 127.5 - 1.0, "... h w c -> ... c h w")


def to_uint8(video: Tensor) -> Tensor:
    """Float ``(..., 3, H, W)`` in [-1, 1] to uint8 ``(..., H, W, 3)``; values outside are clamped."""
    pixels = ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c")
