"""Spread and bias of distances, on Gaussians whose distance is known."""

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from ardiff.metrics.distances import Features, Frechet, Kernel, Polynomial, union_distances
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.frechet import frechet_distance, kernel_distance
from ardiff.metrics.uncertainty import (
    PAIRINGS,
    QUANTILE,
    PartDistances,
    Resampling,
    Uncertainty,
    disjoint_halves,
    mean_with_interval,
    partition_distances,
    real_vs_real,
)

WIDTH = 6
FRECHET = Frechet()


def features(seed: int, count: int, shift: float = 0.0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, rows, WIDTH)).astype(np.float32)


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def partition(real: Features, fake: Features, seed: int = 0, index: int = 0, ddof: int = 1) -> list[float]:
    """The distances of a partition of clips that are each of another video."""
    sides = {"real_videos": names(len(real)), "fake_videos": names(len(fake))}
    return partition_distances(real, fake, distance=Frechet(ddof), seed=seed, index=index, **sides)


def resampled(real: np.ndarray, fake: np.ndarray, distance: Frechet | Kernel = FRECHET, **changes: int) -> Uncertainty:
    sides = {"real_videos": names(len(real)), "fake_videos": names(len(fake))}
    resampling = Resampling(distance=distance, **{"partitions": 16, "seed": 0, **changes}, **sides)
    return resampling.summarize(distance(real, fake), WIDTH, [draw(real, fake) for draw in resampling.draws()])


@pytest.mark.parametrize("rows", [1, 3])
def test_distances_use_all_rows(rows: int) -> None:
    real, fake = features(0, 40, rows=rows), features(1, 30, 0.5, rows)
    flat = real.reshape(-1, WIDTH), fake.reshape(-1, WIDTH)
    assert Frechet(0)(real, fake) == frechet_distance(*flat, ddof=0)
    assert Kernel()(real, fake) == kernel_distance(*flat)


