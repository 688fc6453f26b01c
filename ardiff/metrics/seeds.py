"""Means over training seeds or videos with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval, which is infinite for one value."""

    mean: float
    low: float
    high: float
    count: int
    """Values."""


def estimate_mean(values: Sequence[float], log: bool = False) -> Estimate:
    """The mean of ``values``, one per seed or video, with Student's t interval.

    Args:
        log: Average the logarithms, for positive quantities that differ by factors: the mean is the geometric mean and
            the interval never reaches zero.

    Raises:
        ValueError: There is no value, or with ``log`` a value that is not positive.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data) or (log and data.min() <= 0):
        raise ValueError(f"need at least one value, with log all positive, got {list(values)}")
    data = np.log(data) if log else data
    mean, half = float(data.mean()), np.inf
    if len(data) > 1:
        from scipy import stats  # comes with the jobs, not with the method

        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(data) - 1))
        half = quantile * float(data.std(ddof=1)) / len(data) ** 0.5
    low, high = mean - half, mean + half
    if log:
        mean, low, high = (float(np.exp(v)) for v in (mean, low, high))
    return Estimate(mean, float(low), float(high), len(data))


def ratio_over_seeds(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The geometric mean of ``values`` over ``baseline``, both by seed, over the seeds that both have.

    Two runs with the same seed share the order of the data, the noise of training and the noise of sampling. The ratio
    cancels their influence. None if no seed is in both.
    """
    ratios = [values[seed] / baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    return estimate_mean(ratios, log=True) if ratios else None
