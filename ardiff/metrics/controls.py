"""Controls: real videos that are damaged on purpose. A sound score ranks each below the real videos.

Shapes: B videos, F frames, H W pixels. Videos are uint8 ``(B, F, H, W, 3)``.
"""

from collections.abc import Callable

import numpy as np
from einops import repeat


def shuffled_frames(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Control without temporal order: each video's frames in random order. uint8 ``(B, F, H, W, 3)`` in and out."""
    count, length = _batch(videos).shape[:2]
    order = generator.permuted(repeat(np.arange(length), "f -> b f", b=count), axis=1)  # (B, F)
    return videos[np.arange(count)[:, None], order]


def frozen(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Control without motion: one random frame of each video, repeated. uint8 ``(B, F, H, W, 3)`` in and out."""
    count, length = _batch(videos).shape[:2]
    chosen = videos[np.arange(count), generator.integers(length, size=count)]  # (B, H, W, 3)
    return repeat(chosen, "b h w c -> b f h w c", f=length)


def noise(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Control without content: uniform noise of the videos' shape. uint8 ``(B, F, H, W, 3)`` in and out."""
    return generator.integers(256, size=_batch(videos).shape, dtype=np.uint8)


def blur(videos: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Control without detail: a Gaussian blur of H and W, ``sigma`` in pixels. uint8 ``(B, F, H, W, 3)`` in and out.

    The last pixel extends the edges. Raises ValueError unless ``sigma`` > 0.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    blurred = _batch(videos).astype(np.float64)
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (2, 3):
        size = videos.shape[axis]
        indices = np.clip(np.arange(size) + np.arange(-radius, radius + 1)[:, None], 0, size - 1)  # (taps, size)
        blurred = sum(tap * blurred.take(index, axis=axis) for tap, index in zip(kernel, indices, strict=True))
    return np.round(blurred).astype(np.uint8)


def jitter(videos: np.ndarray, generator: np.random.Generator, pixels: int = 1) -> np.ndarray:
    """Control with rough motion: frames shifted by up to ``pixels`` in y and x. uint8 ``(B, F, H, W, 3)`` in and out.

    The last pixel extends the edges. Raises ValueError unless ``pixels`` >= 1.
    """
    if pixels < 1:
        raise ValueError(f"pixels must be at least 1, not {pixels}")
    count, length, height, width = _batch(videos).shape[:4]
    shift = generator.integers(-pixels, pixels + 1, size=(2, count, length, 1))
    y = np.clip(np.arange(height) + shift[0], 0, height - 1)  # (B, F, H)
    x = np.clip(np.arange(width) + shift[1], 0, width - 1)  # (B, F, W)
    b, f = np.arange(count)[:, None, None, None], np.arange(length)[:, None, None]
    return videos[b, f, y[..., None], x[:, :, None]]


def content_swap(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Control without identity: the second half of each video is of another one. uint8 ``(B, F, H, W, 3)`` in and out.

    Raises ValueError for fewer than two videos or frames.
    """
    count, length = _batch(videos).shape[:2]
    if min(count, length) < 2:
        raise ValueError(f"content_swap needs at least 2 videos of 2 frames, got {videos.shape}")
    order = generator.permutation(count)
    swapped = videos.copy()
    swapped[order, length // 2 :] = videos[np.roll(order, 1), length // 2 :]
    return swapped


CONTROLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "content swap": content_swap,
    "jitter": jitter,
    "blur": lambda videos, _: blur(videos),
    "frozen": frozen,
    "shuffled frames": shuffled_frames,
    "noise": noise,
}
"""The controls that stand beside a score, in the order in which a sound score ranks them."""


def _batch(videos: np.ndarray) -> np.ndarray:
    if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or videos.size == 0:
        raise ValueError(f"expected uint8 videos (B, F, H, W, 3), got {videos.dtype} {videos.shape}")
    return videos
