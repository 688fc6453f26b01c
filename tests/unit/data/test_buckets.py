"""Buckets: which shape a video gets, which shapes are chosen, and the stream whose batches have one shape each."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ardiff.data.bucket_stream import BucketStream, clip_stream
from ardiff.data.buckets import assign, choose, training_videos, wasted
from ardiff.data.config import ClipConfig
from ardiff.data.encode import encode_video
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.streams import ClipStream, Stream
from ardiff.errors import ConfigError, DataError
from ardiff.resolution import Resolution
from ray_jobs.training.batches import rows_of_rank

SHAPES = (Resolution(16, 16), Resolution(12, 20), Resolution(20, 12))
SIZES = [(32, 32)] * 5 + [(18, 32)] * 9 + [(32, 18)] * 2 + [(24, 32)] * 2
"""Height and width of the videos; the last ones are nearer to 12 x 20 than to the square."""
BATCH = 4


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRecord]:
    """Videos whose brightness is ten times their number."""
    folder = tmp_path_factory.mktemp("videos")
    records = []
    for number, (height, width) in enumerate(SIZES):
        data = encode_video(np.full((6, height, width, 3), 10 * number, np.uint8), 8)
        file = folder / f"{number}.mp4"
        file.write_bytes(data)
        shape = ("h264", width, height, 8.0, 6)
        records.append(VideoRecord(str(file), len(data), *shape, number, "x", "train", "ok", ""))
    return records


def stream(records: list[VideoRecord], seed: int = 0, batch_size: int = BATCH, **clips: Any) -> BucketStream:
    made = clip_stream(manifest_table(records), ClipConfig(num_frames=2, **clips), SHAPES, seed, batch_size)
    assert isinstance(made, BucketStream)
    return made


def labels(made: Stream, chunks: range) -> list[int]:
    return [label for chunk in chunks for label in made.load(chunk)["label"].tolist()]


def test_the_waste_is_what_a_crop_cuts_off() -> None:
    shapes = [Resolution(36, 64), Resolution(64, 36), Resolution(48, 48)]
    videos = [(720, 1280), (1280, 720), (480, 640), (500, 500), (100, 300)]
    heights, widths = (np.array(sides) for sides in zip(*videos, strict=True))
    for row, video in zip(wasted(heights, widths, shapes), videos, strict=True):
        cut = [1 - shape.largest_in(*video).num_pixels / (video[0] * video[1]) for shape in shapes]
        assert row == pytest.approx(cut, abs=0.005)
    assert assign(heights, widths, shapes).tolist() == [0, 1, 0, 2, 0]
    assert assign(np.array([100]), np.array([100]), [Resolution(3, 4), Resolution(4, 3)]).tolist() == [0]  # equal waste


def test_chosen_shapes_waste_the_least_of_all_that_could_be_chosen() -> None:
    generator = np.random.default_rng(0)
    widths, heights = generator.integers(200, 900, (2, 60))
    first, patch = Resolution.square(32), 4  # 8 x 8 patches
    chosen = choose(heights, widths, first, 2, patch)
    assert all(side % patch == 0 for shape in chosen for side in shape)
    assert all(shape.num_pixels <= first.num_pixels and max(shape) <= 3 * min(shape) for shape in chosen)

    def waste(*shapes: Resolution) -> float:
        return float(wasted(heights, widths, [first, *shapes]).min(axis=1).mean())

    grids = [(5, 12), (6, 10), (7, 9), (9, 7), (10, 6), (12, 5)]  # for 5, 6 and 7 rows the widest, and turned
    others = [Resolution(4 * rows, 4 * columns) for rows, columns in grids]
    assert waste(*chosen) <= min(waste(*pair) for pair in itertools.combinations(others, 2)) + 1e-3
    assert waste(*chosen) < 0.7 * waste()


def test_a_shape_without_videos_is_not_chosen() -> None:
    sides = np.array([64, 64]), np.array([64, 64])
    assert choose(*sides, Resolution.square(32), 3, 8) == ()
    wide = np.array([720] * 9), np.array([1280] * 9)
    assert choose(*wide, Resolution.square(48), 3, 4) == (Resolution(36, 64),)
    assert choose(*(np.array([1, 2]), np.array([2, 1])), Resolution.square(8), 3, 8) == ()  # one patch has one shape


def test_one_shape_needs_no_buckets(records: list[VideoRecord]) -> None:
    table, clips = manifest_table(records), ClipConfig(num_frames=2)
    one = clip_stream(table, clips, SHAPES[:1], 5, BATCH)
    plain = ClipStream(table, clips, SHAPES[0], 5)
    assert isinstance(one, ClipStream)
    assert one.load(0)["label"].tolist() == plain.load(0)["label"].tolist()


@pytest.mark.parametrize("batch_size", [4, 6])
def test_a_batch_has_one_shape_and_videos_of_that_shape(records: list[VideoRecord], batch_size: int) -> None:
    made = stream(records, batch_size=batch_size)
    expected = assign(*(np.array(sides) for sides in zip(*SIZES, strict=True)), SHAPES)
    assert batch_size % made.chunk_size == 0
    chunks = batch_size // made.chunk_size
    for batch in range(12):
        parts = [made.load(chunk) for chunk in range(batch * chunks, (batch + 1) * chunks)]
        [shape] = {index for part in parts for index in part["shape"].tolist()}
        for part in parts:
            assert part["video"].shape == (made.chunk_size, 2, *SHAPES[shape], 3)
            assert {expected[label] for label in part["label"]} == {shape}
            brightness = part["video"].mean(axis=(1, 2, 3, 4))
            np.testing.assert_allclose(brightness, 10 * part["label"], atol=4)


def test_each_bucket_has_its_share_and_leaves_no_video_out(records: list[VideoRecord]) -> None:
    made = stream(records)
    assert made.batches == (1, 3, 1)  # of 5, 11 and 2 videos
    batches_of_epochs = [[made.bucket(batch)[0] for batch in range(5 * e, 5 * e + 5)] for e in range(12)]
    assert all(Counter(epoch) == {0: 1, 1: 3, 2: 1} for epoch in batches_of_epochs)
    assert len({tuple(epoch) for epoch in batches_of_epochs}) > 3  # each epoch has an order of its own
    of_bucket: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in range(63):
        loaded = made.load(batch)
        of_bucket[int(loaded["shape"][0])] += loaded["label"].tolist()
    for videos in of_bucket.values():  # in each epoch of its own a bucket visits each video once
        count = len(set(videos))
        for first in range(0, len(videos) - count + 1, count):
            assert len(set(videos[first : first + count])) == count
    assert {video for videos in of_bucket.values() for video in videos} == set(range(len(SIZES)))


def test_the_order_is_a_function_of_the_seed(records: list[VideoRecord]) -> None:
    first = labels(stream(records), range(12))
    assert first == labels(stream(records), range(12))
    assert first[20:] == labels(stream(records), range(5, 12))  # from any position on
    assert first != labels(stream(records, seed=1), range(12))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_batches_of_one_shape(records: list[VideoRecord], workers: int) -> None:
    """The slices of all ranks, put together, are the stream; from a restart on, its rest."""
    made, total = stream(records, batch_size=6, crop="random", horizontal_flip=True), 36
    for position in (0, 18):
        whole: dict[int, np.ndarray] = {}
        for rank in range(workers):
            indices = range(rank * 6 // workers, (rank + 1) * 6 // workers)
            for chunk in range(made.locate(position)[0], made.locate(total - 1)[0] + 1):
                rows = rows_of_rank(made, chunk, position, total, indices, 6)
                loaded = made.load(chunk, rows)
                whole |= {made.start(chunk) + r: v for r, v in zip(rows.tolist(), loaded["video"], strict=True)}
        assert sorted(whole) == list(range(position, total))
        for chunk in range(position // made.chunk_size, total // made.chunk_size):
            for row, video in enumerate(made.load(chunk)["video"]):
                assert np.array_equal(whole[chunk * made.chunk_size + row], video)


def test_names_are_those_of_the_clips(records: list[VideoRecord]) -> None:
    made = stream(records)
    for chunk in range(6):
        names = [int(Path(name).stem) for name in made.names(chunk)]
        assert names == made.load(chunk)["label"].tolist()


def test_packed_samples_have_one_size(records: list[VideoRecord]) -> None:
    made = stream(records)
    for chunk in range(5):
        loaded = made.load(chunk)
        packed = made.pack(loaded)
        assert packed["video"].shape == (made.chunk_size, 2 * 256 * 3)  # of the largest shape, 16 x 16
        unpacked = made.unpack(packed)
        assert unpacked.keys() == loaded.keys()
        assert all(np.array_equal(unpacked[name], loaded[name]) for name in loaded)


FRAMES = [6, 5, 9, 4, 7, 3, 12, 5, 4, 6]
SIZES_OF_LENGTHS = [(32, 32)] * 5 + [(18, 32)] * 5


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRecord]:
    """Videos of 3 to 12 frames at 8 frames/s; frame i of video n has the brightness 10 n + 8 i."""
    folder = tmp_path_factory.mktemp("lengths")
    records = []
    for number, (frames, (height, width)) in enumerate(zip(FRAMES, SIZES_OF_LENGTHS, strict=True)):
        levels = 10 * number + 8 * np.arange(frames)
        video = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)
        file = folder / f"{number}.mp4"
        file.write_bytes(encode_video(video, 8))
        shape = ("h264", width, height, 8.0, frames)
        records.append(VideoRecord(str(file), file.stat().st_size, *shape, number, "x", "train", "ok", ""))
    return records


def test_a_batch_has_one_shape_and_one_length(long_and_short: list[VideoRecord]) -> None:
    clips = ClipConfig(num_frames=9, lengths=(4,))
    used = training_videos(long_and_short, clips)
    assert [record.label for record in used] == [i for i, frames in enumerate(FRAMES) if frames >= 4]
    made = clip_stream(manifest_table(used), clips, SHAPES[:2], 3, 2)
    assert isinstance(made, BucketStream)
    expected = {n: 9 if frames >= 9 else 4 for n, frames in enumerate(FRAMES) if frames >= 4}
    seen = set()
    for chunk in range(2 * sum(made.batches)):
        loaded = made.load(chunk)
        [shape] = set(loaded["shape"].tolist())
        frames = loaded["video"].shape[1]
        assert loaded["video"].shape[2:4] == SHAPES[shape]
        assert {expected[label] for label in loaded["label"].tolist()} == {frames}
        assert {shape} == {label // 5 for label in loaded["label"].tolist()}
        assert all(np.array_equal(v, loaded[n]) for n, v in made.unpack(made.pack(loaded)).items())
        seen.add((shape, frames))
    assert seen == {(0, 9), (0, 4), (1, 9), (1, 4)}


def test_each_length_has_its_rate(long_and_short: list[VideoRecord]) -> None:
    clips = ClipConfig(num_frames=12, fps=8.0, lengths=(3, 5), lengths_fps=(4.0, 8.0))
    used = training_videos(long_and_short, clips)
    made = clip_stream(manifest_table(used), clips, SHAPES[:1], 3, 1)
    steps = {12: 8, 3: 16}  # of brightness from frame to frame
    lengths = set()
    assert isinstance(made, BucketStream)
    for chunk in range(sum(made.batches)):
        [video] = made.load(chunk)["video"]
        levels = video.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(np.diff(levels), steps[len(video)], atol=3)
        lengths.add(len(video))
    assert lengths == {12, 3}  # whoever has 5 frames at 8 frames/s also has 3 at 4, which comes first


def test_lengths_leave_the_order_to_seed_and_position(long_and_short: list[VideoRecord]) -> None:
    clips = ClipConfig(num_frames=9, lengths=(4,))
    used = training_videos(long_and_short, clips)

    def order(seed: int, chunks: range) -> list[int]:
        return labels(clip_stream(manifest_table(used), clips, SHAPES[:2], seed, 2), chunks)

    assert order(0, range(12)) == order(0, range(12))
    assert order(0, range(12))[10:] == order(0, range(5, 12))
    assert order(0, range(12)) != order(1, range(12))


def test_no_video_is_long_enough(long_and_short: list[VideoRecord]) -> None:
    with pytest.raises(DataError, match=r"All 10 videos of the 'train' split are shorter than the 20 frames"):
        training_videos(long_and_short, ClipConfig(num_frames=30, lengths=(20,)))


def test_chunks_hold_whole_visits(records: list[VideoRecord]) -> None:
    made = stream(records, batch_size=8, clips_per_visit=4)
    assert made.chunk_size in (4, 8)
    assert Counter(Counter(made.load(0)["label"].tolist()).values()).keys() <= {4, 8}
    assert made.chunk_bytes == made.chunk_size * 2 * 3 * 256
    with pytest.raises(ConfigError, match=r"train\.batch_size=6 must be a multiple of clips\.clips_per_visit=4"):
        stream(records, batch_size=6, clips_per_visit=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"auto_buckets": 5}, "between 0 and 4, got 5"),
        ({"auto_buckets": 2, "buckets": (Resolution(8, 16),)}, "not both"),
        ({"lengths": (16,)}, r"different numbers, got \[16, 16\]"),
        ({"lengths": (0,)}, "lengths and stride must be at least 1"),
        ({"lengths": (8, 4), "lengths_fps": (8.0,)}, "a rate for each of 2 lengths"),
        ({"lengths": (8,), "lengths_fps": (-1.0,)}, "fps and lengths_fps must not be negative"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipConfig(**wrong)


def test_settings_of_before_have_the_keys_of_before() -> None:
    assert not {"buckets", "auto_buckets", "lengths", "lengths_fps"} & ClipConfig().resume_key.keys()
    assert ClipConfig(buckets=(Resolution(8, 16),)).resume_key["buckets"] == [[8, 16]]
