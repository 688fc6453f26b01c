"""Spread and bias of distances, on Gaussians whose distance is known."""

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from ardiff.metrics.frechet import frechet_distance, kernel_distance
from ardiff.metrics.uncertainty import (
    Videos,
    centred_interval,
    distance_at_infinity,
    floor_halves,
    resampled_distance,
    set_distance,
    subset_distance,
    subset_sizes,
)

WIDTH = 6


def features(seed: int, count: int, shift: float = 0.0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, rows, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_set_distance_is_over_all_rows(rows: int) -> None:
    real, fake = features(0, 40, rows=rows), features(1, 30, 0.5, rows)
    flat = real.reshape(-1, WIDTH), fake.reshape(-1, WIDTH)
    assert set_distance(real, fake, "frechet", 0) == frechet_distance(*flat, ddof=0)
    assert set_distance(real, fake, "kernel") == kernel_distance(*flat)
    with pytest.raises(ValueError, match="unknown distance"):
        set_distance(real, fake, "cosine")  # type: ignore[arg-type]


def test_many_rows_go_through_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(0, 400, rows=2), features(1, 300, 0.5, 2)
    direct = set_distance(real, fake, "frechet", 1)
    monkeypatch.setattr("ardiff.metrics.uncertainty.CHUNK", 128)
    assert set_distance(real, fake, "frechet", 1) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_blocks_of_videos_give_what_all_at_once_gives(shards: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also resampled, in subsets and of chosen videos; by moments, and of all rows where they are few."""
    real, fake = features(0, 60, rows=3), features(1, 50, 0.5, 3)
    direct = (
        set_distance(real, fake, "frechet"),
        resampled_distance(real, fake, "frechet", 1, 0, 3),
        subset_distance(real, fake, "frechet", 1, 0, 30, 2),
        set_distance(real[20:], fake[::2], "frechet"),
        set_distance(real, fake, "kernel"),
    )
    monkeypatch.setattr("ardiff.metrics.uncertainty.CHUNK", chunk)
    x, y = (Videos.of(partial(np.array_split, side, shards), len(side)) for side in (real, fake))
    assert (len(x), x.depth) == (60, 3)
    assert direct == pytest.approx(
        (
            set_distance(x, y, "frechet"),
            resampled_distance(x, y, "frechet", 1, 0, 3),
            subset_distance(x, y, "frechet", 1, 0, 30, 2),
            set_distance(x[20:], y[np.arange(0, 50, 2)], "frechet"),
            set_distance(x, y, "kernel"),
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
        real, fake = (Videos.of(partial(drawn, count), count) for _ in range(2))
        gc.collect()
        tracemalloc.start()
        if resampled:
            resampled_distance(real, fake, "frechet", 1, 0, 0)
        else:
            set_distance(real, fake, "frechet")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 1024 * 64 * 32 * 4 / 2  # the features of a side are twice as much


def test_the_interval_is_as_wide_as_repetitions_spread() -> None:
    """20 pairs of sets: how their distances spread against how wide one pair's interval is."""
    values = [set_distance(features(2 * i, 80), features(2 * i + 1, 80, 0.7), "frechet") for i in range(20)]
    real, fake = features(0, 80), features(1, 80, 0.7)
    score = set_distance(real, fake, "frechet")
    low, high = centred_interval(score, [resampled_distance(real, fake, "frechet", 1, 0, i) for i in range(100)])
    assert low < score < high
    assert 0.5 < (high - low) / (2 * 1.96 * np.std(values)) < 2.0


def test_resamples_are_functions_of_seed_and_index_and_keep_videos_whole() -> None:
    real, fake = features(0, 20), features(1, 20, 1.0)
    draws = [resampled_distance(real, fake, "frechet", 1, seed, index) for seed in (0, 1) for index in (0, 1)]
    assert len(set(draws)) == 4
    assert draws[0] == resampled_distance(real, fake, "frechet", 1, 0, 0)
    constant = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 4, 2), np.float32)
    twice = resampled_distance(constant, constant, "frechet", 0, 0, 0)
    assert twice == pytest.approx(resampled_distance(constant[:, :1], constant[:, :1], "frechet", 0, 0, 0), rel=1e-9)


def test_the_line_over_1_n_takes_the_bias_out() -> None:
    """d = 60, N = 300: the distance of shifted Gaussians is 60 x 0.1^2 = 0.6, the estimate far above it."""
    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 1, 60))
    fake = generator.normal(0.1, 1.0, size=(300, 1, 60))
    plain = set_distance(real, fake, "frechet")
    sizes = [size for size in subset_sizes(300) for _ in range(3)]
    values = [subset_distance(real, fake, "frechet", 1, 0, size, i) for i, size in enumerate(sizes)]
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
    left, right = floor_halves(videos)
    assert {videos[i] for i in left}.isdisjoint({videos[i] for i in right})
    assert len(left) == len(right) == 2
    assert floor_halves(["a", "a"]) == ([], [])