def test_many_rows_go_through_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(0, 400, rows=2), features(1, 300, 0.5, 2)
    direct = Frechet(1)(real, fake)
    monkeypatch.setattr("ardiff.metrics.distances.CHUNK", 128)
    assert Frechet(1)(real, fake) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_blocks_of_videos_give_what_all_at_once_gives(shards: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also resampled, in subsets and of chosen videos; by moments, and of all rows where they are few."""
    real, fake = features(0, 60, rows=3), features(1, 50, 0.5, 3)
    direct = (
        Frechet()(real, fake),
        *partition(real, fake, index=3),
        Frechet()(real[20:], fake[::2]),
        Kernel()(real, fake),
    )
    monkeypatch.setattr("ardiff.metrics.distances.CHUNK", chunk)
    x, y = (VideoFeatures.of(partial(np.array_split, side, shards), len(side)) for side in (real, fake))
    assert (len(x), x.depth) == (60, 3)
    assert direct == pytest.approx(
        (
            Frechet()(x, y),
            *partition(x, y, index=3),
            Frechet()(x[20:], y[np.arange(0, 50, 2)]),
            Kernel()(x, y),
        ),
        rel=1e-9,
    )


def drawn(count: int) -> Iterator[np.ndarray]:
    """Blocks of 8 videos of 64 frames, made as they are gone through."""
    for number in range(count // 8):
        yield np.random.default_rng(number).normal(size=(8, 64, 32)).astype(np.float32)


@pytest.mark.parametrize("parts", [False, True])
def test_memory_does_not_grow_with_the_number_of_videos(parts: bool) -> None:
    peaks = []
    for count in (128, 1024):
        real, fake = (VideoFeatures.of(partial(drawn, count), count) for _ in range(2))
        gc.collect()
        tracemalloc.start()
        if parts:
            partition(real, fake)
        else:
            Frechet()(real, fake)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 1024 * 64 * 32 * 4 / 2  # the features of a side are twice as much


@pytest.mark.parametrize(("shift", "distance"), [(0.0, Frechet()), (0.7, Frechet()), (0.7, Kernel())])
def test_95_percent_intervals_have_the_mean_score(shift: float, distance: Frechet | Kernel) -> None:
    """For equal and for different distributions; `benchmarks/metrics.py coverage` measures it at real sizes."""
    pairs = [(features(2 * i, 64), features(2 * i + 1, 64, shift)) for i in range(80)]
    mean = np.mean([distance(real, fake) for real, fake in pairs])
    intervals = [resampled(real, fake, distance) for real, fake in pairs]
    covered = [u.low is not None and u.high is not None and u.low <= mean <= u.high for u in intervals]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_intervals_and_extrapolations_are_not_negative() -> None:
    real, fake = features(0, 64), features(1, 64)
    kernel, frechet = resampled(real, fake, Kernel()), resampled(real, fake)
    assert kernel.low == frechet.infinity_low == 0.0
    assert kernel.high is not None
    assert kernel.high > 0.0
    same = resampled(real, real)
    assert (same.infinity, same.infinity_low) == (0.0, 0.0)


def test_the_variance_is_a_series_in_1_over_n() -> None:
    """Distances of parts that spread by a known factor: the deviation of the whole follows from their variances."""
    generator = np.random.default_rng(0)

    def deviation(factor: float) -> float:
        quarters = generator.normal(size=(4000, 4)) * 2.0 * factor
        halves = generator.normal(size=(4000, 2 * len(PAIRINGS))) * 2.0
        return PartDistances(np.concatenate([quarters, halves], axis=1)).deviation()

    assert deviation(2**0.5) == pytest.approx(2**0.5, rel=0.05)  # the variance falls as 1/N
    assert deviation(2.0) == pytest.approx(1.0, rel=0.05)  # as 1/N^2
    # 4 in a half and 12 in a quarter are 1 / N and 0.5 / N^2 of the whole's 1 + 0.5
    assert deviation(3**0.5) == pytest.approx(1.5**0.5, rel=0.05)
    assert deviation(1.0) == pytest.approx(2**0.5, rel=0.05)
    assert deviation(8.0) == pytest.approx(1.0, rel=0.05)
    assert PartDistances(np.ones((3, 10))).deviation() == 0.0


def test_distances_of_unions_are_those_of_all_their_rows() -> None:
    """By merged moments where parts have more rows than features, and directly: few rows, or a constant feature."""
    unions = [(0,), (3,), (0, 1), (1, 3)]
    for count, constant in ((200, False), (12, False), (200, True)):
        sides = [features(seed, count, 0.3 * seed, rows=2) for seed in (0, 1)]
        if constant:
            sides[0][..., 0] = sides[1][..., 0] = 1.0
        parts = [[VideoFeatures.wrap(side)[i::4] for i in range(4)] for side in sides]
        for ddof in (0, 1):
            direct = [
                Frechet(ddof)(*(np.concatenate([part[i].array() for i in union]) for part in parts)) for union in unions
            ]
            assert union_distances(Frechet(ddof), *parts, unions) == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize("distance", [Kernel(), Polynomial()])
def test_kernel_distances_of_unions_are_those_of_all_their_rows(distance: Kernel | Polynomial) -> None:
    """Parts of different sizes on both sides."""
    generator = np.random.default_rng(0)
    sides = [[generator.normal(shift, 1, (n, 1, 6)) for n in sizes] for shift, sizes in ((0, (5, 3)), (0.7, (4, 6)))]
    unions = [(0,), (1,), (0, 1)]
    direct = [distance(*(np.concatenate([side[i] for i in union]) for side in sides)) for union in unions]
    parts = ([VideoFeatures.wrap(part) for part in side] for side in sides)
    assert union_distances(distance, *parts, unions) == pytest.approx(direct, rel=1e-12)


def test_partitions_are_functions_of_seed_and_index_and_keep_videos_whole() -> None:
    real, fake = features(0, 20), features(1, 20, 1.0)
    draws = [partition(real, fake, seed, index) for seed in (0, 1) for index in (0, 1)]
    assert len({tuple(d) for d in draws}) == 4
    assert draws[0] == partition(real, fake, 0, 0)
    constant = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 4, 2), np.float32)
    assert partition(constant, constant, ddof=0) == pytest.approx(partition(constant[:, :1], constant[:, :1], ddof=0))

    class Videos:
        """Collects which rows are in each part."""

        ddof, biased = 0, True

        def __init__(self) -> None:
            self.parts: list[set[float]] = []

        def __call__(self, x: Features, y: Features) -> float:
            self.parts.append(set(VideoFeatures.wrap(x).array().ravel().tolist()))
            return 0.0

    seen, clips = Videos(), np.arange(24, dtype=np.float32)[:, None, None]
    videos = [str(i % 8) for i in range(24)]  # three clips of each of 8 videos
    partition_distances(clips, clips, distance=seen, real_videos=videos, fake_videos=names(24), seed=0, index=0)
    quarters, halves = seen.parts[:4], seen.parts[4:]
    assert [len(part) for part in quarters] == [6] * 4
    assert set().union(*quarters) == set(range(24))
    assert all(len({int(clip) % 8 for clip in part}) == 2 for part in quarters)
    assert halves[0] == quarters[0] | quarters[1]
    assert halves[0] | halves[1] == halves[2] | halves[3] == halves[4] | halves[5] == set(range(24))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_n_to_infinity_takes_the_bias_out_and_has_an_interval(shift: float) -> None:
    """d = 60, N = 300: the distance of Gaussians with shifted means is 60 shift^2, the estimate far above it."""
    real = np.random.default_rng(0).normal(size=(300, 1, 60))
    fake = np.random.default_rng(1).normal(shift, 1.0, size=(300, 1, 60))
    resampling = Resampling(distance=Frechet(), partitions=16, seed=0, real_videos=names(300), fake_videos=names(300))
    score, draws = Frechet()(real, fake), [draw(real, fake) for draw in resampling.draws()]
    u = resampling.summarize(score, 60, draws)
    assert score > 5
    assert u.infinity is not None
    assert u.infinity_low is not None
    assert u.infinity_high is not None
    assert abs(u.infinity - 60 * shift**2) < 0.05 * score
    assert u.infinity_low <= 60 * shift**2 <= u.infinity_high
    assert resampling.summarize(score, 76, draws).infinity is None, "a quarter has 75 videos"


def test_an_extrapolation_of_exact_values() -> None:
    """The bias a / N + b / N^2 goes."""
    of = {size: 3.0 + 50.0 / size + 700.0 / size**2 for size in (40, 20, 10)}
    parts = PartDistances(np.array([[of[10]] * 4 + [of[20]] * 6]))
    assert parts.distance_at_infinity(of[40]) == pytest.approx(3.0)


def test_what_few_videos_allow() -> None:
    """No interval below 8 videos, and no extrapolation below 4 videos per feature or from clips of few videos."""
    assert resampled(features(0, 7), features(1, 7)) == Uncertainty()
    few = resampled(features(0, 4 * WIDTH - 1), features(1, 40))
    assert few.low is not None
    assert few.infinity is None
    assert resampled(features(0, 4 * WIDTH), features(1, 40)).infinity is not None
    assert resampled(features(0, 40), features(1, 40), Kernel()).infinity is None, "it has no bias"
    assert resampled(features(0, 40), features(1, 40), partitions=0) == Uncertainty()
    clips = Resampling(
        distance=Frechet(), partitions=2, seed=0, real_videos=[str(i % 7) for i in range(40)], fake_videos=names(40)
    )
    assert (clips.num_videos, clips.draws()) == (7, [])


def test_halves_share_no_video_and_have_the_same_classes() -> None:
    clips = [(name, 0) for name in ("a", "b", "c", "a", "b", "c", "a")]
    left, right = disjoint_halves(clips)
    assert {clips[i] for i in left}.isdisjoint({clips[i] for i in right})
    assert len(left) == len(right) == 2
    assert disjoint_halves([("a", 0), ("a", 0)]) == ([], [])
    alternating = [(str(i), i % 2) for i in range(8)]
    assert [sorted(alternating[i][1] for i in half) for half in disjoint_halves(alternating)] == [[0, 0, 1, 1]] * 2


def test_baseline_is_at_the_number_of_clips_if_there_are_twice_as_many() -> None:
    real, clips = features(0, 8), [(str(i), 0) for i in range(8)]
    baseline = real_vs_real(real, clips, 4, Frechet(0))
    assert (baseline.distance, baseline.num_clips) == (Frechet(0)(real[:4], real[4:]), 4)
    halves = real_vs_real(real, clips, 8, Frechet(0))
    assert (halves.distance, halves.num_clips) == (Frechet(0)(real[::2], real[1::2]), 4)
    assert real_vs_real(real, [("a", 0)] * 8, 8, Frechet(0)).distance is None


def test_means_have_students_interval_within_what_can_be() -> None:
    values = np.array([0.2, 0.4, 0.9])
    mean, u = mean_with_interval(values)
    assert mean == pytest.approx(0.5)
    half = 4.302653 * values.std(ddof=1) / 3**0.5
    assert (u.low, u.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert mean_with_interval(values, 0.0, 1.0)[1] == Uncertainty(0.0, 1.0)
    assert QUANTILE > 1.96
