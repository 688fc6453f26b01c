"""Videos and features in npy, npz, GIF and Parquet files."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.metrics.arrays import list_array_videos, read_array_clip, read_features

VIDEOS = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6, 3), dtype=np.uint8)


def write_gif(path: Path, video: np.ndarray) -> None:
    pictures = [Image.fromarray(frame) for frame in video]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125)


def test_videos_of_array_files(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", VIDEOS)
    np.savez_compressed(tmp_path / "set.npz", b=VIDEOS[1], a=VIDEOS[0])
    for name, names in (("set.npy", ["000000", "000001", "000002"]), ("set.npz", ["a", "b"])):
        uri = str(tmp_path / name)
        records = list_array_videos(storage.find_file(uri), "test")
        assert [r.uri for r in records] == [f"{uri}#/{n}" for n in names]
        assert {(r.codec, r.num_frames, r.height, r.width, r.status) for r in records} == {("raw", 5, 8, 6, "ok")}
        assert all(r.etag for r in records)
        assert np.array_equal(read_array_clip(records[1].uri, range(1, 5, 2)), VIDEOS[1][1:5:2])
        with pytest.raises(DataError, match="has no 6 frames any more"):
            read_array_clip(records[0].uri, range(6))


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", a=VIDEOS[0])
    np.savez(tmp_path / "features.npz", features=np.ones((3, 2)))
    pq.write_table(pa.table({"features": [[1.0, 2.0]]}), tmp_path / "F.PARQUET")
    for name in ("set", "features"):
        (tmp_path / f"{name}.npz").rename(tmp_path / f"{name.upper()}.NPZ")
    assert len(list_array_videos(storage.find_file(str(tmp_path / "SET.NPZ")), "test")) == 1
    assert read_features(str(tmp_path / "FEATURES.NPZ")).shape == (3, 1, 2)
    assert read_features(str(tmp_path / "F.PARQUET")).shape == (1, 1, 2)


def test_a_listed_file_that_changed_is_read_again(tmp_path: Path) -> None:
    for videos in (VIDEOS, VIDEOS[:1, ::-1]):
        np.save(tmp_path / "set.npy", videos)
        records = list_array_videos(storage.find_file(str(tmp_path / "set.npy")), "test")
        assert len(records) == len(videos)
        assert np.array_equal(read_array_clip(records[0].uri, range(5)), videos[0])


def test_gifs(tmp_path: Path) -> None:
    video = np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(6, 2).repeat(3, 3)
    write_gif(tmp_path / "a.gif", video)
    [record] = list_array_videos(storage.find_file(str(tmp_path / "a.gif")), "train")
    assert (record.codec, record.split, record.num_frames, record.height, record.width) == ("gif", "train", 5, 8, 6)
    assert np.array_equal(read_array_clip(record.uri, range(0, 5, 2)), video[::2])
    (tmp_path / "b.gif").write_bytes(b"GIF89a nothing")
    screen = (65_535).to_bytes(2, "little") * 2
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "huge.gif").write_bytes(content[:6] + screen + content[10:])
    for name in ("b.gif", "huge.gif"):
        with pytest.raises(DataError, match=f"{name} cannot be decoded"):
            list_array_videos(storage.find_file(str(tmp_path / name)), "train")


@pytest.mark.parametrize("array", [VIDEOS.astype(np.float32), VIDEOS[0, 0], VIDEOS[..., :2], VIDEOS[:0]])
def test_other_arrays_are_no_videos(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match="videos are uint8"):
        list_array_videos(storage.find_file(str(tmp_path / "a.npy")), "test")


def test_features_of_every_kind_of_file(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(4, 7))
    np.save(tmp_path / "a.npy", features)
    np.savez(tmp_path / "b.npz", features=features, other=features[:1])
    pq.write_table(pa.table({"features": list(features), "id": range(4)}), tmp_path / "c.parquet")
    for name in ("a.npy", "b.npz", "c.parquet"):
        assert np.array_equal(read_features(str(tmp_path / name)), features[:, None])
    np.save(tmp_path / "frames.npy", features.reshape(2, 2, 7).astype(np.float32))
    assert read_features(str(tmp_path / "frames.npy")).shape == (2, 2, 7)


class Harm:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a file ran')",)


def test_bad_features(tmp_path: Path) -> None:
    np.save(tmp_path / "harm.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "harm.npz", features=np.array([Harm()], dtype=object))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Harm()))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "zip.npz", features=np.ones((3, 2)))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("features", "words")
    for name in ("harm.npy", "harm.npz", "pickle.npy", "broken.npz", "zip.npy", "text.npz"):
        with pytest.raises(DataError, match="cannot be read as arrays without pickle"):
            read_features(str(tmp_path / name))
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    np.save(tmp_path / "integers.npy", np.ones((3, 2), int))
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan))
    ragged = pa.table({"features": [[1.0, 2.0], [1.0]]})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "without.parquet")
    for name, message in (
        ("two.npz", "call the features 'features'"),
        ("integers.npy", "features are floats"),
        ("nan.npy", "NaN or infinity"),
        ("ragged.parquet", "has no column 'features'"),
        ("without.parquet", "has no column 'features'"),
    ):
        with pytest.raises(DataError, match=message):
            read_features(str(tmp_path / name))


def test_size_is_limited_before_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        raise AssertionError(f"{uri} was read")

    np.save(tmp_path / "large.npy", np.zeros((1000, 100)))
    monkeypatch.setattr("ardiff.metrics.arrays.MAX_BYTES", 10_000)
    monkeypatch.setattr("ardiff.data.storage.read_bytes", fail)
    with pytest.raises(DataError, match="split it"):
        read_features(str(tmp_path / "large.npy"))


def test_size_is_limited_before_anything_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ardiff.metrics.arrays.MAX_BYTES", 10_000)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=np.zeros((1000, 100)))
    assert len(buffer.getvalue()) < 10_000
    (tmp_path / "bomb.npz").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="split it"):
        read_features(str(tmp_path / "bomb.npz"))
    write_gif(tmp_path / "bomb.gif", np.zeros((3, 100, 100, 3), np.uint8))
    with pytest.raises(DataError, match="split it"):
        list_array_videos(storage.find_file(str(tmp_path / "bomb.gif")), "test")
