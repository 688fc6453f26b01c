"""Spread and bias of distances, on Gaussians whose distance is known."""

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from ardiff.metrics.distances import Features, Frechet, Kernel
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.frechet import frechet_distance, kernel_distance
from ardiff.metrics.uncertainty import (
    Resampling,
    centred_interval,
    disjoint_halves,
    distance_at_infinity,
    real_vs_real,
    resampled_distance,
    subset_distance,
    subset_sizes,
)

WIDTH = 6


def features(seed: int, count: int, shift: float = 0.0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, rows, WIDTH)).astype(np.float32)


def resample(real: Features, fake: Features, seed: int, index: int, ddof: int = 1) -> float:
    return resampled_distance(real, fake, distance=Frechet(ddof), seed=seed, index=index)


def subset(real: Features, fake: Features, seed: int, size: int, index: int) -> float:
    return subset_distance(real, fake, distance=Frechet(), seed=seed, size=size, index=index)


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
        resample(real, fake, 0, 3),
        subset(real, fake, 0, 30, 2),
        Frechet()(real[20:], fake[::2]),
        Kernel()(real, fake),
    )
    monkeypatch.setattr("ardiff.metrics.distances.CHUNK", chunk)
    x, y = (VideoFeatures.of(partial(np.array_split, side, shards), len(side)) for side in (real, fake))
    assert (len(x), x.depth) == (60, 3)
    assert direct == pytest.approx(
        (
            Frechet()(x, y),
            resample(x, y, 0, 3),
            subset(x, y, 0, 30, 2),
            Frechet()(x[20:], y[np.arange(0, 50, 2)]),
            Kernel()(x, y),
        ),
        rel=1e-9,
    )


def drawn(count: int) -> Iterator[np.ndarray]:
    """Blocks of 8 videos of 64 frames, made as they are gone through."""
    for number in range(count // 8):
        yield np.random.default_rng(number).normal(size=(8, 64, 32)).astype(np.float32)


@pytest.mark.parametrize("resampled", [False, True])
def test_memory_does_not_grow_with_the_number_of_videos(resampled: bool) -> None:
    peaks = []
    for count in (128, 1024):
        real, fake = (VideoFeatures.of(partial(drawn, count), count) for _ in range(2))
        gc.collect()
        tracemalloc.start()
        if resampled:
            resample(real, fake, 0, 0)
        else:
            Frechet()(real, fake)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 1024 * 64 * 32 * 4 / 2  # the features of a side are twice as much


def test_the_interval_is_as_wide_as_repetitions_spread() -> None:
    """20 pairs of sets: how their distances spread against how wide one pair's interval is."""
    values = [Frechet()(features(2 * i, 80), features(2 * i + 1, 80, 0.7)) for i in range(20)]
    real, fake = features(0, 80), features(1, 80, 0.7)
    score = Frechet()(real, fake)
    low, high = centred_interval(score, [resample(real, fake, 0, i) for i in range(100)])
    assert low < score < high
    assert 0.5 < (high - low) / (2 * 1.96 * np.std(values)) < 2.0


def test_resamples_are_functions_of_seed_and_index_and_keep_videos_whole() -> None:
    real, fake = features(0, 20), features(1, 20, 1.0)
    draws = [resample(real, fake, seed, index) for seed in (0, 1) for index in (0, 1)]
    assert len(set(draws)) == 4
    assert draws[0] == resample(real, fake, 0, 0)
    constant = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 4, 2), np.float32)
    twice = resample(constant, constant, 0, 0, ddof=0)
    assert twice == pytest.approx(resample(constant[:, :1], constant[:, :1], 0, 0, ddof=0), rel=1e-9)


def test_the_line_over_1_n_takes_the_bias_out() -> None:
    """d = 60, N = 300: the distance of shifted Gaussians is 60 x 0.1^2 = 0.6, the estimate far above it."""
    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 1, 60))
    fake = generator.normal(0.1, 1.0, size=(300, 1, 60))
    plain = Frechet()(real, fake)
    sizes = [size for size in subset_sizes(300) for _ in range(3)]
    values = [subset(real, fake, 0, size, i) for i, size in enumerate(sizes)]
    assert plain > 5
    assert abs(distance_at_infinity(sizes, values) - 0.6) < 0.25 * (plain - 0.6)


def test_subset_sizes() -> None:
    assert subset_sizes(8)[0] == 2
    assert subset_sizes(2048)[0] == 512
    assert subset_sizes(2048)[-1] == 2048
    with pytest.raises(ValueError, match="two sizes"):
        distance_at_infinity([5, 5], [1.0, 1.0])
    with pytest.raises(ValueError, match="2 resamples"):
        centred_interval(1.0, [1.0])


def test_a_line_through_exact_values() -> None:
    sizes = [10, 20, 40]
    assert distance_at_infinity(sizes, [3 + 50 / n for n in sizes]) == pytest.approx(3.0)


def test_halves_share_no_video() -> None:
    videos = ["a", "b", "c", "a", "b", "c", "a"]
    left, right = disjoint_halves(videos)
    assert {videos[i] for i in left}.isdisjoint({videos[i] for i in right})
    assert len(left) == len(right) == 2
    assert disjoint_halves(["a", "a"]) == ([], [])


@pytest.mark.parametrize(("distance", "bootstrap"), [(Frechet(), 5), (Kernel(), 0)])
def test_resampling_gives_interval_and_extrapolation(distance: Frechet | Kernel, bootstrap: int) -> None:
    real, fake = features(0, 40), features(1, 40, 0.5)
    resampling = Resampling(distance=distance, num_videos=40, bootstrap=bootstrap, seed=3)
    distances = [draw(real, fake) for draw in resampling.draws()]
    assert distances[:bootstrap] == [
        resampled_distance(real, fake, distance=distance, seed=3, index=i) for i in range(bootstrap)
    ]
    score = distance(real, fake)
    uncertainty = resampling.summarize(score, distances)
    if bootstrap:
        assert (uncertainty.low, uncertainty.high) == centred_interval(score, distances[:bootstrap])
        sizes = [size for size in subset_sizes(40) for _ in range(3)]
        assert uncertainty.infinity == distance_at_infinity(sizes, distances[bootstrap:])
    else:
        assert (uncertainty.low, uncertainty.high, uncertainty.infinity) == (None, None, None)


def test_baseline_is_at_the_number_of_clips_if_there_are_twice_as_many() -> None:
    real = features(0, 8)
    baseline = real_vs_real(real, [str(i) for i in range(8)], 4, Frechet(0))
    assert (baseline.distance, baseline.num_clips) == (Frechet(0)(real[:4], real[4:]), 4)
    halves = real_vs_real(real, [str(i) for i in range(8)], 8, Frechet(0))
    assert (halves.distance, halves.num_clips) == (Frechet(0)(real[::2], real[1::2]), 4)
    assert real_vs_real(real, ["a"] * 8, 8, Frechet(0)).distance is None
