"""Baselines of video prediction, on objects whose motion is known."""

import numpy as np
import pytest

from ardiff.metrics.pairs.mse import frame_mse
from ardiff.metrics.predictors import BASELINES, constant_velocity, last_frame, regions


def moving(places: list[list[tuple[int, int]]], size: int = 6) -> np.ndarray:
    """Squares with a pattern at the given corners, one list per frame: uint8 ``(F, 40, 40, 3)``."""
    pattern = np.random.default_rng(0).integers(100, 256, (size, size, 3), dtype=np.uint8)
    frames = np.zeros((len(places), 40, 40, 3), np.uint8)
    for frame, corners in zip(frames, places, strict=True):
        for y, x in corners:
            frame[y : y + size, x : x + size] = pattern
    return frames


def test_objects_that_move_apart_are_predicted_exactly() -> None:
    video = moving([[(2 + 2 * t, 3 + t), (30 - t, 30 - 3 * t)] for t in range(8)])
    assert np.array_equal(constant_velocity(video[:4], 4), video[4:])


def test_the_last_frame_is_repeated() -> None:
    video = moving([[(t, t)] for t in range(5)])
    assert np.array_equal(last_frame(video[:3], 4), np.stack([video[2]] * 4))


def test_an_object_leaves_the_frame() -> None:
    video = moving([[(20, 20)], [(20, 26)]])
    predicted = constant_velocity(video, 4)
    assert predicted[0, 20:26, 32:38].any()
    assert not predicted[2:].any()


def test_regions_touch_at_corners() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    labels = regions(mask)
    assert len(np.unique(labels)) == 4
    assert labels[0, 0] == labels[1, 1] != labels[0, 3] == labels[1, 3]
    assert (labels[~mask] == 0).all()


def test_a_dark_video_stays_dark() -> None:
    assert all(not baseline(np.zeros((2, 8, 8, 3), np.uint8), 3).any() for baseline in BASELINES.values())


def test_mse_sums_over_pixels_and_averages_over_frames() -> None:
    original = np.zeros((2, 4, 5, 3), np.uint8)
    other = original.copy()
    other[0, 1, 1] = 255  # one white pixel in one of two frames
    assert frame_mse(original, other) == pytest.approx(0.5)
    other[1] = 51
    assert frame_mse(original, other) == pytest.approx(0.5 * (1 + 20 * 0.04))
