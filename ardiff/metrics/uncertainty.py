"""How far a score can be trusted: its spread over videos, its bias by their number, and the baseline of real videos.

Shapes: V videos, n clips. A video may have several clips: they stay together, because they are not independent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ardiff.metrics.distances import Features, SetDistance, union_distances
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.seeds import estimate_mean
from ardiff.randomness import numpy_generator

PARTS = 4
"""A partition divides the videos of a set into quarters."""
PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
"""The ways to join quarters to two halves."""
MIN_VIDEOS = 2 * PARTS
"""Videos of a set from which on a distance has an interval."""
QUANTILE = 2.1
"""Standard deviations from the score to the ends of its interval: more than the 1.96 of a normal distribution, because
the standard deviation is estimated too. ``benchmarks/metrics.py coverage`` measures how often the interval is right."""


PartitionDraw = Callable[[Features, Features], list[float]]
"""From real and generated features to the distances of one partition."""


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """What resampling says about a score."""

    low: float | None = None
    """Lower end of the 95 % interval over videos; None without resampling."""
    high: float | None = None
    infinity: float | None = None
    """The distance extrapolated to infinitely many videos; None where that does not hold."""
    infinity_low: float | None = None
    """Lower end of the 95 % interval of ``infinity``."""
    infinity_high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampling:
    """The distances between parts of the sets that give a score's interval and its extrapolation.

    The draws are independent of each other, so a caller may compute them in parallel.
    """

    distance: SetDistance
    partitions: int
    """Random partitions of both sets; 0 leaves the interval out."""
    seed: int
    real_videos: Sequence[str]
    """The name of each real clip's video."""
    fake_videos: Sequence[str]
    """The name of each generated clip's video."""

    @property
    def num_videos(self) -> int:
        """Videos of the smaller set."""
        return min(len(set(self.real_videos)), len(set(self.fake_videos)))

    def draws(self) -> list[PartitionDraw]:
        """Functions of real and generated features, each of which computes the distances of one partition."""
        if self.num_videos < MIN_VIDEOS:
            return []
        return [
            functools.partial(
                partition_distances,
                distance=self.distance,
                real_videos=self.real_videos,
                fake_videos=self.fake_videos,
                seed=self.seed,
                index=index,
            )
            for index in range(self.partitions)
        ]

    def summarize(self, score: float, width: int, distances: Sequence[Sequence[float]]) -> Uncertainty:
        """The uncertainty of ``score`` from the distances of the :meth:`draws`. ``width`` is the features' D."""
        if not distances:
            return Uncertainty()
        parts = PartDistances(np.asarray(distances))
        reach = QUANTILE * parts.deviation()
        low, high = _interval(score, reach)
        if not self.distance.biased or self.num_videos < videos_to_extrapolate(width):
            return Uncertainty(low, high)
        infinity = parts.distance_at_infinity(score)
        return Uncertainty(low, high, max(infinity, 0.0), *_interval(infinity, reach))


def videos_to_extrapolate(width: int) -> int:
    """Videos of a set from which on a distance of ``width`` features can be extrapolated to infinitely many videos.

    A quarter then has as many videos as there are features. With fewer, its covariance is singular and the distance
    does not follow the bias's series in 1/N.
    """
    return PARTS * width


def partition_distances(
    real: Features,
    fake: Features,
    *,
    distance: SetDistance,
    real_videos: Sequence[str],
    fake_videos: Sequence[str],
    seed: int,
    index: int,
) -> list[float]:
    """The distances of partition ``index``: of the four quarters, then of both halves of each of the ``PAIRINGS``.

    Quarter by quarter, the videos of both sets are drawn without replacement.
    """
    generator = numpy_generator("partition", seed, index)
    quarters_x, quarters_y = (
        [VideoFeatures.wrap(features)[clips] for clips in _quarters(videos, generator)]
        for features, videos in ((real, real_videos), (fake, fake_videos))
    )
    unions = [(number,) for number in range(PARTS)] + list(itertools.chain.from_iterable(PAIRINGS))
    return union_distances(distance, quarters_x, quarters_y, unions)


def _quarters(videos: Sequence[str], generator: np.random.Generator) -> list[np.ndarray]:
    """The clips of each quarter of the videos, int ``(n / 4,)`` or so."""
    names = list(dict.fromkeys(videos))
    number = {name: i for i, name in enumerate(names)}
    of_video = np.empty(len(names), int)
    for quarter, members in enumerate(np.array_split(generator.permutation(len(names)), PARTS)):
        of_video[members] = quarter
    of_clip = of_video[[number[name] for name in videos]]  # (n,)
    return [np.flatnonzero(of_clip == quarter) for quarter in range(PARTS)]


