"""Which clips an evaluation takes, and how their data is named. No Ray is started."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from ardiff.data.encode import encode_video
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.errors import ConfigError, DataError
from ardiff.resolution import Resolution
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import (
    Clip,
    Dataset,
    OpenDataset,
    ProbeCache,
    check_count,
    common_size,
    frame_rates,
    generated_clips,
    list_videos,
    open_generated,
    open_videos,
    paired_clips,
    real_clips,
    two_draws,
)
from ray_jobs.evaluation.features import _decode, data_keys
from ray_jobs.evaluation.frames import read_frames

NAMES = ("y/1", "y/2", "x/1", "x/2")


def record(uri: str, frames: int = 20, size: int = 64) -> VideoRecord:
    return VideoRecord(uri, 1, "h264", size, size, 8.0, frames, 0, "video", "test", "ok", "")


def test_a_dataset_is_a_manifest_or_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "videos"
    folder.mkdir(parents=True)
    (folder / "a.mp4").touch()
    (folder / "notes.txt").touch()
    write_manifest(str(tmp_path / "set" / "manifest.parquet"), [record("a.mp4")])
    for prefix in ("", "file://"):  # a URI takes the code path of s3://
        manifest, files = (list_videos(f"{prefix}{tmp_path}/set/{name}") for name in ("manifest.parquet", "videos/"))
        assert (manifest.name, manifest.split_name("train")) == ("set", "train")
        assert (files.name, files.split_name("train")) == ("videos", "folder")
        assert [video.uri for video in files.videos] == [f"{prefix}{folder}/a.mp4"]
    with pytest.raises(DataError, match="no manifest or folder of videos"):
        list_videos(str(tmp_path / "none"))


def test_every_video_comes_once_before_any_comes_twice() -> None:
    records = [record(f"{i}.mp4") for i in range(3)]
    config = QuickConfig(num_frames=6, stride=3, seed=0)
    clips = real_clips(records, 7, config)
    assert all(sorted(clip.video.uri for clip in clips[i : i + 3]) == ["0.mp4", "1.mp4", "2.mp4"] for i in (0, 3))
    assert all(0 <= clip.start <= 4 and clip.stride == 3 for clip in clips)
    assert len({clip.start for clip in clips}) > 1
    assert real_clips(records, 7, config) == clips
    assert real_clips(records, 7, replace(config, seed=1)) != clips


def test_clips_at_a_frame_rate(tmp_path: Path) -> None:
    """Of 100 frames at 25 a second there are 32 at 8 a second, wherever clips start and are counted."""
    record_25 = replace(record("a.mp4", frames=100), fps=25.0)
    clips = real_clips([record_25], 80, QuickConfig(num_frames=16, fps=8.0))
    assert {clip.fps for clip in clips} == {8.0}
    assert max(clip.start for clip in clips) == 16
    (tmp_path / "a.mp4").touch()
    write_manifest(str(tmp_path / "manifest.parquet"), [record_25])
    listed = list_videos(str(tmp_path / "manifest.parquet"))
    assert len(open_videos(listed, "test", 32, 8.0).records) == 1
    with pytest.raises(DataError, match="the shortest has 32"):
        open_videos(listed, "test", 33, 8.0)
    seen = replace(record_25, size=1, etag="e")
    assert data_keys([Clip(seen, 0, 1)]) != data_keys([Clip(seen, 0, 1, fps=8.0)])

    frames = np.arange(24, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3) * 8
    (tmp_path / "b.mp4").write_bytes(encode_video(frames, 8.0, crf=1))
    clip = Clip(record(f"{tmp_path}/b.mp4", frames=24, size=32), start=1, stride=2, fps=4.0)
    [video] = _decode({"clips": [asdict(clip)]}, 4, None)["videos"]
    assert np.abs(video.mean(axis=(1, 2, 3)) / 8 - [2, 6, 10, 14]).max() < 0.5


def test_pairs_are_of_one_name_below_their_folders(tmp_path: Path) -> None:
    originals = [record(f"s3://b/real/{c}/{n}.mp4") for c in "xy" for n in "12"]
    real = dataset(tmp_path, "real", originals)
    fake = dataset(tmp_path, "fake", [record(f"/fake/{c}/{n}.webm") for c in "yx" for n in "12"])
    clips = generated_clips(fake, QuickConfig(num_clips=4, batch_size=2))
    pairs = paired_clips("fake", clips, real)
    assert sorted((p.video.uri[6:9], p.original.uri[12:15]) for p in pairs if p.original) == sorted(
        (n, n) for n in NAMES
    )
    folders = [record("/fake/x/1.mp4/"), record("/fake/x/2/")]
    pictures = replace(fake, records=folders)
    chosen = generated_clips(pictures, QuickConfig(num_clips=2, batch_size=2))
    pairs = paired_clips("pictures", chosen, replace(real, records=originals[:2]))
    assert {p.video.uri: p.original for p in pairs} == dict(zip([f.uri for f in folders], originals[:2], strict=True))
    with pytest.raises(DataError, match="has no original called 'y/1'"):
        paired_clips("fake", clips, replace(real, records=[*originals[:2], record("s3://b/real/z/1.mp4")]))


def dataset(folder: Path, name: str, records: list[VideoRecord]) -> OpenDataset:
    (folder / name).mkdir()
    (folder / name / "a.mp4").touch()
    return OpenDataset(list_videos(str(folder / name)), records)


def test_sizes() -> None:
    assert common_size([record("a"), record("b")], None) == "64x64"
    assert common_size([record("a"), record("b", size=32)], Resolution.square(16)) == "16x16"
    with pytest.raises(ConfigError, match=r"different sizes \(32x32 and 64x64, height x width\)"):
        common_size([record("a"), record("b", size=32)], None)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_data_is_named_by_place_start_size_and_change(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(b"one")
    video = record(f"{prefix}{file}")
    clip = Clip(video, 0, 1)
    before = data_keys([clip])
    assert data_keys([clip]) == before
    assert data_keys([Clip(video, 1, 1)]) != before
    os.utime(file, ns=(1, 1))
    touched = data_keys([clip])
    assert touched != before
    file.write_bytes(b"longer")
    os.utime(file, ns=(1, 1))
    assert data_keys([clip]) != touched
    with pytest.raises(DataError, match="There is no video"):
        data_keys([Clip(record(f"{prefix}{tmp_path}/gone.mp4"), 0, 1)])


def test_the_data_of_a_manifest_are_named_by_what_it_says() -> None:
    """Folders of pictures are no files that could be looked at, and those of S3 cost a request each."""
    videos = [replace(record("s3://nowhere/a/"), etag=etag) for etag in ("1", "2")]
    one, other = (data_keys([Clip(video, 0, 1, original=video)]) for video in videos)
    assert one != other


@pytest.mark.parametrize("count", [4, 16, 30])
def test_real_and_other_real_clips_are_exchangeable_draws(count: int) -> None:
    """Of class folders, both draws have all classes, and neither depends on the order of the list."""
    records = [replace(record(f"{label}/{i:02d}.mp4"), label=label) for label in range(4) for i in range(15)]
    config = QuickConfig(num_clips=count, batch_size=2)
    reference, others = two_draws(records, count, config)
    for clips in (reference, others):
        labels = [clip.video.label for clip in clips]
        assert max(map(labels.count, range(4))) - min(map(labels.count, range(4))) <= 1
    taken = [{clip.video.uri for clip in clips} for clips in (reference, others)]
    assert taken[0].isdisjoint(taken[1])
    assert two_draws(records[::-1], count, config) == (reference, others)
    other_seed = two_draws(records, count, replace(config, seed=1))
    assert {clip.video.uri for clip in other_seed[0]} != taken[0]
    generated = generated_clips(OpenDataset(Dataset("fake", records, []), records), config)
    assert [[c.video.label for c in generated[:4]].count(label) for label in range(4)] == [1] * 4
    assert [c.video.uri for c in generated] != sorted(c.video.uri for c in generated)


def test_class_names_of_every_position_are_drawn_as_often(tmp_path: Path) -> None:
    """With fewer clips than classes no class is preferred: over seeds, the reference and the others have each."""
    records = [replace(record(f"{label}/{i}.mp4"), label=label) for label in range(5) for i in range(4)]
    counts = np.zeros((2, 5), int)
    for seed in range(200):
        for side, clips in enumerate(two_draws(records, 2, QuickConfig(num_clips=2, batch_size=2, seed=seed))):
            for clip in clips:
                counts[side, clip.video.label] += 1
    assert counts.min() > 50, counts  # 80 expected
    assert counts.max() < 110, counts


def test_a_few_videos_of_a_manifest_that_are_too_short_are_refused() -> None:
    """The score would leave out those that a model made badly."""
    records = [record(f"{i}.mp4", frames=16 if i % 2 else 12) for i in range(16)]
    with pytest.raises(DataError, match=r"8 of 16 videos in fake have fewer than 16 frames, the first is 0.mp4 \(12\)"):
        open_generated(Dataset("fake", records, []), 16)
    broken = [record("0.mp4"), replace(record("1.mp4"), status="error", reason="it is empty")]
    with pytest.raises(DataError, match=r"1 of 2 videos in fake cannot be decoded, the first is 1.mp4 \(it is empty\)"):
        open_generated(Dataset("fake", broken, []), 16)
    assert len(open_generated(Dataset("fake", records, []), 12).records) == 16


def test_too_few_videos_are_noticed_before_one_is_opened(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.mp4").touch()
    with pytest.raises(DataError, match="has 3 videos, but num_clips is 4"):
        check_count(list_videos(str(tmp_path)), 4)
    check_count(list_videos(str(tmp_path)), 3)


def test_rates_of_clips() -> None:
    clips = real_clips([replace(record("a.mp4", frames=100), fps=24.0)], 2, QuickConfig(num_frames=6, stride=3))
    assert frame_rates(clips) == [8.0, 8.0]
    assert frame_rates([replace(clips[0], fps=12.0)]) == [4.0]
    assert frame_rates([replace(clips[0], video=replace(clips[0].video, fps=0.0))]) == [0.0]


def test_frames_that_are_not_square_are_cropped_or_stretched(tmp_path: Path) -> None:
    """A video whose left and right quarters are black: a crop is white, a stretched frame is half white."""
    frames = np.zeros((16, 32, 64, 3), np.uint8)
    frames[:, :, 16:48] = 255
    np.save(tmp_path / "a.npy", frames)
    (tmp_path / "a.mp4").write_bytes(encode_video(frames, 8.0, crf=1))
    [array] = list_videos(str(tmp_path / "a.npy")).records or []
    video = replace(record(f"{tmp_path}/a.mp4", frames=16), width=64, height=32)
    for side in (array, video):
        for fit, resolution, shape, white in (
            ("crop", None, (32, 32), 1.0),
            ("crop", Resolution.square(16), (16, 16), 1.0),
            ("crop", Resolution(16, 20), (16, 20), 0.8),
            ("crop", Resolution(18, 32), (18, 32), 32 / 56.9),
            ("stretch", None, (32, 64), 0.5),
            ("stretch", Resolution(20, 16), (20, 16), 0.5),
            ("stretch", Resolution.square(16), (16, 16), 0.5),
        ):
            clip = asdict(Clip(side, 0, 1, fit=fit))
            read = read_frames(clip, "video", 4, resolution)
            assert read.shape == (4, *shape, 3)
            assert read.dtype == np.uint8
            assert read.mean() / 255 == pytest.approx(white, abs=0.02), (fit, resolution)
        pair = asdict(Clip(side, 0, 1, original=side))
        assert read_frames(pair, "original", 4, None).shape == (4, 32, 64, 3)
        assert read_frames(pair, "video", 4, Resolution.square(16)).shape == (4, 16, 16, 3)


def test_array_files_and_folders_of_them_are_datasets(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.zeros((3, 16, 8, 8, 3), np.uint8))
    file, folder = (list_videos(str(tmp_path / name)) for name in ("set.npy", ""))
    assert (file.name, file.is_manifest, file.split_name("train")) == ("set.npy", False, "folder")
    for dataset in (file, folder):
        assert [r.split for r in open_videos(dataset, "train", 16).records] == ["train"] * 3
    pairs = paired_clips("fake", [Clip(r, 0, 1) for r in file.records or []], open_videos(folder, "test", 16))
    assert [p.original and p.original.uri[-6:] for p in pairs] == ["000000", "000001", "000002"]


def test_array_files_beside_videos_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.zeros((3, 16, 8, 8, 3), np.uint8))
    (tmp_path / "a.mp4").write_bytes(b"video")
    with pytest.raises(DataError, match=r"has 1 array files or GIFs, such as .*set\.npy, beside 1 videos"):
        list_videos(str(tmp_path))


def test_filters_of_a_video_are_part_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    for etag in ("e", ""):
        plain = replace(record(f"{tmp_path}/a.mp4"), etag=etag)
        filtered = replace(plain, filters="tone_map")
        assert data_keys([Clip(plain, 0, 1)]) != data_keys([Clip(filtered, 0, 1)])


def test_folders_are_probed_once(tmp_path: Path) -> None:
    """Until a file changes; then the cluster is asked for."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")

    class ClusterNeededError(Exception):
        pass

    def join() -> None:
        raise ClusterNeededError

    cache, folder = ProbeCache(str(tmp_path / "cache"), join), str(tmp_path / "videos")
    with pytest.raises(ClusterNeededError):
        open_videos(list_videos(folder), "train", 16, cache=cache)
    interlaced = replace(record("a.mp4"), warnings="interlaced")
    cache.write(list_videos(folder), [interlaced])
    for mode, filters in (("auto", "deinterlace"), ("off", "")):
        [found] = open_videos(list_videos(folder), "train", 16, cache=cache, filters=(mode, "off")).records
        assert found == replace(interlaced, split="train", filters=filters)
    cache.write(list_videos(folder), [record("a.mp4")])
    assert open_videos(list_videos(folder), "train", 16, cache=cache).records == [
        replace(record("a.mp4"), split="train")
    ]
    assert len(open_generated(list_videos(folder), 16, cache).records) == 1
    (tmp_path / "videos" / "b.mp4").write_bytes(b"video")
    with pytest.raises(ClusterNeededError):
        open_videos(list_videos(folder), "train", 16, cache=cache)
