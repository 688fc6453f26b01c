"""How far a score can be trusted: its spread over videos, its bias by their number, and the baseline of real videos.

Shapes: V videos. Resampling draws whole videos, so the rows of a video stay together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ardiff.metrics.distances import Features, SetDistance
from ardiff.metrics.features import VideoFeatures
from ardiff.randomness import numpy_generator

MIN_VIDEOS_TO_EXTRAPOLATE = 8
"""Videos of a set from which on the distance is extrapolated to infinitely many."""
DRAWS_PER_SIZE = 3
"""Subsets of each size for the extrapolation."""


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """What resampling says about a score."""

    low: float | None = None
    """Lower end of the 95 % interval over videos; None without resampling."""
    high: float | None = None
    infinity: float | None = None
    """The distance extrapolated to infinitely many videos; None where it is not computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampling:
    """The resampled distances that give a score's interval and its extrapolation.

    The draws are independent of each other, so a caller may compute them in parallel.
    """

    distance: SetDistance
    num_videos: int
    """Videos of each set."""
    bootstrap: int
    """Resamples for the interval; 0 leaves it out."""
    seed: int
    extrapolate: bool = True
    """Extrapolate a biased distance to infinitely many videos."""

    @property
    def sizes(self) -> list[int]:
        """Videos of each subset for the extrapolation."""
        if not (self.extrapolate and self.distance.biased and self.num_videos >= MIN_VIDEOS_TO_EXTRAPOLATE):
            return []
        return [size for size in subset_sizes(self.num_videos) for _ in range(DRAWS_PER_SIZE)]

    def draws(self) -> list[Callable[[Features, Features], float]]:
        """Functions of real and generated features, each of which computes one distance."""
        resample = functools.partial(resampled_distance, distance=self.distance, seed=self.seed)
        subset = functools.partial(subset_distance, distance=self.distance, seed=self.seed)
        draws: list[Callable[[Features, Features], float]] = []
        draws += [functools.partial(resample, index=i) for i in range(self.bootstrap)]
        draws += [functools.partial(subset, size=size, index=i) for i, size in enumerate(self.sizes)]
        return draws

    def summarize(self, score: float, distances: Sequence[float]) -> Uncertainty:
        """The uncertainty of ``score`` from the distances of the :meth:`draws`."""
        resampled, subsets = distances[: self.bootstrap], distances[self.bootstrap :]
        low, high = centred_interval(score, resampled) if resampled else (None, None)
        return Uncertainty(low, high, distance_at_infinity(self.sizes, subsets) if subsets else None)


def resampled_distance(real: Features, fake: Features, *, distance: SetDistance, seed: int, index: int) -> float:
    """The distance of bootstrap resample ``index``: draws the videos of both sets with replacement."""
    generator = numpy_generator("bootstrap", seed, index)
    x, y = (side[generator.integers(len(side), size=len(side))] for side in map(VideoFeatures.wrap, (real, fake)))
    return distance(x, y)


def subset_distance(
    real: Features, fake: Features, *, distance: SetDistance, seed: int, size: int, index: int
) -> float:
    """The distance between ``size`` videos of each set, drawn without replacement."""
    generator = numpy_generator("subset", seed, size, index)
    x, y = (side[generator.permutation(len(side))[:size]] for side in map(VideoFeatures.wrap, (real, fake)))
    return distance(x, y)


def centred_interval(score: float, resampled: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval for the score's spread over videos, from resampled scores.

    A resample contains videos twice, so its distances are biased upward. The interval puts their spread around their
    own mean around the score. It does not cover the score's bias by the number of videos: see
    :func:`distance_at_infinity`.

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


def distance_at_infinity(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """The distance between infinitely large sets: the intercept of a line through distances over 1/N.

    Chong and Forsyth 2020. The bias of a Frechet distance falls as 1/N when both sides have N videos.

    Raises:
        ValueError: Fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a line needs distances at two sizes or more")
    slope_and_intercept = np.polyfit(1.0 / np.asarray(sizes, dtype=np.float64), np.asarray(distances), 1)
    return float(slope_and_intercept[1])


def mean_with_interval(values: np.ndarray, bootstrap: int, seed: int) -> tuple[float, Uncertainty]:
    """The mean of values ``(V,)``, one per video, and its interval over videos."""
    mean = float(values.mean(dtype=np.float64))
    resampled = [resampled_mean(values, seed, index) for index in range(bootstrap)]
    return mean, Uncertainty(*centred_interval(mean, resampled)) if resampled else Uncertainty()


def resampled_mean(values: np.ndarray, seed: int, index: int) -> float:
    """The mean of bootstrap resample ``index`` of values ``(V,)``."""
    drawn = numpy_generator("bootstrap", seed, index).integers(len(values), size=len(values))
    return float(values[drawn].mean(dtype=np.float64))


# --------------------------------------------------------------------------------------------- real-vs-real baseline


@dataclass(frozen=True, slots=True)
class Baseline:
    """The distance between two sets of real clips that share no video: a score below it cannot be expected."""

    distance: float | None
    """None if there are too few real videos."""
    num_clips: int | None
    """Clips on each side."""


def real_vs_real(
    features: VideoFeatures | np.ndarray, videos: Sequence[str], count: int, distance: SetDistance
) -> Baseline:
    """The baseline from the features of real clips and the names of their videos.

    With ``2 count`` clips the sides are the first and the last ``count``. With fewer, they are halves of the clips
    that share no video.
    """
    clips = VideoFeatures.wrap(features)
    if len(clips) == 2 * count:
        left, right = list(range(count)), list(range(count, 2 * count))
    else:
        left, right = disjoint_halves(videos)
    if len(left) < 2:
        return Baseline(None, None)
    return Baseline(distance(clips[left], clips[right]), len(left))


def disjoint_halves(videos: Sequence[str]) -> tuple[list[int], list[int]]:
    """Splits clips, given the names of their videos, into two halves of equal size that share no video.

    Returns:
        The indices of the clips of each half.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(videos))}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(videos):
        sides[number[name] % 2].append(index)
    size = min(map(len, sides))
    return sides[0][:size], sides[1][:size]