@dataclass(frozen=True, slots=True)
class PartDistances:
    """The distances of partitions, ``(P, 10)``, in the order of :func:`partition_distances`."""

    values: np.ndarray

    @property
    def quarters(self) -> np.ndarray:
        """The distances of quarters, ``(P, 4)``."""
        return self.values[:, :PARTS]

    @property
    def halves(self) -> np.ndarray:
        """The distances of both halves of each pairing, ``(P, 3, 2)``."""
        return self.values[:, PARTS:].reshape(len(self.values), len(PAIRINGS), 2)

    def deviation(self) -> float:
        """The standard deviation of the distance of the whole sets over draws of other videos.

        The halves of a partition are independent, so ``(difference)^2 / 2`` is an unbiased estimate of the variance of
        half a set, and the variance over its quarters one of a quarter. The variance of N videos is ``a / N + b / N^2``
        up to higher terms: a is 0 where sets are equal, because the linear term of the distance vanishes there. The two
        estimates show a and b, neither of which is negative.
        """
        halves = float((np.diff(self.halves, axis=2) ** 2).mean() / 2)
        quarters = float(self.quarters.var(axis=1, ddof=1).mean())
        quarters = min(max(quarters, 2.0 * halves), 4.0 * halves)
        return math.sqrt(0.75 * halves - 0.125 * quarters)

    def distance_at_infinity(self, score: float) -> float:
        """The distance between infinitely large sets (Chong and Forsyth 2020), which can be slightly negative.

        The bias is a series in 1/N. Three sizes, N, N/2 and N/4, remove its first two terms (Richardson).
        """
        return (8.0 * score - 6.0 * float(self.halves.mean()) + float(self.quarters.mean())) / 3.0


def _interval(value: float, reach: float) -> tuple[float, float]:
    """The values up to ``reach`` away, none of them below 0: no distance is negative."""
    return max(value - reach, 0.0), max(value + reach, 0.0)


def mean_with_interval(
    values: np.ndarray, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, Uncertainty]:
    """The mean of values ``(V,)``, one per video, and Student's 95 % interval over videos, clipped to what can be."""
    estimate = estimate_mean(values.tolist())
    return estimate.mean, Uncertainty(max(estimate.low, lowest), min(estimate.high, highest))


# --------------------------------------------------------------------------------------------- real-vs-real baseline


@dataclass(frozen=True, slots=True)
class Baseline:
    """The distance between two sets of real clips that share no video.

    Generated videos as good as real ones have this distance on average. A smaller one is no better: less variety, or
    copies of the real clips, cause it.
    """

    distance: float | None
    """None if there are too few real videos."""
    num_clips: int | None
    """Clips on each side."""


def real_vs_real(features: Features, clips: Sequence[tuple[str, int]], count: int, distance: SetDistance) -> Baseline:
    """The baseline from the features of real clips, and the name and class of the video of each."""
    values = VideoFeatures.wrap(features)
    left, right = baseline_sides(clips, count)
    if len(left) < 2:
        return Baseline(None, None)
    return Baseline(distance(values[left], values[right]), len(left))


def baseline_sides(clips: Sequence[tuple[str, int]], count: int) -> tuple[list[int], list[int]]:
    """The indices of the two sides of a baseline, from the name and class of the video of each real clip.

    With more than ``count`` clips the sides are the first ``count`` and the others. With fewer, they are halves of the
    clips that share no video and have equally many clips of each class.
    """
    if len(clips) > count:
        return list(range(count)), list(range(count, len(clips)))
    return disjoint_halves(clips)


def disjoint_halves(clips: Sequence[tuple[str, int]]) -> tuple[list[int], list[int]]:
    """Splits clips, given name and class of their videos, into two halves of equal size that share no video.

    Neighbouring videos of a class, in the order of the clips, go to different halves.

    Returns:
        The indices of the clips of each half.
    """
    videos = sorted(dict.fromkeys(clips), key=lambda clip: clip[1])  # stable: keeps the order within a class
    side_of = {video: number % 2 for number, video in enumerate(videos)}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, video in enumerate(clips):
        sides[side_of[video]].append(index)
    size = min(map(len, sides))
    return sides[0][:size], sides[1][:size]
