"""Distances between two sets of videos, from the features of their videos.

Shapes: V videos of k rows each, D features. See :mod:`ardiff.metrics.frechet` for the formulas.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.frechet import (
    Moments,
    fast_distance,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    kernel_distances,
    polynomial_distance,
    polynomial_distances,
)

CHUNK = 4096
"""Rows whose moments are computed at once."""
Features = VideoFeatures | np.ndarray
"""Features of a set of videos, floating point ``(V, k, D)``."""


class SetDistance(Protocol):
    """A distance between two sets of videos. Calling it raises ValueError for features that are not finite, too few,
    or of different widths."""

    @property
    def ddof(self) -> int:
        """The divisor of the covariances is N - ddof; 0 for a distance without covariances."""

    @property
    def biased(self) -> bool:
        """Whether N videos give too large a value, by about c / N."""

    def __call__(self, real: Features, fake: Features) -> float: ...


@dataclass(frozen=True, slots=True)
class Frechet:
    """The squared Frechet distance.

    Above ``CHUNK`` rows it is computed from moments that are merged block by block, so memory does not grow with the
    number of videos.
    """

    ddof: int = 1
    biased: ClassVar[bool] = True

    def __call__(self, real: Features, fake: Features) -> float:
        x, y = VideoFeatures.wrap(real), VideoFeatures.wrap(fake)
        if max(len(x) * x.depth, len(y) * y.depth) > CHUNK:
            return frechet_from_moments(_moments(x), _moments(y), self.ddof)
        return frechet_distance(_rows(x), _rows(y), self.ddof)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The unbiased kernel distance. It needs all rows in memory."""

    ddof: ClassVar[int] = 0
    biased: ClassVar[bool] = False

    def __call__(self, real: Features, fake: Features) -> float:
        return kernel_distance(_rows(VideoFeatures.wrap(real)), _rows(VideoFeatures.wrap(fake)))


@dataclass(frozen=True, slots=True)
class Polynomial:
    """JEDi's kernel distance. It needs all rows in memory."""

    ddof: ClassVar[int] = 0
    biased: ClassVar[bool] = True

    def __call__(self, real: Features, fake: Features) -> float:
        return polynomial_distance(_rows(VideoFeatures.wrap(real)), _rows(VideoFeatures.wrap(fake)))


def union_distances(
    distance: SetDistance, real: Sequence[VideoFeatures], fake: Sequence[VideoFeatures], unions: Sequence[Sequence[int]]
) -> list[float]:
    """The distance between each union of parts of the real and the same parts of the generated features.

    A Frechet distance of parts with more rows than features comes from their moments, which are computed once and
    merged, to about six digits. Those of kernels come from sums over pairs of parts.
    """
    match distance:
        case Frechet(ddof=ddof) if all(len(part) * part.depth > part.width for part in (*real, *fake)):
            moments = [[_moments(part) for part in side] for side in (real, fake)]
            merged = [[functools.reduce(Moments.merge, [m[i] for i in union]) for union in unions] for m in moments]
            with contextlib.suppress(np.linalg.LinAlgError):  # a feature that never varies, for example
                return [fast_distance(x, y, ddof) for x, y in zip(*merged, strict=True)]
        case Kernel():
            return kernel_distances([_rows(part) for part in real], [_rows(part) for part in fake], unions)
        case Polynomial():
            return polynomial_distances([_rows(part) for part in real], [_rows(part) for part in fake], unions)
    return [distance(*(VideoFeatures.union([side[i] for i in union]) for side in (real, fake))) for union in unions]


def _rows(videos: VideoFeatures) -> np.ndarray:
    """All rows of all videos, ``(V k, D)``."""
    features = videos.array()
    return features.reshape(-1, features.shape[-1])


def _moments(videos: VideoFeatures) -> Moments:
    rows = (block.reshape(-1, block.shape[-1]) for block in videos)
    return Moments.of_all(block[i : i + CHUNK] for block in rows for i in range(0, len(block), CHUNK))
