"""Recognises the shapes of the synthetic set, frame by frame, and measures how well a video keeps its shape.

Shapes: F frames, H W pixels, K classes. A video is uint8 ``(F, H, W, 3)``.
"""

from functools import lru_cache

import numpy as np

from ardiff.data.synthetic import CLASSES, signed_distance
from ardiff.metrics.tracking import MOTION_CHECKS, Tracking, motion_checks, track

MIN_OVERLAP = 0.6
"""Smallest overlap of a frame with a shape that it shows. Set on real synthetic clips only."""
NO_SHAPE = -1
"""The class of a frame or video that shows none of the shapes."""
SHAPE_MEASURES = ("frame identity", "neighbours alike", "motion", *MOTION_CHECKS, "recognised")
"""What :func:`shape_measures` measures."""


def frame_classes(tracking: Tracking) -> np.ndarray:
    """The index in ``CLASSES`` of the shape in each frame, int64 ``(F,)``; -1 for none of them.

    The method is not trained. It compares the cover of each frame that has one object with every shape, drawn at the
    same centroid and area. The frame shows the shape with the largest overlap (intersection over union of covers) if
    that is at least ``MIN_OVERLAP``.
    """
    seen = tracking.one_object
    classes = np.full(len(seen), NO_SHAPE)
    if seen.any():
        cover, centroid, area = tracking.cover[seen], tracking.centroid[seen], tracking.area[seen]
        overlaps = np.stack(
            [_overlap(cover, centroid, area, shape) for shape in CLASSES]
        )  # (K, frames with one object)
        classes[seen] = np.where(overlaps.max(axis=0) >= MIN_OVERLAP, overlaps.argmax(axis=0), NO_SHAPE)
    return classes


def frame_identity(classes: np.ndarray, label: int) -> float:
    """The share of frames that show the shape ``label``, from the classes of the frames ``(F,)``."""
    return float((classes == label).mean())


def neighbours_alike(classes: np.ndarray) -> float:
    """The share of neighbouring frames that show the same shape, from the classes of the frames ``(F,)``, F >= 2.

    A frame that shows no shape is like no other.
    """
    return float(((classes[1:] == classes[:-1]) & (classes[1:] != NO_SHAPE)).mean())


def majority(classes: np.ndarray) -> int:
    """The class of most frames ``(F,)`` if more than half of the frames show a shape, else -1.

    It hides flicker: a video that turns from one shape into another and back still has a class.
    """
    counts = np.bincount(classes[classes != NO_SHAPE], minlength=len(CLASSES))
    return int(counts.argmax()) if 2 * counts.sum() > len(classes) else NO_SHAPE


def recognise(video: np.ndarray) -> int:
    """The :func:`majority` class of a video, uint8 ``(F, H, W, 3)``. Raises ValueError for another dtype or shape."""
    return majority(frame_classes(track(video)))


def shape_measures(tracking: Tracking, label: int) -> dict[str, float]:
    """The ``SHAPE_MEASURES`` of one video of at least two frames that should show the shape ``label``.

    ``frame identity`` and ``neighbours alike`` are shares of frames and of pairs of them. The others are 1 or 0: each
    check of :func:`~ardiff.metrics.tracking.motion_checks`, ``motion`` for all of them, and ``recognised`` if
    ``label`` is the :func:`majority` class.
    """
    classes, checks = frame_classes(tracking), motion_checks(tracking)
    return {
        "frame identity": frame_identity(classes, label),
        "neighbours alike": neighbours_alike(classes),
        "motion": float(all(checks.values())),
        **{name: float(passed) for name, passed in checks.items()},
        "recognised": float(majority(classes) == label),
    }


def frame_radius(tracking: Tracking, classes: np.ndarray) -> np.ndarray:
    """Half the size of the recognised shape in each frame, in pixels, ``(F,)``; NaN for a frame without one."""
    unit_area = np.array([_unit_shape(shape)[0] for shape in CLASSES])
    return np.sqrt(np.where(classes == NO_SHAPE, np.nan, tracking.area) / unit_area[classes])


def _overlap(cover: np.ndarray, centroid: np.ndarray, area: np.ndarray, shape: str) -> np.ndarray:
    """Intersection over union, ``(F,)``, of covers ``(F, H, W)`` with ``shape`` at their centroid and area."""
    unit_area, unit_y = _unit_shape(shape)
    radius = np.sqrt(area / unit_area)  # (F,)
    y = np.arange(cover.shape[1])[:, None] - (centroid[:, 0] - unit_y * radius)[:, None, None]  # (F, H, 1)
    x = np.arange(cover.shape[2]) - centroid[:, 1][:, None, None]  # (F, 1, W)
    template = np.clip(0.5 - signed_distance(shape, y, x, radius[:, None, None]), 0.0, 1.0)  # (F, H, W)
    return np.minimum(cover, template).sum(axis=(1, 2)) / np.maximum(cover, template).sum(axis=(1, 2))


@lru_cache
def _unit_shape(shape: str) -> tuple[float, float]:
    """Area and centroid y of ``shape`` with radius 1, from the points of a fine grid."""
    grid = np.linspace(-1.5, 1.5, 1501)
    inside = signed_distance(shape, grid[:, None], grid[None, :], 1.0) <= 0
    return float(inside.sum() * (grid[1] - grid[0]) ** 2), float(inside.sum(axis=1) @ grid / inside.sum())
