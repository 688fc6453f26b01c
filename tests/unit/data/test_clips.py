"""Clips by number and by rate, of files and folders, and streams that replace what is bad."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import broken_videos
import numpy as np
import pytest
from broken_videos import IRREGULAR, encode, picture

from ardiff.data import clips as clips_module
from ardiff.data import storage
from ardiff.data.clips import natural_order, probe_video, read_clips, read_good_clips
from ardiff.data.config import ClipConfig
from ardiff.data.decode import decode_clip, decode_frames, frame_times
from ardiff.data.error_log import BadSample
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.pictures import crop
from ardiff.data.probe import probe
from ardiff.data.storage import StoredFile
from ardiff.data.streams import ClipStream
from ardiff.errors import DataError, DecodeError
from ardiff.resolution import Resolution


def record(place: Path, label: int = 0) -> VideoRecord:
    uri = f"{place}/" if place.is_dir() else str(place)
    size = 0 if place.is_dir() else place.stat().st_size
    p = probe_video(StoredFile(uri, size, ""))
    facts = (p.codec, p.width, p.height, p.fps or 25.0, p.num_frames, label, "x", "train", "ok", "")
    return VideoRecord(uri, size, *facts, rotation=p.rotation, pts_start=p.timing.start, pts_step=p.timing.step)


def put(place: Path, data: bytes) -> Path:
    place.write_bytes(data)
    return place


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


KINDS = {
    "b frames": {"bf": 3},
    "matroska": {"container": "matroska", "bf": 2},
    "open groups": {"x264_params": "open-gop=1:bframes=3"},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "deadline": "realtime", "cpu_used": 8},
    "avi": {"codec": "mpeg4", "container": "avi"},
    "transport stream": {"container": "mpegts"},
    "29.97": {"rate": 30},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_after_a_seek_are_those_of_a_whole_decode(kind: str) -> None:
    data = encode(frames=40, **KINDS[kind])  # type: ignore[arg-type]
    timing = probe(data).timing
    whole = decode_clip(data, 0, 40)
    for first in range(0, 36, 5):
        wanted = [first, first + 1, first + 4]
        frames = decode_frames(data, wanted, None, timing)
        assert all(np.array_equal(frames[i], whole[i]) for i in wanted), first


def test_damage_before_the_clip_does_no_harm_and_damage_in_it_is_told() -> None:
    good = encode(frames=40, bf=0)
    bad, timing = broken_videos.corrupted(good, 8), probe(good).timing
    assert np.array_equal(decode_frames(bad, [20], None, timing)[20], decode_clip(good, 20, 1)[0])
    with pytest.raises(DecodeError) as info:
        decode_frames(bad, [9], None, timing)
    assert info.value.kind == "corrupt"


def test_another_file_in_the_place_is_not_mistaken(tmp_path: Path) -> None:
    video = record(put(tmp_path / "a.mp4", encode(frames=40)))
    put(tmp_path / "a.mp4", encode(frames=10, rate=30))
    with pytest.raises(DecodeError):
        read_clips(video, [[20, 21]], 0.0, None)


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    data = encode(container="matroska", frames=10, times=IRREGULAR, crf=1)
    assert np.allclose(frame_times(data, 10), np.array(IRREGULAR) / 1000)
    video = record(put(tmp_path / "v.mkv", data))
    assert (video.pts_step, video.fps) == (0.0, 6.0)
    assert video.length_at(10.0) == 16
    [clip] = read_clips(video, [list(range(16))], 10.0, None)
    shown = [int(np.searchsorted(IRREGULAR, 100 * i, side="right")) - 1 for i in range(16)]
    assert shown == [0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 8, 8, 9]
    assert np.array_equal(clip, decode_clip(data, 0, 10)[shown])


@pytest.mark.parametrize(("fps", "expected"), [(4.0, [0, 2, 4, 6]), (8.0, [0, 1, 2, 3]), (16.0, [0, 0, 1, 1])])
def test_a_constant_rate_is_sampled_by_number(tmp_path: Path, fps: float, expected: list[int]) -> None:
    data = encode()
    video = record(put(tmp_path / "v.mp4", data))
    assert video.length_at(fps) == int(23 / 8 * fps + 1e-6) + 1
    assert video.length_at(0.0) == 24
    [clip] = read_clips(video, [[0, 1, 2, 3]], fps, None)
    assert np.array_equal(clip, decode_clip(data, 0, 24)[expected])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_folders_of_pictures(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        put(folder / f"f{number}.{kind.lower()}", broken_videos.still(number, kind))
    video = record(folder)
    assert (video.codec, video.num_frames, video.width, video.height) == (kind.lower(), 12, 64, 48)
    clips = read_clips(video, [[9, 10, 11], [2, 3, 4]], 0.0, None)
    for clip, numbers in zip(clips, ([9, 10, 11], [2, 3, 4]), strict=True):
        expected = np.stack([picture(n) for n in numbers])
        assert np.array_equal(clip, expected) if kind == "PNG" else distance(clip, expected) < 6
    [small] = read_clips(video, [[0]], 0.0, Resolution.square(24))
    assert small.shape == (1, 24, 32, 3)
    (folder / f"f3.{kind.lower()}").unlink()
    with pytest.raises(DecodeError, match="11 pictures, not 12 as before"):
        read_clips(video, [[0]], 0.0, None)


def test_pictures_of_different_sizes_are_no_video(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    put(folder / "1.png", broken_videos.still(1))
    from PIL import Image

    Image.fromarray(picture(2, 50, 60)).save(folder / "2.png")
    with pytest.raises(DecodeError, match="differ in size"):
        record(folder)


def test_natural_order() -> None:
    names = ["f10.png", "f9.png", "f009.png", "a.png", "f9b.png"]
    assert sorted(names, key=natural_order)[0] == "a.png"
    assert sorted(["f10.png", "f9.png", "f100.png"], key=natural_order) == ["f9.png", "f10.png", "f100.png"]


def test_squares_lie_where_they_are_asked_to() -> None:
    clip = np.arange(2 * 6 * 9 * 3, dtype=np.uint8).reshape(2, 6, 9, 3)
    assert np.array_equal(crop(clip, Resolution.square(6)), clip[:, :, 1:7])
    assert np.array_equal(crop(clip, Resolution.square(6), (0.0, 0.0)), clip[:, :, :6])
    assert np.array_equal(crop(clip, Resolution.square(6), (1.0, 1.0)), clip[:, :, 3:])
    assert crop(clip, None) is clip


def test_large_files_are_read_by_ranges_and_small_ones_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = record(put(tmp_path / "v.mp4", encode(frames=40)))
    [whole] = read_clips(video, [[20, 21]], 0.0, None)
    monkeypatch.setattr(clips_module, "RANGE_BYTES", 1)
    monkeypatch.setattr(clips_module.storage, "read_bytes", None)
    [ranged] = read_clips(video, [[20, 21]], 0.0, None)
    assert np.array_equal(whole, ranged)


# Streams


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRecord]:
    """Five videos of different lengths; the label is the number."""
    folder = tmp_path_factory.mktemp("videos")
    return [record(put(folder / f"{i}.mp4", encode(frames=n)), i) for i, n in enumerate([8, 12, 9, 30, 17])]


def stream(records: list[VideoRecord], **changes: Any) -> ClipStream:
    settings = {"num_frames": 3, "stride": 2, **{k: v for k, v in changes.items() if k in ClipConfig.__slots__}}
    rest = {k: v for k, v in changes.items() if k not in ClipConfig.__slots__}
    return ClipStream(
        manifest_table(records), ClipConfig(**settings), **{"resolution": Resolution.square(24), "seed": 0, **rest}
    )


def test_uniform_over_clips_visits_every_part_of_every_video_once(records: list[VideoRecord]) -> None:
    each = stream(records, uniform="clips", chunk_size=1)
    visits = [8 // 5, 12 // 5, 9 // 5, 30 // 5, 17 // 5]
    assert each.visits.tolist() == np.cumsum(visits).tolist()
    for epoch in range(2):
        found = [each._video(epoch * sum(visits) + i) for i in range(sum(visits))]
        assert sorted(found) == [(v, part) for v, n in enumerate(visits) for part in range(n)]
    starts = [each._starts(3, part, records[3], np.random.default_rng(part))[0] for part in range(6)]
    assert starts == sorted(starts)
    assert all(26 * p // 6 <= s < 26 * (p + 1) // 6 for p, s in enumerate(starts))


def test_a_bad_video_is_reported_and_replaced_alike_everywhere(records: list[VideoRecord]) -> None:
    gone = [replace(r, uri="/nowhere.mp4") if r.label == 3 else r for r in records]
    reported: list[BadSample] = []
    one = stream(gone, report=reported.append, chunk_size=5)
    first = one.load(0)
    assert 3 not in first["label"]
    assert len(first["label"]) == 5
    assert {(b.uri, b.error, b.attempts) for b in reported} == {("/nowhere.mp4", "unreadable", 1)}
    rows = set(reported)
    good = stream(records, chunk_size=5).load(0)
    same = good["label"] != 3
    assert np.array_equal(first["video"][same], good["video"][same])
    again = stream(gone, report=reported.append, chunk_size=5)
    for row in range(5):  # as other workers load it
        part = again.load(0, np.array([row]))
        assert np.array_equal(part["video"][0], first["video"][row])
        assert part["label"][0] == first["label"][row]
    assert set(reported) == rows


def test_a_stream_from_s3_is_the_one_from_disk(records: list[VideoRecord], s3_bucket: str) -> None:
    for r in records:
        storage.write_bytes(f"{s3_bucket}/{r.label}.mp4", Path(r.uri).read_bytes())
    remote = [replace(r, uri=f"{s3_bucket}/{r.label}.mp4") for r in records]
    one, other = stream(records, horizontal_flip=True).load(1), stream(remote, horizontal_flip=True).load(1)
    assert np.array_equal(one["video"], other["video"])
    assert np.array_equal(one["label"], other["label"])


def test_without_a_report_a_bad_video_is_an_error(records: list[VideoRecord]) -> None:
    gone = [replace(r, uri="/nowhere.mp4") for r in records]
    with pytest.raises(DataError, match=r"/nowhere\.mp4 can no longer be used"):
        stream(gone).load(0)
    with pytest.raises(DataError, match="8 videos in a row"):
        stream(gone, report=lambda bad: None).load(0)


def test_a_report_may_refuse(records: list[VideoRecord]) -> None:
    def refuse(bad: BadSample) -> None:
        raise DataError("too many")

    with pytest.raises(DataError, match="too many"):
        stream([replace(r, uri="/nowhere.mp4") for r in records], report=refuse).load(0)


def test_random_crops_move_and_are_the_same_again(records: list[VideoRecord]) -> None:
    center = stream(records, chunk_size=20).load(0)["video"]
    one, two = (stream(records, chunk_size=20, crop="random").load(0)["video"] for _ in range(2))
    assert np.array_equal(one, two)
    assert sum(not np.array_equal(a, b) for a, b in zip(one, center, strict=True)) > 15


def test_chunks_fit_into_a_block(records: list[VideoRecord]) -> None:
    assert stream(records).chunk_size == 64
    assert stream(records, resolution=Resolution.square(256)).chunk_size == 32
    assert stream(records, resolution=Resolution.square(1024)).chunk_size == 2
    assert stream(records, resolution=Resolution.square(1024), clips_per_visit=8).chunk_size == 8


def test_clips_at_a_rate(records: list[VideoRecord]) -> None:
    slow = stream(records, fps=4.0, num_frames=4, stride=1)
    assert slow.load(0)["video"].shape == (64, 4, 24, 24, 3)
    with pytest.raises(DataError, match=r"0\.mp4 has 4 frames, the clip needs 5"):
        stream(records, fps=4.0, num_frames=5, stride=1)


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"clips_per_visit": 3}, {"fps": -1.0}, {"max_bad_fraction": 1.5}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ClipConfig(**wrong)


def test_bad_clips_are_reported_and_the_others_read(tmp_path: Path) -> None:
    good = encode(frames=24, bf=0)
    probed = record(put(tmp_path / "a.mp4", good))
    put(tmp_path / "a.mp4", broken_videos.corrupted(good, 9))  # there is a key frame every 6 frames
    reported: list[BadSample] = []
    clips = read_good_clips(probed, [0, 3, 6, 9, 12], 3, 1, 0.0, Resolution.square(16), reported.append)
    assert [(sample.clip, sample.error) for sample in reported] == [(9, "corrupt")]
    assert sorted(clips) == [0, 3, 6, 12]
    assert clips[12].shape == (3, 16, 16, 3)


def test_random_crops_of_rectangles_move_along_the_longer_side(records: list[VideoRecord]) -> None:
    """The videos have 64 x 48 pixels: a wider frame leaves room above and below, a narrower one left and right."""
    [whole] = read_clips(records[0], [[0, 2, 4]], 0.0, None)
    assert whole.shape[1:3] == (48, 64)
    for shape in (Resolution(24, 64), Resolution(48, 30)):
        own = stream(records, resolution=shape, crop="random", chunk_size=20)
        assert own.chunk_bytes == 20 * 3 * shape.num_pixels * 3
        clips = own.load(0)["video"]
        assert clips.shape == (20, 3, *shape, 3)
        center = stream(records, resolution=shape, chunk_size=20).load(0)["video"]
        assert sum(not np.array_equal(a, b) for a, b in zip(clips, center, strict=True)) > 15
        for clip, label in zip(clips, own.load(0)["label"], strict=True):
            [frames] = read_clips(records[label], [range(records[label].num_frames)], 0.0, None)
            windows = np.lib.stride_tricks.sliding_window_view(frames, shape, axis=(1, 2))  # (F, y, x, 3, H, W)
            assert (windows == np.moveaxis(clip[0], -1, 0)).all(axis=(-3, -2, -1)).any()
