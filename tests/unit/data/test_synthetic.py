from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ardiff.data import storage
from ardiff.data.config import SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.manifest import Split
from ardiff.data.probe import probe
from ardiff.data.synthetic import BACKGROUND, CLASSES, render_video, signed_distance, video_length
from ardiff.data.synthetic_set import write_video
from ardiff.resolution import Resolution

CONFIG = SyntheticConfig(num_train=8, num_test=8, num_long=1, long_frames=60)
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def centroid(video: np.ndarray) -> np.ndarray:
    """Centre of what differs from the background, (F, 2), in pixels."""
    weight = np.abs(video.astype(float) - round(255 * BACKGROUND)).sum(-1)
    y, x = (np.arange(side) + 0.5 for side in video.shape[1:3])
    return (
        np.stack([np.einsum("fyx,y->f", weight, y), np.einsum("fyx,x->f", weight, x)], -1) / weight.sum((1, 2))[:, None]
    )


def test_video_is_a_function_of_seed_split_and_index() -> None:
    first = render_video(CONFIG, 3, "train")
    assert np.array_equal(first, render_video(CONFIG, 3, "train"))
    others: list[tuple[SyntheticConfig, int, Split]] = [
        (CONFIG, 3, "test"),
        (CONFIG, 7, "train"),
        (SyntheticConfig(seed=1), 31, "train"),
    ]
    for config, index, split in others:
        assert not np.array_equal(first, render_video(config, index, split))


def test_longer_videos_begin_alike() -> None:
    longer = SyntheticConfig(num_long=0, num_frames=100)
    assert np.array_equal(render_video(longer, 5, "train")[:48], render_video(SyntheticConfig(num_long=0), 5, "train"))


def test_lengths_and_shapes() -> None:
    assert render_video(CONFIG, 0, "train").shape == (60, 32, 32, 3)
    assert render_video(CONFIG, 0, "test").shape == (48, 32, 32, 3)
    assert render_video(CONFIG, 1, "train").dtype == np.uint8


@pytest.mark.parametrize("index", range(4))
def test_motion_stays_inside_and_keeps_its_speed(index: int) -> None:
    video = render_video(CONFIG, index, "test")
    mass = (video.astype(float) - round(255 * BACKGROUND)).sum((1, 2, 3))
    assert mass.min() > 0.95 * mass.max()  # no part is ever cut off
    speed = np.linalg.norm(np.diff(centroid(video), axis=0), axis=-1)
    assert 0.9 < np.median(speed) < 2.1
    assert speed.max() < 2.1


def test_shapes_differ_and_are_antialiased() -> None:
    y, x = np.mgrid[-10:11, -10:11].astype(float)
    masks = [signed_distance(name, y, x, 7.0) < 0 for name in CLASSES]
    for i, mask in enumerate(masks):
        assert 40 < mask.sum() < 160
        assert all((mask != other).sum() > 20 for other in masks[:i])
    assert len(np.unique(render_video(CONFIG, 0, "test")[0])) > 10
    with pytest.raises(ValueError, match="unknown shape"):
        signed_distance("star", y, x, 7.0)


def test_written_video_matches_its_record_and_is_reproducible(tmp_path: Path) -> None:
    record = write_video(CONFIG, str(tmp_path / "a"), 6, "test")
    again = write_video(CONFIG, str(tmp_path / "b"), 6, "test")
    assert record.uri == f"{tmp_path}/a/test/triangle/test_00006.mp4"
    data = storage.read_bytes(record.uri)
    both = [
        decode_clip(storage.read_bytes(r.uri), 0, video_length(CONFIG, 6, "test")).astype(float)
        for r in (record, again)
    ]
    assert np.abs(both[0] - both[1]).mean() < 1.0
    found = probe(data)
    assert (found.codec, found.width, found.height) == (record.codec, record.width, record.height)
    assert (found.fps, found.num_frames, len(data)) == (record.fps, record.num_frames, record.size)
    assert (record.label, record.class_name, record.split, record.status) == (2, "triangle", "test", "ok")


def test_classes_are_balanced(tmp_path: Path) -> None:
    labels = [write_video(CONFIG, str(tmp_path), i, "train").label for i in range(8)]
    assert [labels.count(k) for k in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("index", range(8))
def test_encoding_keeps_brightness_well_and_colour_as_far_as_420_can(tmp_path: Path, index: int) -> None:
    """4:2:0 without any codec gives about 33 dB in RGB on these shapes, so no ``crf`` can give more."""
    video = render_video(CONFIG, index, "test").astype(float)
    decoded = decode_clip(storage.read_bytes(write_video(CONFIG, str(tmp_path), index, "test").uri), 0, 48)
    error = decoded - video
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 28.5
    assert 10 * np.log10(255**2 / np.mean((error @ BRIGHTNESS) ** 2)) > 40


@pytest.mark.parametrize(
    "values",
    [
        {"num_train": 0},
        {"num_long": -1},
        {"resolution": Resolution.square(33)},
        {"resolution": Resolution(32, 12)},
        {"radius": 16.0},
        {"radius": 0.1},
    ],
)
def test_impossible_sizes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SyntheticConfig(**values)  # type: ignore[arg-type]


def test_shapes_bounce_between_the_walls_of_a_rectangle() -> None:
    wide = SyntheticConfig(resolution=Resolution(36, 64), num_long=0, num_frames=400)
    video = render_video(wide, 3, "train")
    assert video.shape == (400, 36, 64, 3)
    mass = (video.astype(float) - round(255 * BACKGROUND)).sum((1, 2, 3))
    assert mass.min() > 0.95 * mass.max()  # no part is ever cut off
    lowest, highest = centroid(video).min(axis=0), centroid(video).max(axis=0)
    np.testing.assert_allclose(lowest, 7, atol=1.5)
    np.testing.assert_allclose(highest, [36 - 7, 64 - 7], atol=1.5)


def test_the_record_of_a_rectangle(tmp_path: Path) -> None:
    config = SyntheticConfig(resolution=Resolution(24, 40), num_long=0, num_frames=2)
    record = write_video(config, str(tmp_path), 0, "test")
    found = probe(storage.read_bytes(record.uri))
    assert (record.width, record.height) == (found.width, found.height) == (40, 24)
