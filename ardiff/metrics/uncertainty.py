"""How far a distance between two sets can be trusted: its spread over videos, and its bias by the number of them.

Shapes: V videos of k rows each (1 for a feature per video, the frames for a feature per frame), D features. Videos are
what is drawn; the rows of a video stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ardiff.metrics.frechet import Moments, frechet_distance, frechet_from_moments, kernel_distance
from ardiff.randomness import numpy_generator

Distance = Literal["frechet", "kernel"]
CHUNK = 4096
"""Rows whose moments are taken at once."""


@dataclass(frozen=True, slots=True)
class Videos:
    """Features of videos in blocks, of which one at a time need be in memory."""

    blocks: Callable[[], Iterable[np.ndarray]]
    """Begins to go through them, floating point ``(v, k, D)`` each."""
    places: np.ndarray
    """Which of the blocks' videos these are, int ``(V,)``; one may come several times."""

    @classmethod
    def of(cls, blocks: Callable[[], Iterable[np.ndarray]], count: int) -> Videos:
        """All ``count`` videos of the blocks."""
        return cls(blocks, np.arange(count))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Sequence[int] | np.ndarray | slice) -> Videos:
        """Some of the videos."""
        return Videos(self.blocks, self.places[chosen])

    def __iter__(self) -> Iterator[np.ndarray]:
        """Their features block by block, ``(v, k, D)``, in the order of the blocks and not of ``places``."""
        times = np.bincount(self.places) if len(self.places) else np.zeros(0, int)  # how often each video comes
        first = 0
        for block in self.blocks():
            if first >= len(times):
                return
            mine = times[first : first + len(block)]
            first += len(block)
            if mine.any():
                yield block[: len(mine)].repeat(mine, axis=0)

    def array(self) -> np.ndarray:
        """All of them, ``(V, k, D)``, for features that are few."""
        return np.concatenate(list(self))

    @property
    def depth(self) -> int:
        """Rows of a video, k. Raises ValueError if there is none."""
        for block in self:
            return block.shape[1]
        raise ValueError("there are no videos")


def set_distance(real: Videos | np.ndarray, fake: Videos | np.ndarray, distance: Distance, ddof: int = 1) -> float:
    """The distance between two sets of videos.

    From ``CHUNK`` rows on, a Frechet distance is of moments, which are merged block by block: memory does not grow with
    the number of videos.

    Args:
        real: floating point ``(V, k, D)``. fake: ``(V', k, D)``.
        distance: ``frechet`` or ``kernel``; see :mod:`ardiff.metrics.frechet`.
        ddof: Of the covariances.

    Raises:
        ValueError: The features are not finite, too few, or of different widths.
    """
    x, y = _videos(real), _videos(fake)
    if distance not in ("frechet", "kernel"):
        raise ValueError(f"unknown distance {distance!r}")
    if distance == "frechet" and max(len(x) * x.depth, len(y) * y.depth) > CHUNK:
        return frechet_from_moments(_moments(x), _moments(y), ddof)
    rows = [side.array() for side in (x, y)]
    flat = [features.reshape(-1, features.shape[-1]) for features in rows]
    return frechet_distance(flat[0], flat[1], ddof) if distance == "frechet" else kernel_distance(flat[0], flat[1])


def resampled_distance(
    real: Videos | np.ndarray, fake: Videos | np.ndarray, distance: Distance, ddof: int, seed: int, index: int
) -> float:
    """The distance of bootstrap resample ``index``: both sides drawn anew with replacement, video by video."""
    generator = numpy_generator("bootstrap", seed, index)
    drawn = [side[generator.integers(len(side), size=len(side))] for side in (_videos(real), _videos(fake))]
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
    real: Videos | np.ndarray,
    fake: Videos | np.ndarray,
    distance: Distance,
    ddof: int,
    seed: int,
    size: int,
    index: int,
) -> float:
    """The distance between ``size`` videos of each side, drawn without replacement."""
    generator = numpy_generator("subset", seed, size, index)
    drawn = [side[generator.permutation(len(side))[:size]] for side in (_videos(real), _videos(fake))]
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


def _videos(features: Videos | np.ndarray) -> Videos:
    return Videos.of(lambda: [features], len(features)) if isinstance(features, np.ndarray) else features


def _moments(videos: Videos) -> Moments:
    rows = (block.reshape(-1, block.shape[-1]) for block in videos)
    return Moments.of_all(part[i : i + CHUNK] for part in rows for i in range(0, len(part), CHUNK))
