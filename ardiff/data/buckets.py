"""Buckets: each video is fitted to the shape of frames that wastes the least of it, and to a length of clips.

Shapes: N videos, K shapes.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ardiff.data.config import ClipConfig
from ardiff.data.manifest import VideoRecord, lengths_at, usable
from ardiff.resolution import Resolution

MAX_RATIO = 3.0
"""The largest ratio of the sides of a shape that is chosen."""


def wasted(heights: np.ndarray, widths: np.ndarray, shapes: Sequence[Resolution]) -> np.ndarray:
    """The part of each video that is cropped when it is fitted to each shape, 0 to 1, ``(N, K)``."""
    video = np.log(widths / heights)[:, None]
    shape = np.log([shape.width / shape.height for shape in shapes])
    return 1.0 - np.exp(-np.abs(video - shape))


def assign(heights: np.ndarray, widths: np.ndarray, shapes: Sequence[Resolution]) -> np.ndarray:
    """The index of the shape that wastes the least of each video, int64 ``(N,)``; of equal ones the first."""
    return wasted(heights, widths, shapes).round(9).argmin(axis=1)


def shapes_of(videos: pa.Table, shapes: Sequence[Resolution]) -> np.ndarray:
    """The index of the shape of each row of a manifest, int64 ``(N,)``."""
    return assign(videos["height"].to_numpy(), videos["width"].to_numpy(), shapes)


def lengths_of(videos: pa.Table, clips: ClipConfig) -> np.ndarray:
    """The index in ``clips.of_each_length`` of the first length that each row of a manifest is long enough for, int64
    ``(N,)``; of videos that are too short for all, 0."""
    frames, rates = videos["num_frames"].to_numpy(), videos["fps"].to_numpy()
    fits = [lengths_at(frames, rates, each.fps) >= each.span for each in clips.of_each_length]
    return np.stack(fits).argmax(axis=0)


def training_videos(manifest: Sequence[VideoRecord], clips: ClipConfig) -> list[VideoRecord]:
    """The training videos that are long enough for one of the lengths of ``clips``, in their order.

    Raises DataError if there is none, as :func:`ardiff.data.manifest.usable`.
    """
    each_length = clips.of_each_length
    in_split = [record for record in manifest if (record.status, record.split) == ("ok", "train")]
    fitting = [r for r in in_split if any(r.length_at(each.fps) >= each.span for each in each_length)]
    return fitting or usable(manifest, "train", each_length[-1].span, each_length[-1].fps)


def choose(
    heights: np.ndarray, widths: np.ndarray, first: Resolution, count: int, patch_size: int
) -> tuple[Resolution, ...]:
    """Up to ``count`` shapes that, together with ``first``, waste the least of the videos in the mean.

    Candidates have about as many patches as ``first``, and never more. A shape to which no video belongs is left out.

    Args:
        heights: Of the videos in pixels, ``(N,)``.
        widths: Likewise.
        first: A shape that is there anyway.
        count: At most :data:`ardiff.data.config.MAX_AUTO`.
        patch_size: Both sides are multiples of it.
    """
    ratios, counts = np.unique(np.round(widths / heights, 3), return_counts=True)
    candidates = [shape for shape in _candidates(first, patch_size) if shape != first]
    count = min(count, len(candidates))
    losses = wasted(np.ones_like(ratios), ratios, [first, *candidates])  # (ratios, 1 + candidates)

    def loss(chosen: tuple[int, ...]) -> float:
        return float(counts @ losses[:, (0, *chosen)].min(axis=1))

    best = min(itertools.combinations(range(1, len(candidates) + 1), count), key=loss)
    chosen = [candidates[i - 1] for i in best]
    used = set(assign(heights, widths, [first, *chosen]).tolist())
    return tuple(shape for i, shape in enumerate(chosen, start=1) if i in used)


def _candidates(first: Resolution, patch_size: int) -> list[Resolution]:
    """For each number of rows the widest shape that has no more patches than ``first``, and the same turned."""
    patches = first.num_pixels // patch_size**2
    rows = range(1, math.isqrt(patches) + 1)
    wide = [Resolution(count * patch_size, patches // count * patch_size) for count in rows]
    return sorted(s for s in {*wide, *(shape.turned for shape in wide)} if max(s) <= MAX_RATIO * min(s))
