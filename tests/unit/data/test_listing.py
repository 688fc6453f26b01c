"""Listings of folders as disks hold them, and what becomes of each entry."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from broken_videos import encode, still
from PIL import Image

from ardiff.data import s3, storage
from ardiff.data.clips import natural_order, read_clips
from ardiff.data.discovery import probe_record, summarize
from ardiff.data.manifest import VideoRecord, read_manifest, write_manifest
from ardiff.data.sources import discover
from ardiff.errors import DataError


def names_below(folder: Path) -> list[str]:
    return [uri[len(str(folder)) + 1 :] for uri in storage.list_files(str(folder))]


def found_in(folder: Path) -> tuple[dict[str, VideoRecord], Counter[str]]:
    found = discover(str(folder), str(folder / "output"), "folders", 0.5)
    return {record.uri[len(str(folder)) + 1 :]: record for record in found.records}, found.ignored


def test_the_listing_is_that_of_pyarrow(tmp_path: Path) -> None:
    for name in ("a/b/c.mp4", "a/é & #.mp4", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    os.utime(tmp_path / "d.txt", ns=(1, 1_234_567_890_123_456_789))
    infos = pafs.LocalFileSystem().get_file_info(pafs.FileSelector(str(tmp_path), recursive=True))
    expected = [storage.StoredFile(i.path, i.size, f"{i.mtime_ns:x}") for i in infos if i.type == pafs.FileType.File]
    assert storage.list_objects(str(tmp_path)) == sorted(expected, key=lambda file: file.uri)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "pool").mkdir()
    for name in ("data/good.mp4", "pool/other.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "data" / "sub" / "up").symlink_to("..")
    (tmp_path / "data" / "latest").symlink_to(".")
    (tmp_path / "data" / "cats").symlink_to("../pool")
    (tmp_path / "data" / "pets").symlink_to("../pool")
    (tmp_path / "pool" / "back").symlink_to("../data")
    assert names_below(tmp_path / "data") == ["cats/other.mp4", "good.mp4", "pets/other.mp4"]


def test_entries_that_cannot_be_read_are_records_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").write_bytes(encode(frames=2))
    (tmp_path / "missing.mp4").symlink_to(".git/annex/objects/missing")
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))).write_bytes(b"x")
    records, ignored = found_in(tmp_path)
    reasons = {name: (record.status, record.error, record.reason) for name, record in records.items()}
    assert reasons == {
        "caf\\xe9.mp4": ("error", "unreadable", "its name is not UTF-8: rename it"),
        "good.mp4": ("", "", ""),
        "missing.mp4": (
            "error",
            "unreadable",
            "it is a link to a file that cannot be reached (No such file or directory)",
        ),
        "pipe.mp4": ("error", "unreadable", "it is a pipe, socket or device, not a file"),
        "self.mp4": (
            "error",
            "unreadable",
            "it is a link to a file that cannot be reached (Too many levels of symbolic links)",
        ),
    }
    assert not ignored
    write_manifest(str(tmp_path / "m.parquet"), list(records.values()))
    assert read_manifest(str(tmp_path / "m.parquet")) == list(records.values())
    assert names_below(tmp_path) == ["good.mp4", "m.parquet"]


def test_a_folder_with_a_picture_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(still(1))
    (tmp_path / "part" / "2.png").symlink_to("nowhere")
    records, _ = found_in(tmp_path)
    assert {name: record.status for name, record in records.items()} == {"whole/": "", "part/": "error"}
    assert records["part/"].reason.startswith("2.png: it is a link")


def test_files_that_are_not_taken_are_counted_by_suffix(tmp_path: Path) -> None:
    names = ["a.mp4", "b.TS", "c.mpg", "d.wmv", "e.flv", "f.3gp", "g.m2ts", "h.mxf", "i.gif", "j.GIF", "notes", "a.jpg"]
    for name in [*names, ".hidden.mp4", "frames/1.webp", "frames/2.webp", "frames/notes.txt"]:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"x")
    records, ignored = found_in(tmp_path)
    assert [name.removeprefix("x/") for name in records] == sorted([*names[:8], "frames/"])
    assert ignored == {".gif": 2, "": 1, ".jpg": 1, ".txt": 1}


def test_a_source_without_videos_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.gif", "b.gif", "c"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"It holds 3 files \(2 \.gif, 1 without a suffix\)\. Videos are \.mp4, "):
        found_in(tmp_path)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF"])
def test_folders_of_other_pictures(tmp_path: Path, kind: str) -> None:
    suffix = kind.lower().replace("tiff", "tif")
    (tmp_path / "frames").mkdir()
    for number in range(3):
        picture = Image.new("RGB", (32, 24), (40 * number, 90, 200))
        picture.save(tmp_path / "frames" / f"{number}.{suffix}", kind, lossless=True)
    records, _ = found_in(tmp_path)
    record = probe_record(records["frames/"], 25.0)
    assert (record.status, record.codec, record.num_frames, record.fps) == ("ok", kind.lower(), 3, 25.0)
    [clip] = read_clips(record, [[0, 2]], 0.0, None)
    assert np.array_equal(clip[:, 0, 0], [(0, 90, 200), (80, 90, 200)])


def test_digits_that_are_no_decimal_numbers_sort_as_letters() -> None:
    assert sorted(["1²2.png", "1²10.png", "²1.png"], key=natural_order) == ["1²2.png", "1²10.png", "²1.png"]


def test_warnings_of_videos_are_counted(tmp_path: Path) -> None:
    video = VideoRecord("a", 1, "h264", 64, 48, 8.0, 20, 0, "x", "train", "ok", "", warnings="interlaced, hdr")
    text = summarize([video, video])
    assert "warning: 2 interlaced: " in text
    assert "warning: 2 hdr: " in text


@pytest.mark.parametrize(
    ("uri", "size"),
    [("s3://b/a//c.mp4", 7), ("s3://b/a//c", None), ("s3://b/a//d.mp4", None)],
)
def test_keys_with_empty_parts(monkeypatch: pytest.MonkeyPatch, uri: str, size: int | None) -> None:
    keys = [("a//c.mp4", 7, "1"), ("a//c/e.mp4", 8, "2"), ("a//dd", 9, "3")]
    monkeypatch.setattr(s3, "objects", lambda _, prefix: (entry for entry in keys if entry[0].startswith(prefix)))
    assert storage.exists(uri) == (size is not None or uri.endswith("//c"))
    if size is not None:
        assert storage.size(uri) == size
    else:
        with pytest.raises(DataError, match="There is no file"):
            storage.size(uri)
