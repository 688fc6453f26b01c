"""From uint8 frames to what a feature network sees. Published scores differ by how frames are resized, so each way has
its name and is part of a score's protocol.

Shapes: N frames, H W pixels, S the side of the square that the network takes.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

Resize = Literal["bilinear", "tf-bilinear", "bicubic-antialias"]
Range = Literal["[-1, 1]", "(x - 128) / 128", "minus mean RGB"]


def resize_frames(frames: Tensor, size: int, how: Resize) -> Tensor:
    """Frames as floats, stretched to a square.

    ``bilinear``: half-pixel centres, no antialiasing; StyleGAN-V, TATS and VideoGPT. ``tf-bilinear``: TensorFlow 1's,
    whose first pixels coincide and whose last are repeated; FID's graph and torch-fidelity. ``bicubic-antialias``:
    Pillow's bicubic filter on floating-point channels, not rounded or clipped; the AR-Diffusion authors and clean-fid.

    Args:
        frames: uint8 ``(N, H, W, 3)``.
        size: Side of the square in pixels, S.

    Returns:
        float32 ``(N, 3, S, S)`` of 0 to 255, on the frames' device; bicubic overshoots a little.

    Raises:
        ValueError: Another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames (N, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    pixels = rearrange(frames, "n h w c -> n c h w").float()
    if pixels.shape[2:] == (size, size):
        return pixels
    match how:
        case "bilinear":
            return nn.functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
        case "bicubic-antialias":
            # In float32 the filter's weights themselves are off by 1e-5.
            exact = nn.functional.interpolate(pixels.double(), (size, size), mode="bicubic", antialias=True)
            return exact.float()
        case "tf-bilinear":
            return _along(_along(pixels, size, -2), size, -1)
        case _:
            raise ValueError(f"unknown way to resize: {how!r}")


def scale_range(pixels: Tensor, how: Range, mean_rgb: tuple[float, float, float] | None = None) -> Tensor:
    """Pixels ``(N, 3, S, S)`` of 0 to 255 in the range that a network was trained on."""
    match how:
        case "[-1, 1]":
            return pixels / 127.5 - 1.0
        case "(x - 128) / 128":
            return (pixels - 128.0) / 128.0
        case "minus mean RGB":
            assert mean_rgb is not None
            return pixels - pixels.new_tensor(mean_rgb)[:, None, None]
        case _:
            raise ValueError(f"unknown range: {how!r}")


def _along(x: Tensor, size: int, axis: int) -> Tensor:
    """Linear interpolation along one axis at the places ``i * length / size``, the last pixel repeated."""
    length = x.shape[axis]
    places = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
    low = places.floor().long()
    high = (low + 1).clamp(max=length - 1)
    weight = places - low
    weight = weight if axis == -1 else weight[:, None]
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
