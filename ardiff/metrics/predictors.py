"""Baselines of video prediction, which need no training.

Shapes: k given frames, n predicted frames, H W pixels.
"""

from collections.abc import Callable

import numpy as np
from einops import repeat

REACH = 8
"""The largest motion in pixels between two frames, in y and in x, that :func:`constant_velocity` finds."""
THRESHOLD = 32
"""Brightness of 255 above which a pixel belongs to an object."""


def last_frame(given: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last given frame, uint8 ``(k, H, W, 3)`` to ``(n, H, W, 3)``, with n = ``count``."""
    return repeat(given[-1], "h w c -> n h w c", n=count)


def constant_velocity(given: np.ndarray, count: int) -> np.ndarray:
    """Moves each object of the last given frame on, uint8 ``(k, H, W, 3)`` to ``(n, H, W, 3)``, with n = ``count``.

    An object is a connected region of pixels that are not dark, so objects that touch are one. Its velocity is the
    shift by whole pixels after which the frame before matches it best. It leaves the frame at the edge.
    """
    previous, last = given[-2], given[-1]
    labels = regions(last.mean(axis=-1) > THRESHOLD)
    objects = []
    for label in np.unique(labels[labels > 0]):
        content = np.where((labels == label)[..., None], last, 0)
        objects.append((content, _velocity(previous, content)))
    frames = np.zeros((count, *last.shape), np.uint8)
    for step, frame in enumerate(frames, 1):
        for content, (y, x) in objects:
            np.maximum(frame, _shifted(content, step * y, step * x), out=frame)
    return frames


BASELINES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "last-frame": last_frame,
    "constant-velocity": constant_velocity,
}
"""The baselines by the name of their set."""


def regions(mask: np.ndarray) -> np.ndarray:
    """A number above 0 for the pixels of each connected region of a mask ``(H, W)``, diagonals included; 0 outside."""
    from scipy import ndimage  # comes with the jobs, not with the method

    labels: np.ndarray = ndimage.label(mask, structure=np.ones((3, 3)))[0]
    return labels


def _velocity(previous: np.ndarray, content: np.ndarray) -> tuple[int, int]:
    """The shift of y and x after which ``previous`` matches the pixels of an object best; the shortest of equals."""
    inside = content.any(axis=-1)
    shifts = sorted(
        ((y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)),
        key=lambda s: s[0] ** 2 + s[1] ** 2,
    )
    wanted = content[inside].astype(np.int64)
    errors = [((_shifted(previous, y, x)[inside] - wanted) ** 2).sum() for y, x in shifts]
    return shifts[int(np.argmin(errors))]


def _shifted(frame: np.ndarray, y: int, x: int) -> np.ndarray:
    """A frame ``(H, W, 3)`` moved by y and x pixels; black moves in."""
    height, width = frame.shape[:2]
    moved = np.zeros_like(frame)
    if abs(y) < height and abs(x) < width:
        source = frame[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
        moved[max(0, y) : max(0, y) + source.shape[0], max(0, x) : max(0, x) + source.shape[1]] = source
    return moved
