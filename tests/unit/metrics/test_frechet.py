"""Frechet and kernel distances against seven peers' values (tests/golden/metrics) and closed forms."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ardiff.metrics.frechet import (
    Moments,
    frechet_distance,
    frechet_from_moments,
    gaussian_distance,
    kernel_distance,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
EXPECTED = json.loads((GOLDEN / "frechet_fixtures.json").read_text())
spec = importlib.util.spec_from_file_location("frechet_cases", GOLDEN / "cases.py")
assert spec is not None
assert spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

FULL_RANK = ("small_d8", "d64_n512", "logits_d400_n2048")
RANK_DEFICIENT = ("rankdef_d400_n256", "null_d400_n256", "flat_d400_n256", "tiny_n2_d16")


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def tolerance(peer: str, name: str) -> float:
    """What the fixtures allow, relative: rounding of float32, and of roots of covariances that are singular."""
    if peer == "videogpt_tats_svd_ddof1_f32":
        # The float32 decomposition of VideoGPT is itself off by 5.3e-3 on the largest case.
        return 6e-3 if name == "logits_d400_n2048" else 5e-3
    if "_f32" in peer:
        return 1e-6
    if name in FULL_RANK:
        return 1e-9
    return 1e-7 if "nuclear" in peer else 1e-6


@pytest.mark.parametrize("name", FULL_RANK + RANK_DEFICIENT)
def test_frechet_distance_is_that_of_the_peers(name):
    real, fake = cases.pair(name)
    expected = EXPECTED["pairs"][name]
    assert digest(real) == expected["sha256_set1_f32"]
    assert digest(fake) == expected["sha256_set2_f32"]
    assert real[0, :3].tolist() == expected["set1_first3"]
    assert np.trace(Moments.of(real).covariance()) == pytest.approx(expected["trace_cov1_ddof1"], rel=1e-12)
    values = {ddof: frechet_distance(real, fake, ddof) for ddof in (0, 1)}
    assert len(expected["frechet"]) == 11
    for peer, value in expected["frechet"].items():
        assert values[0 if "ddof0" in peer else 1] == pytest.approx(value, rel=tolerance(peer, name)), peer


@pytest.mark.parametrize("name", FULL_RANK + RANK_DEFICIENT[:-1])
def test_kernel_distance_is_that_of_the_peers(name):
    """Subsets of all rows are permutations, so the peers that draw some give the same wherever N is at most 1000."""
    value, peers = kernel_distance(*cases.pair(name)), dict(EXPECTED["pairs"][name]["kernel"])
    [drawn] = [key for key in peers if key.startswith("torchfidelity")]
    peers["torchfidelity"] = peers.pop(drawn)["mean"]
    assert len(peers) == 4
    for peer, expected in peers.items():
        if name != "logits_d400_n2048" or peer in (
            "tats_polynomial_mmd_full_unbiased",
            "torchmetrics_poly_mmd_full_f64",
        ):
            assert value == pytest.approx(expected, rel=1e-9), peer


@pytest.mark.slow
def test_kernel_distances_of_the_subsets_that_the_peers_draw():
    """100 subsets of 1000 of 2048 rows; the authors draw of the generated rows first, torch-fidelity of the real."""
    real, fake = cases.pair("logits_d400_n2048")
    expected = EXPECTED["pairs"]["logits_d400_n2048"]["kernel"]

    def drawn(seed, first, second):
        generator = np.random.RandomState(seed)
        for _ in range(100):
            yield kernel_distance(*(side[generator.choice(2048, 1000, replace=False)] for side in (first, second)))

    assert np.mean(list(drawn(0, fake, real))) == pytest.approx(
        expected["authors_kernel_distance_npseed0_100x1000"], rel=1e-9
    )
    values = list(drawn(2020, real, fake))
    assert np.mean(values) == pytest.approx(expected["torchfidelity_kid_rng2020_100x1000"]["mean"], rel=1e-9)
    assert np.std(values) == pytest.approx(expected["torchfidelity_kid_rng2020_100x1000"]["std"], rel=1e-9)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", EXPECTED["derived"])
def test_closed_forms(name, ddof):
    real, fake = cases.derived(name)
    case = EXPECTED["derived"][name]
    assert digest(real) == case["sha256_set1_f64"]
    exact = case["exact"][f"ddof{ddof}"] if isinstance(case["exact"], dict) else case["exact"]
    value = frechet_distance(real, fake, ddof=ddof)
    assert value == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert value == pytest.approx(case["frechet"][f"check_nuclear_norm_ddof{ddof}"], rel=1e-9, abs=1e-9)
    for peer, theirs in case["frechet"].items():
        if f"ddof{ddof}" in peer:  # the peers are near: by 4e-3 of nothing, and 1e-8 where covariances have full rank
            assert value == pytest.approx(theirs, rel=1e-5 if "svd_ddof1_f32" in peer else 1e-7, abs=4e-3), peer


def test_distance_does_not_depend_on_the_side_or_on_numpy_or_torch():
    real, fake = cases.pair("small_d8")
    value = frechet_distance(real, fake)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == value
    assert frechet_distance(fake, real) == pytest.approx(value, rel=1e-12)
    assert kernel_distance(torch.from_numpy(real), fake) == kernel_distance(real, fake)


def test_sets_may_have_different_sizes_on_either_side_of_the_width():
    generator = np.random.default_rng(0)
    tall, wide = generator.normal(size=(100, 10)), generator.normal(size=(5, 10))
    covariances = np.cov(tall.T) @ np.cov(wide.T)
    root_trace = np.sqrt(np.maximum(np.linalg.eigvals(covariances).real, 0)).sum()
    exact = ((tall.mean(0) - wide.mean(0)) ** 2).sum() + np.trace(np.cov(tall.T)) + np.trace(np.cov(wide.T))
    assert frechet_distance(tall, wide) == pytest.approx(exact - 2 * root_trace, rel=1e-5)


def test_kernel_distance_of_two_points_by_hand():
    # D = 1: k(1, 2) = 27, k(0, 1) = 1; cross terms k = 1, 8, 1, 27.
    real, fake = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    assert kernel_distance(real, fake) == pytest.approx(27 + 1 - 2 * (1 + 8 + 1 + 27) / 4)


GOOD = np.ones((3, 2))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (np.ones(3), "fake features must have shape"),
        (np.ones((3, 0)), "fake features must have shape"),
        (np.ones((3, 3)), "same number of features, got 2 and 3"),
        (np.ones((1, 2)), "at least 2 rows, got 1"),
        (np.ones((3, 2), dtype=int), "must be floating point"),
        (torch.ones((3, 2), dtype=torch.int64), "must be floating point"),
        (np.array([[1.0, np.nan], [np.inf, 0.0], [0.0, 0.0]]), "NaN or infinity in 2 of 3 rows"),
    ],
)
def test_bad_features_are_refused(distance, fake, message):
    with pytest.raises(ValueError, match=message):
        distance(GOOD, fake)


def test_ddof_is_0_or_1():
    with pytest.raises(ValueError, match="ddof"):
        frechet_distance(GOOD, GOOD, ddof=2)


def test_gaussians_of_known_distance():
    generator = np.random.default_rng(0)
    a, b, mean = generator.uniform(0.1, 4, 7), generator.uniform(0.1, 4, 7), generator.normal(size=7)
    diagonal = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    zero = np.zeros(7)
    assert gaussian_distance(mean, np.diag(a), zero, np.diag(b)) == pytest.approx(diagonal, rel=1e-12)
    # 2 x 2: tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)).
    first, second = (x @ x.T for x in generator.normal(size=(2, 2, 2)))
    cross = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first @ second)))
    exact = np.trace(first + second) - 2 * cross
    assert gaussian_distance(zero[:2], first, zero[:2], second) == pytest.approx(exact, rel=1e-9)
    # Orthogonal supports do not interact, and without spread only the means count.
    apart, nothing = (np.diag([2.0, 3.0, 0.0, 0.0]), np.diag([0.0, 0.0, 1.0, 4.0])), np.zeros((2, 2))
    values = {
        "orthogonal_supports": gaussian_distance(zero[:4], apart[0], zero[:4], apart[1]),
        "zero_cov": gaussian_distance(zero[:2], nothing, np.array([0.0, 3.0]), nothing),
    }
    for name, value in values.items():
        case = EXPECTED["gaussians"][name]
        for expected in (case["exact"], *case["frechet"].values()):
            assert value == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_moments_of_shards_are_those_of_the_whole(shards, ddof):
    real, fake = cases.pair("d64_n512")
    real, fake = real + 1e4, fake + 1e4  # plain sums of squares would lose the variance
    merged = [Moments.of_all(np.array_split(features, shards)) for features in (real, fake)]
    assert merged[0].count == 512
    assert frechet_from_moments(*merged, ddof) == pytest.approx(frechet_distance(real, fake, ddof), rel=1e-9)


def test_moments_of_few_rows():
    one = Moments.of(np.ones((1, 3)))
    assert one.merge(Moments.of(np.zeros((1, 3)))).covariance().tolist() == np.full((3, 3), 0.5).tolist()
    with pytest.raises(ValueError, match="at least 2 rows"):
        one.covariance()
    with pytest.raises(ValueError, match="no rows"):
        Moments.of_all([])
    with pytest.raises(ValueError, match="cannot be merged"):
        one.merge(Moments.of(np.ones((1, 2))))
    with pytest.raises(ValueError, match="same number of features"):
        frechet_from_moments(Moments.of(np.ones((3, 2))), Moments.of(np.ones((3, 3))))
