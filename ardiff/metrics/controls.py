"""Controls: real videos that are damaged on purpose. A sound score ranks each below the real videos.

Shapes: B videos, F frames, H W pixels. Videos are uint8 ``(B, F, H, W, 3)``.
"""

from collections.abc import Callable

import numpy as np
from einops import rearrange, repeat


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


NEAREST = 2
"""Frames among which :func:`identity_flicker` draws."""
COLOUR_WEIGHT = 10.0
"""Pixels of distance that the whole length of a colour counts in :func:`identity_flicker`."""
SHIFT_WEIGHT = 0.02
"""Pixels below one of distance that a shift by a whole pixel counts in :func:`identity_flicker`."""


def identity_flicker(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Control whose frames are each right and whose identity flickers. uint8 ``(B, F, H, W, 3)`` in and out.

    Every frame comes from another video than the frame before it, and never from the video that it replaces. It is
    shifted by whole pixels so that the centre of its content lies where the replaced frame has it. So position and
    motion stay equal to a fraction of a pixel, and what moves changes. The frame is drawn from the ``NEAREST`` of all
    frames of the other videos: those with the most similar colour of the content, the smallest remainder of the shift
    below a pixel and, with less weight, the smallest shift, since the last pixel extends the edges. No labels are
    needed. With four balanced classes, one frame in four shows the right one by chance. With two videos, all frames
    come from the other one.

    Raises ValueError for fewer than two videos.
    """
    count, length, height, width = _batch(videos).shape[:4]
    if count < 2:
        raise ValueError(f"identity_flicker needs at least 2 videos, got {videos.shape}")
    centre, colour = (rearrange(values, "b f c -> (b f) c") for values in _content(videos))
    frames, source = rearrange(videos, "b f h w c -> (b f) h w c"), np.arange(count * length) // length
    flickering = np.empty_like(frames)
    previous = -1
    for index, video in enumerate(source):
        shift = centre[index] - centre  # (B F, 2)
        cost = np.abs(shift - np.round(shift)).sum(axis=1) + SHIFT_WEIGHT * np.abs(shift).sum(axis=1)
        cost += COLOUR_WEIGHT * np.linalg.norm(colour[index] - colour, axis=1)
        cost[source == video] = np.inf
        if index % length and count > 2:
            cost[source == previous] = np.inf
        chosen = generator.choice(np.argsort(cost, kind="stable")[:NEAREST])
        previous = source[chosen]
        down, right = np.round(shift[chosen]).astype(int)
        y = np.clip(np.arange(height) - down, 0, height - 1)
        x = np.clip(np.arange(width) - right, 0, width - 1)
        flickering[index] = frames[chosen][y[:, None], x]
    return rearrange(flickering, "(b f) h w c -> b f h w c", b=count)


def _content(videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the content of each frame is, and its colour, for uint8 ``(B, F, H, W, 3)``.

    Content is what differs from the video's median colour; the squared difference is a pixel's weight.

    Returns:
        The centre of the content, y and x in pixels, float64 ``(B, F, 2)``; the middle of a frame without content. The
        direction in which the content's colour differs from the median, of length 1 or 0, float64 ``(B, F, 3)``.
    """
    contrast = videos - np.median(videos, axis=(1, 2, 3), keepdims=True)  # (B, F, H, W, 3)
    weight = (contrast**2).sum(axis=-1)  # (B, F, H, W)
    total = weight.sum(axis=(2, 3))  # (B, F)
    weight = np.where(total[..., None, None] > 0, weight, 1.0)
    rows, columns = weight.sum(axis=3), weight.sum(axis=2)
    y = (rows @ np.arange(weight.shape[2])) / rows.sum(axis=-1)
    x = (columns @ np.arange(weight.shape[3])) / columns.sum(axis=-1)
    colour = (contrast * weight[..., None]).sum(axis=(2, 3))
    length = np.linalg.norm(colour, axis=-1, keepdims=True)
    return np.stack([y, x], axis=-1), np.divide(colour, length, out=np.zeros_like(colour), where=length > 0)


CONTROLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "blur": lambda videos, _: blur(videos),
    "jitter": jitter,
    "frozen": frozen,
    "content swap": content_swap,
    "identity flicker": identity_flicker,
    "shuffled frames": shuffled_frames,
    "noise": noise,
}
"""The controls that stand beside a score, in the order in which a sound score ranks them."""


def _batch(videos: np.ndarray) -> np.ndarray:
    if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or videos.size == 0:
        raise ValueError(f"expected uint8 videos (B, F, H, W, 3), got {videos.dtype} {videos.shape}")
    return videos
