from dataclasses import replace

import numpy as np
import pytest

from ardiff.data.config import SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.synthetic import CLASSES, draw_scene, render_scene, render_video
from ardiff.metrics import controls
from ardiff.metrics.shapes import (
    SHAPE_MEASURES,
    frame_classes,
    frame_identity,
    majority,
    neighbours_alike,
    recognise,
    shape_measures,
)
from ardiff.metrics.tracking import MOTION_CHECKS, motion_checks, track
from ardiff.resolution import Resolution


def render(indices: range, resolution: int = 32, radius: float = 7.0) -> np.ndarray:
    config = SyntheticConfig(num_frames=16, num_long=0, resolution=Resolution.square(resolution), radius=radius)
    return np.stack([render_video(config, index, "train") for index in indices])


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """Frozen, so no test can change it for another."""
    videos = render(range(96))
    videos.setflags(write=False)
    return videos


def pass_rates(videos: np.ndarray) -> dict[str, float]:
    """The share of videos that pass each check, and all of them."""
    checks = [motion_checks(track(video)) for video in videos]
    rates = {name: float(np.mean([check[name] for check in checks])) for name in MOTION_CHECKS}
    return rates | {"all": float(np.mean([all(check.values()) for check in checks]))}


def random_videos(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(3, 6, 20, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", list(controls.CONTROLS))
def test_controls_keep_the_shape_and_depend_on_the_generator_alone(name):
    videos = random_videos()
    before = videos.copy()
    control = controls.CONTROLS[name]
    first, again = (control(videos, np.random.default_rng(7)) for _ in range(2))
    assert first.shape == videos.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, videos)
    assert np.array_equal(videos, before)
    if name != "blur":
        assert not np.array_equal(first, control(videos, np.random.default_rng(8)))


def test_shuffled_keeps_the_frames_of_each_video():
    videos = random_videos()
    shuffled = controls.shuffled_frames(videos, np.random.default_rng(0))
    for before, after in zip(videos, shuffled, strict=True):
        assert sorted(f.tobytes() for f in before) == sorted(f.tobytes() for f in after)


def test_frozen_repeats_one_frame_of_each_video():
    videos = random_videos()
    for before, after in zip(videos, controls.frozen(videos, np.random.default_rng(0)), strict=True):
        assert len({f.tobytes() for f in after}) == 1
        assert after[0].tobytes() in {f.tobytes() for f in before}


def test_content_swap_keeps_first_halves_and_exchanges_second_ones():
    videos = random_videos()
    swapped = controls.content_swap(videos, np.random.default_rng(0))
    assert np.array_equal(swapped[:, :3], videos[:, :3])
    assert sorted(v[3:].tobytes() for v in swapped) == sorted(v[3:].tobytes() for v in videos)
    assert not any(np.array_equal(a[3:], b[3:]) for a, b in zip(swapped, videos, strict=True))


def test_jitter_moves_whole_frames():
    videos = random_videos()
    moved = controls.jitter(videos, np.random.default_rng(0), pixels=2)
    for before, after in zip(videos.reshape(-1, 20, 17, 3), moved.reshape(-1, 20, 17, 3), strict=True):
        windows = [before[y : y + 16, x : x + 13].tobytes() for y in range(5) for x in range(5)]
        assert after[2:-2, 2:-2].tobytes() in windows


def test_identity_flicker_keeps_motion_and_colour_and_changes_the_shape(real):
    """Each frame is one of another video, moved by whole pixels to where the replaced frame has its object."""
    flickering = controls.identity_flicker(real, np.random.default_rng(0))
    identity, alike, distances = [], [], []
    for index, (before, after) in enumerate(zip(real, flickering, strict=True)):
        old, new = track(before), track(after)
        distances.append(np.linalg.norm(old.centroid - new.centroid, axis=1))
        assert np.abs(old.colour - new.colour).max() < 25
        classes = frame_classes(new)
        identity.append(frame_identity(classes, index % 4))
        alike.append(neighbours_alike(classes))
    assert np.quantile(distances, 0.95) < 0.3
    assert 0.15 < np.mean(identity) < 0.35  # one in four by chance
    assert 0.15 < np.mean(alike) < 0.35


def test_identity_flicker_takes_no_frame_of_the_same_video_nor_of_one_video_twice():
    """Four videos with one frame each that moves by whole pixels, so the source of each frame can be read off."""
    videos = np.full((4, 6, 24, 24, 3), 26, dtype=np.uint8)
    for video in range(4):
        for frame in range(6):
            videos[video, frame, 8 : 10 + 2 * video, 3 + 2 * frame : 7 + 2 * frame] = 200
    areas = (controls.identity_flicker(videos, np.random.default_rng(0)) == 200).sum(axis=(2, 3, 4))  # (4, 6)
    sources = (areas / 12 - 2) / 2  # areas are 4 (2 + 2 video) pixels of 3 channels
    assert len(set(sources.ravel()) & {0, 1, 2, 3}) == len(set(sources.ravel())) >= 3
    assert (sources != np.arange(4)[:, None]).all()
    assert (sources[:, 1:] != sources[:, :-1]).all()
    pair = (controls.identity_flicker(videos[:2], np.random.default_rng(0)) == 200).sum(axis=(2, 3, 4))
    assert np.array_equal((pair / 12 - 2) / 2, np.repeat([[1], [0]], 6, axis=1))


def test_blur_is_a_gaussian_that_keeps_plain_areas():
    plain = np.full((1, 1, 20, 20, 3), 77, dtype=np.uint8)
    assert np.array_equal(controls.blur(plain, 2.0), plain)
    point = np.zeros((1, 1, 21, 21, 3), dtype=np.uint8)
    point[:, :, 10, 10] = 255
    blurred = controls.blur(point, 1.0)[0, 0, :, :, 0].astype(float)
    assert np.array_equal(blurred, blurred.T)
    assert blurred[10, 10] == pytest.approx(255 / (2 * np.pi), abs=0.6)
    assert blurred[10, 11] / blurred[10, 10] == pytest.approx(np.exp(-0.5), abs=0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda videos: controls.blur(videos, 0.0),
        lambda videos: controls.jitter(videos, np.random.default_rng(0), pixels=0),
        lambda videos: controls.content_swap(videos[:1], np.random.default_rng(0)),
        lambda videos: controls.content_swap(videos[:, :1], np.random.default_rng(0)),
        lambda videos: controls.identity_flicker(videos[:1], np.random.default_rng(0)),
        lambda videos: controls.frozen(videos[0], np.random.default_rng(0)),
        lambda videos: controls.noise(videos.astype(float), np.random.default_rng(0)),
        lambda videos: controls.shuffled_frames(videos[:0], np.random.default_rng(0)),
    ],
)
def test_controls_refuse_bad_arguments(call):
    with pytest.raises(ValueError, match=r"must be|at least|expected"):
        call(random_videos())


