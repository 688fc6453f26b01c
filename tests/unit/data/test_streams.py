"""Streams: every sample once an epoch, and one integer that says where training is."""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ardiff.data.config import ClipConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.latents import latent_table
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.streams import ClipStream, Columns, LatentStream, Stream
from ardiff.errors import ClipTooShortError, DataError
from ardiff.resolution import Resolution

LENGTHS = [7, 12, 8, 20, 7]
ROWS = [3, 1, 4, 2, 5]
SHAPE = (2, 3, 4)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five videos, a bright bar that moves to the right; the pace tells them apart."""
    folder, uris = tmp_path_factory.mktemp("videos"), []
    for number, length in enumerate(LENGTHS):
        frames = np.full((length, 16, 16, 3), 30 * number, np.uint8)
        for f in range(length):
            frames[f, :, f % 16 : f % 16 + 3] = 255
        uris.append(str(folder / f"{number}.mp4"))
        Path(uris[-1]).write_bytes(encode_video(frames, 8, crf=4))
    return uris


def clip_stream(uris: list[str], lengths: list[int] | None = None, **changes: Any) -> ClipStream:
    lengths = LENGTHS if lengths is None else lengths
    records = [
        VideoRecord(uri, 9999, "h264", 16, 16, 8.0, n, i, "x", "train", "ok", "")
        for i, (uri, n) in enumerate(zip(uris, lengths, strict=True))
    ]
    names = {f.name for f in fields(ClipConfig)}
    clips = {"num_frames": 3, "stride": 2, **{n: v for n, v in changes.items() if n in names}}
    rest = {
        "resolution": Resolution.square(16),
        "seed": 0,
        "chunk_size": 3,
        **{n: v for n, v in changes.items() if n not in names},
    }
    return ClipStream(manifest_table(records), ClipConfig(**clips), **rest)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Fifteen clips of latents in five files; every clip holds its own number, which is its label too."""
    folder, uris, first = tmp_path_factory.mktemp("latents"), [], 0
    for number, rows in enumerate(ROWS):
        labels = np.arange(first, first + rows)
        latents = np.broadcast_to(labels[:, None, None, None], (rows, *SHAPE)).astype(np.float32)
        uris.append(str(folder / f"{number}.parquet"))
        pq.write_table(latent_table({"latents": latents, "label": labels}), uris[-1])
        first += rows
    return uris


def latent_stream(uris: list[str], **changes: Any) -> LatentStream:
    settings = {"files": uris, "rows": ROWS, "shape": SHAPE, "seed": 0, "files_per_chunk": 2}
    return LatentStream(**{**settings, **changes})  # type: ignore[arg-type]


def read(stream: Stream, position: int, count: int) -> Columns:
    """``count`` samples from ``position`` on, chunk by chunk."""
    chunk, skip = stream.locate(position)
    parts: list[Columns] = []
    while sum(len(p["label"]) for p in parts) < count:
        columns = stream.load(chunk)
        parts.append({name: values[skip:] for name, values in columns.items()})
        chunk, skip = chunk + 1, 0
    return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}


def assert_same(first: Columns, second: Columns) -> None:
    assert set(first) == set(second)
    for name, values in first.items():
        assert np.array_equal(values, second[name]), name


@pytest.mark.parametrize("kind", ["clips", "latents"])
def test_reading_from_any_position_gives_the_tail_of_the_whole(videos: list[str], files: list[str], kind: str) -> None:
    stream: Stream = clip_stream(videos) if kind == "clips" else latent_stream(files)
    total = 33
    whole = read(stream, 0, total)
    for position in range(total):
        tail = read(stream, position, total - position)
        assert_same(tail, {name: values[position:] for name, values in whole.items()})


@pytest.mark.parametrize("kind", ["clips", "latents"])
def test_a_chunk_is_a_pure_function_of_stream_and_index(videos: list[str], files: list[str], kind: str) -> None:
    def make() -> Stream:
        return clip_stream(videos) if kind == "clips" else latent_stream(files)

    ahead = make()
    later = {chunk: ahead.load(chunk) for chunk in (7, 2, 7, 0)}
    for chunk, columns in later.items():
        assert_same(columns, make().load(chunk))


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
def test_every_epoch_visits_every_video_once_in_an_order_of_its_own(videos: list[str], chunk_size: int) -> None:
    stream = clip_stream(videos, chunk_size=chunk_size)
    labels = read(stream, 0, 50)["label"].reshape(10, 5)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in labels.tolist())
    assert len({tuple(epoch) for epoch in labels.tolist()}) > 5
    assert np.array_equal(labels, read(clip_stream(videos, chunk_size=2), 0, 50)["label"].reshape(10, 5))


