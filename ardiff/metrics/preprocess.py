"""From uint8 frames to the inputs of a feature network.

Published scores differ by how frames are resized, so the method of resizing is part of a score's protocol.

Shapes: N frames, H W pixels, S the side of the square that the network takes.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.resolution import Resolution

Resize = Literal["bilinear", "tf-bilinear", "bicubic-antialias"]
Range = Literal["[-1, 1]", "[0, 1]", "(x - 128) / 128", "minus mean RGB", "ImageNet", "CLIP"]
NORMALIZED = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of RGB of 0 to 1, by the name of the range."""


def resize_frames(frames: Tensor, size: Resolution, method: Resize) -> Tensor:
    """Resizes frames to floats; the aspect ratio is not kept.

    ``bilinear``: half-pixel centres, no antialiasing (StyleGAN-V, TATS, VideoGPT). ``tf-bilinear``: TensorFlow 1's, in
    which the first pixels coincide and the last pixel repeats (FID's graph, torch-fidelity). ``bicubic-antialias``:
    Pillow's bicubic filter on floating-point channels without rounding or clipping (AR-Diffusion's authors; clean-fid
    also clips to 0 to 255).

    Args:
        frames: uint8 ``(N, H, W, 3)``.
        size: Height and width in pixels.

    Returns:
        float32 ``(N, 3, H, W)`` of 0 to 255, on the frames' device; bicubic overshoots a little.

    Raises:
        ValueError: Another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames (N, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    pixels = rearrange(frames, "n h w c -> n c h w").float()
    if tuple(pixels.shape[2:]) == size:
        return pixels
    match method:
        case "bilinear":
            return nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        case "bicubic-antialias":
            # In float32 the filter's weights have an error of 1e-5.
            exact = nn.functional.interpolate(pixels.double(), size, mode="bicubic", antialias=True)
            return exact.float()
        case "tf-bilinear":
            return _along(_along(pixels, size.height, -2), size.width, -1)
        case _:
            raise ValueError(f"unknown resize method: {method!r}")


def resize_to_uint8(frames: Tensor, size: Resolution) -> Tensor:
    """Frames uint8 ``(N, H, W, 3)`` stretched to ``size``, bicubic with antialiasing, rounded."""
    if tuple(frames.shape[1:3]) == size:
        return frames
    pixels = resize_frames(frames, size, "bicubic-antialias").round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "n c h w -> n h w c")


def scale_range(pixels: Tensor, value_range: Range, mean_rgb: tuple[float, float, float] | None = None) -> Tensor:
    """Scales pixels ``(N, 3, S, S)`` of 0 to 255 to the range that a network was trained on."""
    match value_range:
        case "[-1, 1]":
            return pixels / 127.5 - 1.0
        case "[0, 1]":
            return pixels / 255.0
        case "(x - 128) / 128":
            return (pixels - 128.0) / 128.0
        case "ImageNet" | "CLIP":
            mean, deviation = (pixels.new_tensor(rgb)[:, None, None] for rgb in NORMALIZED[value_range])
            return (pixels / 255.0 - mean) / deviation
        case "minus mean RGB":
            assert mean_rgb is not None
            return pixels - pixels.new_tensor(mean_rgb)[:, None, None]
        case _:
            raise ValueError(f"unknown range: {value_range!r}")


def _along(x: Tensor, size: int, axis: int) -> Tensor:
    """Linear interpolation along one axis at the positions ``i * length / size``; the last pixel repeats."""
    length = x.shape[axis]
    positions = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
    low = positions.floor().long()
    high = (low + 1).clamp(max=length - 1)
    weight = positions - low
    weight = weight if axis == -1 else weight[:, None]
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