def test_tracking_finds_where_the_shape_was_drawn():
    video = np.full((3, 32, 32, 3), 26, dtype=np.uint8)
    for frame, left in enumerate((4, 6, 9)):
        video[frame, 10:20, left : left + 8] = (200, 100, 26)
    tracking = track(video)
    assert tracking.centroid == pytest.approx(np.array([[14.5, 7.5], [14.5, 9.5], [14.5, 12.5]]))
    assert tracking.area == pytest.approx([80, 80, 80])
    assert tracking.colour == pytest.approx(np.tile([200, 100, 26], (3, 1)))
    assert tracking.one_object.all()
    assert np.array_equal(tracking.cover[0] > 0, (video[0, ..., 0] == 200))


def test_tracking_tells_none_one_and_two_objects():
    video = np.full((4, 32, 32, 3), 26, dtype=np.uint8)
    video[1, 4:12, 4:12] = 200
    video[2, 4:12, 4:12] = 200
    video[2, 20:28, 20:28] = 200
    video[3, 1:31, 1:31] = 200  # more than half of the frame
    tracking = track(video)
    assert tracking.one_object.tolist() == [False, True, False, False]
    assert np.isnan(tracking.area).tolist() == [True, False, False, False]
    assert np.isnan(tracking.centroid).all(axis=1).tolist() == [True, False, False, False]


def test_a_winding_object_is_one_piece():
    video = np.full((1, 32, 32, 3), 26, dtype=np.uint8)
    for row in range(4, 28, 4):
        video[0, row, 4:28] = 220
        video[0, row : row + 4, 27 if row % 8 else 4] = 220
    assert track(video).one_object.all()
    video[0, 14] = 26
    assert not track(video).one_object.any()


def test_real_clips_pass_and_are_recognised(real):
    compressed = np.stack([decode_clip(encode_video(video, 8.0, crf=8), 0, 16) for video in real[:48]])
    for videos in (real, compressed):
        summary = pass_rates(videos)
        assert summary["all"] >= 0.97, summary
        labels = np.arange(len(videos)) % len(CLASSES)
        assert np.mean([recognise(video) for video in videos] == labels) >= 0.99


