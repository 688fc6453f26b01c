import math
from typing import Any

import numpy as np
import pytest

from ardiff.metrics.drift import STATISTICS
from ardiff.sweep.statistics import deviation, drift, segment_length, video_statistics
from ardiff.sweep.summary import aligned


def moving(frames: int, speed: int = 1, level: int = 100) -> np.ndarray:
    """A bright square that moves over grey, uint8 ``(F, 32, 32, 3)``."""
    video = np.full((frames, 32, 32, 3), level, np.uint8)
    for f in range(frames):
        x = f * speed % 24
        video[f, 8:16, x : x + 8] = 220
    return video


def test_parts_are_of_16_frames_or_half_a_short_video() -> None:
    assert [segment_length(n) for n in (2, 3, 16, 31, 32, 128)] == [2, 2, 8, 15, 16, 16]
    for frames, parts in ((128, 8), (40, 2), (16, 2), (3, 1)):
        found = video_statistics(moving(frames))
        assert found.keys() == STATISTICS.keys()
        assert all(len(values) == parts for values in found.values())
    assert video_statistics(moving(1)) == {}


def test_drift_is_the_largest_relative_change() -> None:
    assert drift(video_statistics(np.full((64, 8, 8, 3), 9, np.uint8))) == 0
    steady = moving(64, speed=0)
    fading = steady.copy()
    fading[48:] //= 2
    assert drift(video_statistics(steady)) == 0
    assert drift(video_statistics(fading)) == pytest.approx(0.5, abs=0.02)
    assert math.isnan(drift({}))


def test_deviation_ranks_real_before_blurred_and_frozen() -> None:
    generator = np.random.default_rng(0)
    levels = generator.integers(90, 110, 20)
    real = [video_statistics(moving(16, 1 + n % 2, int(level))) for n, level in enumerate(levels)]
    real = [{name: [float(np.mean(v))] for name, v in clip.items()} for clip in real]
    own = [deviation(clip, real) for clip in real]
    assert 0.7 < np.mean(own) < 2
    frozen = np.repeat(moving(1), 64, axis=0)
    assert deviation(video_statistics(moving(64)), real) < 2 < deviation(video_statistics(frozen), real)
    assert math.isnan(deviation({}, real))
    with pytest.raises(ValueError, match="two real clips"):
        deviation(real[0], real[:1])


def test_tables_are_aligned() -> None:
    lines: Any = aligned(["cell", "videos"], [["a long name", "3"], ["b", "12"]])
    assert lines == ["cell         videos", "a long name       3", "b                12"]
