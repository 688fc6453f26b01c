"""Drift of long videos: distances and simple statistics of every 16 frames.

Shapes: F frames, H W pixels, S segments.
"""

from dataclasses import dataclass

import numpy as np

SEGMENT = 16
"""Frames of a segment."""
STATISTICS = {
    "brightness": "mean grey level",
    "contrast": "deviation of grey levels in a frame",
    "saturation": "mean spread of a pixel's channels",
    "sharpness": "mean difference of neighbouring pixels",
    "motion": "mean difference of successive frames",
}
"""The statistics of a clip, all in grey levels of 0 to 255, with their meaning."""


def clip_statistics(clip: np.ndarray) -> np.ndarray:
    """The ``STATISTICS`` of one clip, uint8 ``(F, H, W, 3)`` to float32 ``(5,)``. Raises ValueError."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 2:
        raise ValueError(f"expected a uint8 clip (F, H, W, 3) with F >= 2, got {clip.dtype} {clip.shape}")
    frames = clip.astype(np.float32)
    grey = frames.mean(axis=-1)  # (F, H, W)
    sharpness = (np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean()) / 2
    values = [
        grey.mean(),
        grey.std(axis=(1, 2)).mean(),
        (frames.max(axis=-1) - frames.min(axis=-1)).mean(),
        sharpness,
        np.abs(np.diff(frames, axis=0)).mean(),
    ]
    return np.array(values, dtype=np.float32)


def mean_statistics(clips: np.ndarray) -> dict[str, float]:
    """The mean of each of the ``STATISTICS`` over clips, float32 ``(V, 5)``."""
    return dict(zip(STATISTICS, clips.mean(axis=0, dtype=np.float64).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """The drift of one set of videos."""

    name: str
    fvd: list[float]
    """FVD of each segment to real clips, ``(S,)``."""
    statistics: dict[str, list[float]]
    """Mean of each of the ``STATISTICS`` per segment, ``(S,)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """The drift of all sets, and the values of real clips."""

    sets: list[Drift]
    real_fvd: float | None
    """FVD between two sets of real clips; None if there are too few."""
    real_statistics: dict[str, float]
    num_clips: int
    protocol: str
    """The protocol of the distances, on one line."""
