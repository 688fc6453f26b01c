"""Drift of long videos: distances and simple statistics of every 16 frames.

Shapes: F frames, H W pixels, S segments, V videos, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ardiff.data.synthetic import CLASSES
from ardiff.metrics.seeds import estimate_mean
from ardiff.metrics.shapes import frame_classes, frame_identity, neighbours_alike
from ardiff.metrics.tracking import track

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


SHAPE_STATISTICS = {
    "frame identity": "share of frames that show the asked class",
    "neighbours alike": "share of neighbouring frames that show the same shape",
}
"""The statistics of segments of the synthetic set's videos, with their meaning."""


def content_colour(clip: np.ndarray) -> np.ndarray:
    """The mean RGB of what differs from a clip's median colour, uint8 ``(F, H, W, 3)`` to float32 ``(3,)``.

    A pixel's weight is its squared difference from the median colour. A plain clip has its own colour.
    """
    background = np.median(clip, axis=(0, 1, 2))  # (3,)
    contrast = clip - background
    weight = (contrast**2).sum(axis=-1, keepdims=True)
    moved = (contrast * weight).sum(axis=(0, 1, 2)) / max(float(weight.sum()), 1.0)
    return (background + moved).astype(np.float32)


def colour_drift(colours: np.ndarray) -> list[float]:
    """How far the colours of videos move from their first segment, ``(S, V, 3)`` to ``(S,)``, in grey levels.

    The root mean square over videos of the distance of their :func:`content_colour` in RGB.
    """
    distances = ((colours - colours[0]).astype(np.float64) ** 2).sum(axis=-1)  # (S, V)
    return np.sqrt(distances.mean(axis=1)).tolist()


def drift_errors(statistics: np.ndarray) -> np.ndarray:
    """The Video Drift Error (BlockVid 2025) of each video and statistic, ``(S, V, K)`` to float64 ``(V, K)``.

    ``sum_i (S - i + 1) |m_i - m_1| / m_1`` over segments i from 2 to S, with m_i the statistic of segment i: the sum of
    relative changes, of which early ones weigh more. A first segment below one grey level counts as one.
    """
    values = statistics.astype(np.float64)
    changes = np.abs(values[1:] - values[0]) / np.maximum(values[0], 1.0)  # (S - 1, V, K)
    weights = np.arange(len(values) - 1, 0, -1.0)
    return np.einsum("s,svk->vk", weights, changes)


@dataclass(frozen=True, slots=True)
class DriftError:
    """The mean of :func:`drift_errors` over videos, with its 95 % interval over videos."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, statistics: np.ndarray) -> dict[str, DriftError]:
        """The error of each of the ``STATISTICS``, from ``(S, V, 5)``."""
        errors = {}
        for name, values in zip(STATISTICS, drift_errors(statistics).T, strict=True):
            estimate = estimate_mean(values.tolist())
            errors[name] = cls(estimate.mean, max(estimate.low, 0.0), estimate.high)
        return errors

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} .. {self.high:.2f})"


def shape_statistics(clip: np.ndarray) -> np.ndarray:
    """What frames of the synthetic set show, uint8 ``(F, H, W, 3)`` to float32 ``(K + 1,)``.

    The share of frames that show each class, and of neighbours that show the same; see :mod:`ardiff.metrics.shapes`.
    """
    classes = frame_classes(track(clip))
    shares = [frame_identity(classes, label) for label in range(len(CLASSES))]
    return np.array([*shares, neighbours_alike(classes)], dtype=np.float32)


def mean_shape_statistics(values: np.ndarray, labels: Sequence[int]) -> dict[str, float]:
    """The mean of each of the ``SHAPE_STATISTICS`` over clips, from ``(V, K + 1)`` and the classes asked for."""
    identity = values[np.arange(len(values)), np.asarray(labels)]
    means = (identity.mean(dtype=np.float64), values[:, -1].mean(dtype=np.float64))
    return dict(zip(SHAPE_STATISTICS, map(float, means), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """The drift of one set of videos."""

    name: str
    fvd: list[float]
    """FVD of each segment to real clips, ``(S,)``."""
    statistics: dict[str, list[float]]
    """Mean of each of the ``STATISTICS`` per segment, ``(S,)``; of synthetic videos also ``SHAPE_STATISTICS``."""
    colour: list[float]
    """The :func:`colour_drift` of each segment, ``(S,)``."""
    error: dict[str, DriftError]
    """The drift error of each of the ``STATISTICS``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """The drift of all sets, and the values of real clips."""

    sets: list[Drift]
    real_fvd: float | None
    """FVD between two sets of real clips; None if there are too few."""
    real_statistics: dict[str, float]
    real_error: dict[str, DriftError]
    """The drift errors of real clips of the videos' length."""
    num_clips: int
    protocol: str
    """The protocol of the distances, on one line."""
