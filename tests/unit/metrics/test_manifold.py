"""Checks of generated sets, on Gaussians: what a smaller distance hides is noticed."""

import numpy as np
import pytest

from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.manifold import (
    NEIGHBOURS,
    CheckedClips,
    SetChecks,
    check_set,
    density_and_coverage,
    distances,
)

WIDTH, COUNT = 8, 200


def clips(features: np.ndarray, name: str) -> CheckedClips:
    return CheckedClips(
        features, [f"{name}/{i}" for i in range(len(features))], [row.tobytes().hex() for row in features]
    )


def gaussian(seed: int, count: int = COUNT, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, (count, WIDTH)).astype(np.float32)


REFERENCE, OTHERS = clips(gaussian(0), "real"), clips(gaussian(1), "real2")


def check(features: np.ndarray, training: np.ndarray | None = None) -> SetChecks:
    return check_set(
        REFERENCE, OTHERS, clips(features, "fake"), None if training is None else clips(training, "training")
    )


def test_draws_of_the_real_distribution_have_no_warning() -> None:
    for seed in range(2, 12):
        checks = check(gaussian(seed))
        assert checks.warnings() == []
        assert checks.num_clips == COUNT
        assert checks.near is not None
        assert checks.near < 0.2


def test_less_variety_is_noticed() -> None:
    """Ten clips each near one of 20, whose mean and covariance are about those of real clips."""
    few = np.concatenate([gaussian(3, 20)] * 10) + gaussian(4, scale=0.05)
    [warning] = [w for w in check(few).warnings() if "vary less" in w]
    assert "of the neighbourhoods of real clips, other real clips" in warning


def test_clips_unlike_real_ones_are_noticed() -> None:
    assert any("unlike any real one" in warning for warning in check(gaussian(2, scale=3.0)).warnings())


def test_copies_of_the_reference_lower_the_distance_and_are_noticed() -> None:
    copies = REFERENCE.features + gaussian(2, scale=0.01)
    assert frechet_distance(REFERENCE.features, copies) < frechet_distance(REFERENCE.features, OTHERS.features) / 10
    checks = check(copies)
    [warning] = checks.warnings()
    assert checks.nearest is not None
    assert checks.nearest[0].partition("/")[2] == checks.nearest[1].partition("/")[2]
    assert f"compare {checks.nearest[0]} with {checks.nearest[1]}" in warning
    assert (checks.duplicates, checks.copies) == (0, 0)


def test_copies_of_training_videos_outside_the_reference_are_noticed() -> None:
    """A fifth of the clips are copies."""
    training = gaussian(5, 1000)
    mixed = gaussian(6)
    mixed[:40] = training[:40] + gaussian(7, 40, 0.01)
    assert check(mixed).warnings() == []
    [warning] = check(mixed, training).warnings()
    assert "nearer to a training clip" in warning


def test_equal_pixels() -> None:
    generated = gaussian(2)
    generated[0], generated[1] = generated[2], generated[2]
    generated[3] = REFERENCE.features[7]
    checks = check(generated)
    assert (checks.duplicates, checks.copies) == (2, 1)
    assert [w for w in checks.warnings() if "2 generated clips have the pixels of another" in w]
    assert [w for w in checks.warnings() if "1 generated clips have the pixels of a real clip" in w]


def test_few_clips_have_hashes_only() -> None:
    few = check_set(REFERENCE, OTHERS, clips(gaussian(2, 19), "fake"))
    assert (few.num_clips, few.density, few.describe()) == (0, None, "duplicates 0, copies 0")
    assert few.warnings() == []


def test_density_and_coverage_by_hand() -> None:
    """Two reference clips of radius 1 and 2. Three clips: in both, in the second, in none."""
    between = np.array([[0.5, 1.5, 9.0], [1.0, 2.0, 9.0]])
    density, coverage = density_and_coverage(np.array([1.0, 2.0]), between)
    assert density == pytest.approx((2 + 1 + 0) / 3 / NEIGHBOURS)
    assert coverage == 1.0
    assert density_and_coverage(np.array([0.4, 2.0]), between)[1] == 0.5


def test_distances() -> None:
    x, y = gaussian(0, 5) + 1000.0, gaussian(1, 7) + 1000.0
    exact = np.sqrt(((x[:, None].astype(float) - y[None].astype(float)) ** 2).sum(-1))
    assert distances(x, y) == pytest.approx(exact, rel=1e-6)