@pytest.mark.parametrize("files_per_chunk", [1, 2, 5, 16])
def test_every_epoch_visits_every_clip_once_in_an_order_of_its_own(files: list[str], files_per_chunk: int) -> None:
    stream = latent_stream(files, files_per_chunk=files_per_chunk)
    samples = read(stream, 0, 60)
    labels = samples["label"].reshape(4, 15)
    assert all(sorted(epoch) == list(range(15)) for epoch in labels.tolist())
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 4
    assert (samples["latents"] == samples["label"][:, None, None, None]).all()  # a clip keeps its label
    assert samples["latents"].dtype == np.float32
    assert samples["latents"].shape == (60, *SHAPE)
    assert samples["label"].dtype == np.int64


def test_files_loaded_together_are_mixed(files: list[str]) -> None:
    labels = latent_stream(files, files_per_chunk=5).load(0)["label"]
    file = np.repeat(np.arange(5), ROWS)[labels]
    assert Counter(np.diff(file) == 0)[False] > len(ROWS) - 1


def test_another_seed_is_another_order(videos: list[str], files: list[str]) -> None:
    for make, uris in ((clip_stream, videos), (latent_stream, files)):
        orders = {tuple(read(make(uris, seed=seed), 0, 30)["label"].tolist()) for seed in range(3)}
        assert len(orders) == 3


def test_clips_are_cut_anywhere_in_the_video(videos: list[str]) -> None:
    """The bar's place says where a clip starts: all starts of the longest video occur, and no other."""
    samples = read(clip_stream(videos), 0, 400)
    clips = samples["video"][samples["label"] == 1]  # 12 frames, a clip spans 5
    whole = decode_clip(Path(videos[1]).read_bytes(), 0, 12, 1, Resolution.square(16))
    starts = Counter(next(s for s in range(8) if np.array_equal(clip, whole[s : s + 5 : 2])) for clip in clips)
    assert clips.shape == (80, 3, 16, 16, 3)
    assert clips.dtype == np.uint8
    assert sorted(starts) == list(range(8))
    assert max(starts.values()) < 25


def test_flips_are_of_whole_clips_and_about_every_second(videos: list[str]) -> None:
    plain = read(clip_stream(videos), 0, 200)["video"]
    flipped = read(clip_stream(videos, horizontal_flip=True), 0, 200)["video"]
    mirrored = np.array([np.array_equal(a[:, :, ::-1], b) for a, b in zip(plain, flipped, strict=True)])
    same = np.array([np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    assert (mirrored ^ same).all()
    assert 70 < mirrored.sum() < 130


def test_a_video_shorter_than_a_clip_is_refused_at_once(videos: list[str]) -> None:
    with pytest.raises(ClipTooShortError, match=r"0\.mp4 has 7 frames, the clip needs 9"):
        clip_stream(videos, num_frames=5)
    assert clip_stream(videos, num_frames=4).load(0)["video"].shape[1] == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "shorter than it was"])
def test_a_damaged_video_is_named(videos: list[str], tmp_path: Path, damage: str) -> None:
    bad, data = tmp_path / "bad.mp4", Path(videos[3]).read_bytes()
    match damage:
        case "truncated":
            bad.write_bytes(data[: len(data) // 2])
        case "empty":
            bad.write_bytes(b"")
        case "shorter than it was":
            bad.write_bytes(Path(videos[0]).read_bytes())
    stream = clip_stream([str(bad)], lengths=[30], num_frames=15, chunk_size=1)
    with pytest.raises(DataError, match=r"bad\.mp4"):
        stream.load(0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "not latents"])
def test_a_damaged_file_of_latents_is_named(files: list[str], tmp_path: Path, damage: str) -> None:
    bad, data = tmp_path / "bad.parquet", Path(files[0]).read_bytes()
    match damage:
        case "truncated":
            bad.write_bytes(data[: len(data) // 2])
        case "empty":
            bad.write_bytes(b"")
        case "not latents":
            bad.write_bytes(b"hello" * 100)
    with pytest.raises(DataError, match=r"bad\.parquet"):
        latent_stream([str(bad)], rows=[3]).load(0)
