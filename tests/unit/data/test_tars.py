"""Videos in tars: listed and read in place, with captions and classes; damaged and hostile tars."""

import io
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from broken_videos import encode
from tar_files import tar_of

from ardiff.data import storage
from ardiff.data.clips import read_clip
from ardiff.data.discovery import probe_record
from ardiff.data.members import Member, parse_member, unpacked
from ardiff.data.sources import Discovery, discover
from ardiff.data.tars import list_tar
from ardiff.errors import DataError, StorageError

Content = dict[str, bytes]
VIDEO = encode(frames=3)


def put(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def found(source: object, **settings: str) -> Discovery:
    return discover(str(source), "/nowhere", "folders", 0.5, **settings)


def name_of(uri: str) -> str:
    member = parse_member(uri)
    assert member is not None
    return f"{member.tar.rpartition('/')[2]}:{member.name}"


def test_a_uri_names_the_bytes_of_a_member() -> None:
    member = Member("s3://b/x#y/s.tar", 1536, 7, "cats/a.tar#bytes=0-9/b.mp4")
    assert member.uri == "s3://b/x#y/s.tar#bytes=1536-1542/cats/a.tar#bytes=0-9/b.mp4"
    assert parse_member(member.uri) == member
    assert parse_member(Member("s.TAR", 512, 0, "a.mp4").uri) == Member("s.TAR", 512, 0, "a.mp4")
    assert unpacked(member.uri) == "s3://b/x#y/cats/a.tar#bytes=0-9/b.mp4"
    for uri in ("a.mp4", "s3://b/s.tar", "a#bytes=0-9/b.mp4", "s.tar#bytes=0-9", "s.tar#bytes=-9/a.mp4"):
        assert parse_member(uri) is None
        assert unpacked(uri) == uri


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place(tmp_path: Path, kind: int) -> None:
    long = "a" * 90 + "/" + "é" * (1 if kind == tarfile.USTAR_FORMAT else 150) + ".mp4"
    other = encode(frames=5)
    source = put(tmp_path / "s.tar", tar_of({"x/1.mp4": VIDEO, long: other, "x/empty.mp4": b""}, kind))
    records = {name_of(r.uri): r for r in found(source).records}
    assert set(records) == {"s.tar:x/1.mp4", f"s.tar:{long}", "s.tar:x/empty.mp4"}
    [tar] = storage.list_objects(str(tmp_path))
    for name, data in (("s.tar:x/1.mp4", VIDEO), (f"s.tar:{long}", other), ("s.tar:x/empty.mp4", b"")):
        record = records[name]
        assert (record.size, record.etag) == (len(data), tar.etag)
        assert storage.read_bytes(record.uri) == data
        assert storage.read_range(record.uri, 10, 20) == data[10:30]
        assert storage.read_range(record.uri, len(data) // 2, 10**6) == data[len(data) // 2 :]
        assert storage.read_range(record.uri, len(data) + 5, 20) == b""
        reader = storage.RangeReader(record.uri, record.size)
        assert reader.read() == data
        assert storage.find_file(record.uri) == storage.StoredFile(record.uri, len(data), tar.etag)
    probed = probe_record(records[f"s.tar:{long}"], 25.0)
    assert (probed.status, probed.num_frames) == ("ok", 5)
    plain = replace(probed, uri=put(tmp_path / "plain.mp4", other))
    np.testing.assert_array_equal(read_clip(probed, 1, 3, 1, None), read_clip(plain, 1, 3, 1, None))
    assert probe_record(records["s.tar:x/empty.mp4"], 25.0).error == "empty"


def test_captions_and_classes_have_the_key_of_the_video(tmp_path: Path) -> None:
    content: Content = {
        "00.mp4": VIDEO,
        "00.txt": "  a cat\njumps \n".encode("utf-8-sig"),
        "00.json": b'{"caption": "a cat", "class_name": "ignored", "url": "x"}',
        "00.cls": b"7\n",
        "01.left.mp4": VIDEO,
        "01.json": b'{"text": ["one", "two"], "class_name": "dog"}',
        "v1.2.mp4": VIDEO,
        "v1.2.txt": b"second",
        "v1.3.mp4": VIDEO,
        "v1.3.txt": b"third",
        "04.mp4": VIDEO,
        "04.json": b"[1]",
        "05.mp4": VIDEO,
        "05.txt": b"\xff\xfe",
        "06.txt": b"of no video",
        "07.jpg": b"x",
        "README": b"x",
    }
    put(tmp_path / "s-0.tar", tar_of(content))
    put(tmp_path / "s-0.idx", b"x")
    result = found(tmp_path)
    rows = {name_of(r.uri): (r.captions, r.class_name, r.label) for r in result.records}
    assert rows == {
        "s-0.tar:00.mp4": (("a cat", "jumps"), "7", 0),
        "s-0.tar:01.left.mp4": (("one", "two"), "dog", 1),
        "s-0.tar:v1.2.mp4": (("second",), "video", 2),
        "s-0.tar:v1.3.mp4": (("third",), "video", 2),
        "s-0.tar:04.mp4": ((), "video", 2),
        "s-0.tar:05.mp4": ((), "video", 2),
    }
    assert result.ignored == {".idx": 1, ".jpg": 1, "": 1, ".txt": 1}
    assert sorted(result.omitted_captions) == [
        f"1 texts in tars are not JSON objects, such as 04.json in {tmp_path}/s-0.tar",
        f"1 texts in tars are not UTF-8, such as 05.txt in {tmp_path}/s-0.tar",
    ]
    named = {name_of(r.uri): r.captions for r in found(tmp_path, caption_column="url").records}
    assert named["s-0.tar:00.mp4"] == ("a cat", "jumps", "x")


def test_tars_lie_as_if_they_were_unpacked(tmp_path: Path) -> None:
    put(tmp_path / "a" / "train-0.tar", tar_of({"./cats/1.mp4": VIDEO, "dogs/2.mp4": VIDEO}))
    put(tmp_path / "a" / "val-0.tar", tar_of({"cats/1.mp4": VIDEO}))
    put(tmp_path / "b" / "train" / "0.tar", tar_of({"1.mp4": VIDEO}))
    put(tmp_path / "b" / "test" / "0.tar", tar_of({"1.mp4": VIDEO}))
    rows = [(name_of(r.uri), r.class_name, r.split) for r in found(tmp_path / "a").records]
    assert rows == [
        ("train-0.tar:cats/1.mp4", "cats", "train"),
        ("train-0.tar:dogs/2.mp4", "dogs", "train"),
        ("val-0.tar:cats/1.mp4", "cats", "test"),
    ]
    assert [(r.class_name, r.split) for r in found(tmp_path / "b").records] == [("video", "test"), ("video", "train")]
    train, test = put(tmp_path / "train.txt", b"cats/1.mp4"), put(tmp_path / "test.txt", b"2.mp4")
    result = discover(f"{tmp_path}/a/train-0.tar", "/nowhere", "folders", 0.5, (train, test))
    assert [(r.class_name, r.split) for r in result.records] == [("cats", "train"), ("dogs", "test")]


def test_tars_beside_videos_are_not_taken(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", VIDEO)
    put(tmp_path / "all.tar", tar_of({"a.mp4": VIDEO}))
    result = found(tmp_path)
    assert [r.uri for r in result.records] == [f"{tmp_path}/a.mp4"]
    assert result.ignored == {".tar": 1}


def test_a_list_of_tars(tmp_path: Path) -> None:
    put(tmp_path / "x" / "0.tar", tar_of({"a.mp4": VIDEO, "a.cls": b"ape", "b.mp4": VIDEO}))
    put(tmp_path / "c.mp4", VIDEO)
    source = put(
        tmp_path / "l.csv", b"uri,class_name,split,text\nx/0.tar,bat,val,hi\nc.mp4,cat,train,yo\ngone.tar,bat,train,\n"
    )
    result = found(source)
    rows = [(unpacked(r.uri)[len(str(tmp_path)) + 1 :], r.class_name, r.split, r.captions) for r in result.records]
    assert rows == [
        ("c.mp4", "cat", "train", ("yo",)),
        ("x/a.mp4", "ape", "test", ()),
        ("x/b.mp4", "bat", "test", ()),
        ("gone.tar", "", "train", ()),
    ]
    assert (result.records[-1].error, result.records[-1].reason) == ("unreadable", "there is no such file")
    assert result.omitted_captions == [
        f"1 captions in a list belong to a tar, not to a video, such as {tmp_path}/x/0.tar"
    ]


def damaged(content: Content, cut: Callable[[bytes], bytes], tmp_path: Path) -> tuple[list[str], str, str]:
    """The videos that are found, and the error of the tar."""
    tar = storage.find_file(put(tmp_path / "s.tar", cut(tar_of(content))))
    listing = list_tar(tar)
    kind = getattr(listing.problem, "kind", "")
    return [member.name for member in listing.videos], kind, str(listing.problem or "")


def test_damaged_tars_keep_the_members_before_the_damage(tmp_path: Path) -> None:
    content = {"a.mp4": b"a" * 700, "b.mp4": b"b" * 700}  # each 512 + 1024 bytes, then 1024 or more zeros
    whole = (["a.mp4", "b.mp4"], "", "")
    assert damaged(content, lambda data: data, tmp_path) == whole
    assert damaged(content, lambda data: data[: 3072 + 512], tmp_path) == whole
    assert damaged(content, lambda data: data[:3072], tmp_path)[:2] == (["a.mp4", "b.mp4"], "truncated")
    assert damaged(content, lambda data: data[:2500], tmp_path)[:2] == (["a.mp4"], "truncated")
    assert damaged(content, lambda data: data[:1700], tmp_path)[:2] == (["a.mp4"], "truncated")
    assert damaged(content, lambda data: data[:100], tmp_path)[:2] == ([], "truncated")
    hole = damaged(content, lambda data: data[:1536] + b"\xff" * 512 + data[2048:], tmp_path)
    assert hole == (["a.mp4"], "corrupt", "it is damaged: there is no header at byte 1536 of 10240")
    assert damaged(content, lambda data: b"", tmp_path) == ([], "empty", "it is empty")
    assert damaged(content, lambda data: b"<html>" * 500, tmp_path)[:2] == ([], "corrupt")
    zipped = damaged(content, lambda data: b"\x1f\x8b" + data, tmp_path)
    assert zipped[2] == "it is compressed with gzip, so its members cannot be read in place: gunzip it"


def test_a_damaged_tar_is_a_row_of_the_error_log(tmp_path: Path) -> None:
    put(tmp_path / "0.tar", tar_of({"a.mp4": VIDEO, "b.mp4": VIDEO}))
    cut = put(tmp_path / "1.tar", tar_of({"a.mp4": VIDEO, "b.mp4": VIDEO})[: len(VIDEO) + 2048])
    (tmp_path / "2.tar").symlink_to("gone.tar")
    records = found(tmp_path).records
    assert [(r.uri, r.error) for r in records if r.status] == [(cut, "truncated"), (f"{tmp_path}/2.tar", "unreadable")]
    assert len(records) == 5
    put(tmp_path / "1.tar", tar_of({"a.mp4": VIDEO})[:600])
    with pytest.raises(DataError, match=r"no video in .*/1\.tar cannot be used: it is cut off"):
        found(cut)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    source = put(tmp_path / "s.tar.gz", b"x")
    with pytest.raises(DataError, match=r"s\.tar\.gz is a compressed tar, .*: decompress it to a \.tar first"):
        found(source)
    with pytest.raises(DataError, match=r"It holds 1 files \(1 \.gz\)\. Compressed tars are not read"):
        found(tmp_path)
    with pytest.raises(DataError, match=r"gone\.tar cannot be read \(there is no such file\)"):
        found(tmp_path / "gone.tar")


def test_hostile_names_become_no_paths(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.mp4", VIDEO)
    content = {"../secret.mp4": b"x", secret: b"x", "a\\..\\b.mp4": b"x", "a\x1b[2J.mp4": b"x", "._a.mp4": b"x"}
    buffer = io.BytesIO(tar_of({**content, "good.mp4": VIDEO, "twice.mp4": b"old", "./twice.mp4": VIDEO}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, kind in (
            ("link.mp4", tarfile.SYMTYPE),
            ("hard.mp4", tarfile.LNKTYPE),
            ("pipe.mp4", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, secret
            tar.addfile(info)
    source = put(tmp_path / "t" / "s.tar", buffer.getvalue())
    result = found(source)
    assert {name_of(r.uri): r.size for r in result.records} == {
        "s.tar:good.mp4": len(VIDEO),
        "s.tar:twice.mp4": len(VIDEO),
    }
    assert [line.partition(", such as")[0] for line in result.omitted] == [
        "3 members of tars have names that lead out of it",
        "3 members of tars are links, devices or sparse files",
        "1 members of tars have names with control characters or bytes that are not UTF-8",
        "1 members of tars are followed by another one of the same name",
    ]
    # A list can name any member. Its name is not a path either, also where folders of that name exist.
    (tmp_path / "t" / "s.tar#bytes=0-3").mkdir()
    assert storage.read_bytes(f"{source}#bytes=0-3/../../secret.mp4") == b"../s"
    assert storage.find_file(f"{source}#bytes=0-99999999/x.mp4").problem == "the tar ends before it"
    with pytest.raises(StorageError):
        storage.read_bytes(f"{tmp_path}/gone.tar#bytes=0-3/../secret.mp4")


def test_claims_of_headers_are_bounded(tmp_path: Path) -> None:
    def header(kind: bytes, size: int) -> bytes:
        info = tarfile.TarInfo("x.mp4")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    zeros = bytes(2 << 20)
    for start in (header(tarfile.GNUTYPE_LONGNAME, 2 << 20), header(tarfile.XHDTYPE, 2 << 20)):
        problem = list_tar(storage.find_file(put(tmp_path / "s.tar", start + zeros))).problem
        assert problem is not None
        assert "a header has more than 1048576 bytes" in str(problem)
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.CONTTYPE, b"Z"):
        assert list_tar(storage.find_file(put(tmp_path / "s.tar", header(kind, -512) * 2 + zeros))).problem is not None
    chain = list_tar(storage.find_file(put(tmp_path / "s.tar", header(tarfile.GNUTYPE_LONGNAME, 0) * 5000 + zeros)))
    assert chain.problem is not None


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    generator = random.Random(0)
    data = tar_of({"a.mp4": b"a" * 600, "é" * 120: b"b", "c.json": b"{}", "d.mp4": b"d" * 5}, tarfile.PAX_FORMAT)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(data) - 1024)] = generator.choice([0, 32, 49, 128, 255, 120, 76])
        offset = generator.randrange(0, 7) * 512  # a right sum of the header, so that damage is not found by it
        head = bytes(changed[offset : offset + 148]) + b" " * 8 + bytes(changed[offset + 156 : offset + 512])
        changed[offset + 148 : offset + 156] = b"%06o\0 " % sum(head)
        listing = list_tar(storage.find_file(put(tmp_path / "s.tar", bytes(changed))))
        assert all(member.start + member.size <= len(data) for member in listing.videos)


def test_a_tar_on_s3_is_listed_by_few_requests(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large = os.urandom(1 << 20)
    content = {f"{i}.{suffix}": data for i in range(4) for suffix, data in (("mp4", large), ("txt", b"cat"))}
    storage.write_bytes(f"{s3_bucket}/w/s.tar", tar_of(content))
    lengths: list[int] = []
    read = storage.read_range
    monkeypatch.setattr(
        storage, "read_range", lambda uri, start, length: lengths.append(length) or read(uri, start, length)
    )
    records = found(f"{s3_bucket}/w").records
    assert [(r.size, r.captions) for r in records] == [(1 << 20, ("cat",))] * 4
    assert len(lengths) <= 6
    assert sum(lengths) < 1 << 19
    assert storage.read_bytes(records[2].uri) == large
