"""How far a distance between two sets can be trusted: its spread over videos, and its bias by the number of them.

Shapes: V videos of k rows each (1 for a feature per video, the frames for a feature per frame), D features. Videos are
what is drawn; the rows of a video stay together.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ardiff.metrics.frechet import Moments, frechet_distance, frechet_from_moments, kernel_distance
from ardiff.randomness import numpy_generator

Distance = Literal["frechet", "kernel"]
CHUNK = 4096
"""Rows whose moments are taken at once."""


def set_distance(real: np.ndarray, fake: np.ndarray, distance: Distance, ddof: int = 1) -> float:
    """The distance between two sets of videos.

    Args:
        real: floating point ``(V, k, D)``. fake: ``(V', k, D)``.
        distance: ``frechet`` or ``kernel``; see :mod:`ardiff.metrics.frechet`.
        ddof: Of the covariances.

    Raises:
        ValueError: The features are not finite, too few, or of different widths.
    """
    x, y = (features.reshape(-1, features.shape[-1]) for features in (real, fake))
    match distance:
        case "kernel":
            return kernel_distance(x, y)
        case "frechet" if max(len(x), len(y)) <= CHUNK:
            return frechet_distance(x, y, ddof)
        case "frechet":
            return frechet_from_moments(_moments(x), _moments(y), ddof)
        case _:
            raise ValueError(f"unknown distance {distance!r}")


def resampled_distance(
    real: np.ndarray, fake: np.ndarray, distance: Distance, ddof: int, seed: int, index: int
) -> float:
    """The distance of bootstrap resample ``index``: both sides drawn anew with replacement, video by video."""
    generator = numpy_generator("bootstrap", seed, index)
    drawn = [features[generator.integers(len(features), size=len(features))] for features in (real, fake)]
    return set_distance(drawn[0], drawn[1], distance, ddof)


def centred_interval(score: float, resampled: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval for the score's spread over videos, from resampled distances.

    A resample holds videos twice, so its distances are biased upward. The spread around their own mean is put around
    the score. What it does not cover is the score's bias by the number of videos: see :func:`distance_at_infinity`.

    Raises:
        ValueError: Fewer than two resamples.
    """
    if len(resampled) < 2:
        raise ValueError(f"an interval needs at least 2 resamples, got {len(resampled)}")
    values = np.asarray(resampled, dtype=np.float64)
    low, high = np.quantile(values - values.mean(), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return score + float(low), score + float(high)


def subset_sizes(count: int, sizes: int = 8) -> list[int]:
    """Numbers of videos from ``count // 4`` to ``count``, evenly spaced in 1/N, for :func:`distance_at_infinity`."""
    inverse = np.linspace(1.0 / count, 4.0 / count, sizes)
    return sorted({max(2, round(1.0 / value)) for value in inverse})


def subset_distance(
    real: np.ndarray, fake: np.ndarray, distance: Distance, ddof: int, seed: int, size: int, index: int
) -> float:
    """The distance between ``size`` videos of each side, drawn without replacement."""
    generator = numpy_generator("subset", seed, size, index)
    drawn = [features[np.sort(generator.permutation(len(features))[:size])] for features in (real, fake)]
    return set_distance(drawn[0], drawn[1], distance, ddof)


def distance_at_infinity(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """The distance that endless sets would have: the intercept of a line through distances over 1/N.

    Chong and Forsyth 2020. The bias of a Frechet distance falls as 1/N when both sides have N videos.

    Raises:
        ValueError: The sizes are not at least two different ones.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a line needs distances at two sizes or more")
    slope_and_intercept = np.polyfit(1.0 / np.asarray(sizes, dtype=np.float64), np.asarray(distances), 1)
    return float(slope_and_intercept[1])


def floor_halves(videos: Sequence[str]) -> tuple[list[int], list[int]]:
    """Two halves of a set's clips that share no video, of equal size: places of the clips in ``videos``."""
    distinct = list(dict.fromkeys(videos))
    sides: tuple[list[int], list[int]] = ([], [])
    number = {name: i for i, name in enumerate(distinct)}
    for place, name in enumerate(videos):
        sides[number[name] % 2].append(place)
    size = min(map(len, sides))
    return sides[0][:size], sides[1][:size]


def _moments(rows: np.ndarray) -> Moments:
    return Moments.of_all(rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK))