def test_shapes_of_other_sizes_are_recognised():
    videos = render(range(8), resolution=64, radius=13.0)
    assert [recognise(video) for video in videos] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("control", "check", "most"),
    [
        ("content swap", "all", 0.2),
        ("jitter", "smooth motion", 0.05),
        ("shuffled frames", "smooth motion", 0.05),
        ("frozen", "plausible speed", 0.0),
        ("noise", "one object", 0.0),
        ("identity flicker", "steady area", 0.2),
    ],
)
def test_each_control_fails_its_check(real, control, check, most):
    summary = pass_rates(controls.CONTROLS[control](real[:24], np.random.default_rng(0)))
    assert summary[check] <= most
    assert summary["all"] <= most


def test_videos_without_an_object_fail_every_check_and_are_no_class():
    empty = np.full((16, 32, 32, 3), 26, dtype=np.uint8)
    checks = motion_checks(track(empty))
    assert set(checks) == set(MOTION_CHECKS)
    assert not any(checks.values())
    assert recognise(empty) == -1
    assert recognise(random_videos()[0]) == -1
    checker = np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (16, 16))
    assert not motion_checks(track(np.tile(checker[None, ..., None], (16, 1, 1, 3))))["one object"]


def test_a_shape_that_is_none_of_the_classes_is_not_recognised():
    video = np.full((4, 32, 32, 3), 26, dtype=np.uint8)
    video[:, 14:17, 3:29] = 200  # a bar
    assert track(video).one_object.all()
    assert recognise(video) == -1


def test_a_shape_seen_in_too_few_frames_is_not_recognised(real):
    video = real[1].copy()
    video[7:] = 26
    assert recognise(real[1]) == 1
    assert recognise(video) == -1


def drawn(shapes: list[str]) -> np.ndarray:
    """A video that moves evenly and shows the given shape in each frame; no object for an empty name."""
    scene = draw_scene(SyntheticConfig(), 0, "train")
    centre = scene.centres(len(shapes))
    frames = [
        render_scene(Resolution.square(32), replace(scene, shape=s or "ring"), centre[i : i + 1])[0]
        for i, s in enumerate(shapes)
    ]
    return np.stack([frame if shape else np.full_like(frame, 26) for frame, shape in zip(frames, shapes, strict=True)])


def test_measures_of_a_shape_that_turns_into_another_one():
    """Most frames show a ring, so the vote says ring; every measure of single frames sees the others."""
    video = drawn(["ring"] * 4 + ["plus"] + ["ring"] * 3 + ["square"] * 2 + ["", "ring"])
    classes = frame_classes(track(video))
    assert classes.tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 1, 1, -1, 0]
    measures = shape_measures(track(video), 0)
    assert tuple(measures) == SHAPE_MEASURES
    assert measures["frame identity"] == pytest.approx(8 / 12)
    assert measures["neighbours alike"] == pytest.approx(6 / 11)
    assert (measures["recognised"], measures["steady area"], measures["motion"]) == (1.0, 0.0, 0.0)
    assert (measures["steady colour"], measures["one object"]) == (1.0, 0.0)
    assert shape_measures(track(video), 3)["frame identity"] == pytest.approx(1 / 12)
    assert shape_measures(track(video), 3)["recognised"] == 0.0


def test_measures_of_an_intact_video_are_one(real):
    assert set(shape_measures(track(real[2]), 2).values()) == {1.0}


@pytest.mark.parametrize(
    ("classes", "alike", "vote"),
    [([2, 2, 2, 2], 1.0, 2), ([0, 1, 0, 1], 0.0, 0), ([-1, -1, 3, 3], 1 / 3, -1), ([-1, 3, 3, 3], 2 / 3, 3)],
)
def test_neighbours_and_votes(classes, alike, vote):
    assert neighbours_alike(np.array(classes)) == pytest.approx(alike)
    assert majority(np.array(classes)) == vote


def test_one_missing_frame_in_sixteen_is_forgiven_two_are_not(real):
    video = real[0].copy()
    video[5] = 26
    assert all(motion_checks(track(video)).values())
    video[9] = 26
    assert not motion_checks(track(video))["one object"]


def test_colour_and_area_drift_are_seen(real):
    fading = (real[0] * np.linspace(1.0, 0.7, 16)[:, None, None, None]).astype(np.uint8)
    assert not motion_checks(track(fading))["steady colour"]
    growing = np.full((16, 32, 32, 3), 26, dtype=np.uint8)
    for frame in range(16):
        growing[frame, 8 : 16 + frame // 3, 2 + frame : 10 + frame] = 200
    checks = motion_checks(track(growing))
    assert not checks["steady area"]
    assert checks["steady colour"]


def test_tracking_rejects_other_types():
    with pytest.raises(ValueError, match="uint8 video"):
        track(np.zeros((4, 32, 32, 3)))
