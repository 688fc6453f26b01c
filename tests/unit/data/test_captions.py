"""Captions from files beside the videos, from metadata files and from lists; what cannot be one is counted."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from ardiff.data import storage
from ardiff.data.captions import MAX_CAPTIONS, MAX_CHARACTERS, MAX_TEXT_BYTES
from ardiff.data.discovery import reuse_probe, summarize
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.data.sources import Discovery, discover
from ardiff.errors import DataError

LATIN = "ein gr\xfcner Ring".encode("latin-1")


def found(folder: Path, files: dict[str, bytes | str], **settings: str) -> Discovery:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return discover(str(folder), "/nowhere", "folders", 0.5, **settings)


def captions_of(discovery: Discovery, folder: Path) -> dict[str, tuple[str, ...]]:
    return {r.uri.removeprefix(f"{folder}/"): r.captions for r in discovery.records}


def test_text_files_beside_videos(tmp_path: Path) -> None:
    files = {
        "x/a.mp4": "x",
        "x/a.txt": "\ufeffa red ring\r\n\n  a ring,\tred \na red ring\n",
        "x/b.v2.mp4": "x",
        "x/b.v2.TXT": "b",
        "x/frames/1.png": "x",
        "x/frames/notes.txt": "no caption",
        "x/frames.txt": "pictures",
        "x/c.mp4": "x",
        "x/c.txt": " \n\n",
        "x/readme.txt": "no caption either",
    }
    discovery = found(tmp_path, files)
    assert captions_of(discovery, tmp_path) == {
        "x/a.mp4": ("a red ring", "a ring, red"),
        "x/b.v2.mp4": ("b",),
        "x/frames/": ("pictures",),
        "x/c.mp4": (),
    }
    assert discovery.ignored == {".txt": 2}
    assert discovery.omitted_captions == []


ROWS = [
    {"file_name": "a.mp4", "text": ["one", "two"], "note": 1},
    {"file_name": "./sub/b.mp4", "text": "b"},
    {"file_name": "a.mp4", "text": "three"},
    {"file_name": "frames", "text": "pictures"},
    {"file_name": "c.mp4", "text": None},
    {"file_name": "gone.mp4", "text": "not there"},
    {"file_name": "../d.mp4", "text": "outside"},
]
VIDEOS = {"set/x/a.mp4": "x", "set/x/sub/b.mp4": "x", "set/x/frames/1.png": "x", "set/x/c.mp4": "x", "set/d.mp4": "x"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files(tmp_path: Path, kind: str) -> None:
    """A metadata file names videos below its own folder only."""
    file = tmp_path / "all" / "set" / "x" / f"metadata.{kind}"
    file.parent.mkdir(parents=True)
    match kind:
        case "jsonl":
            file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        case "csv":
            file.write_text("file_name,note,text\n" + "\n".join(f'{name},1,"{text}"' for name, text in plain_rows()))
        case _:
            names, texts = zip(*plain_rows(), strict=True)
            pq.write_table(pa.table({"file_name": names, "text": [[text] for text in texts]}), file)
    discovery = found(tmp_path / "all", VIDEOS)
    assert captions_of(discovery, tmp_path / "all" / "set") == {
        "d.mp4": (),
        "x/a.mp4": ("one", "two", "three"),
        "x/c.mp4": (),
        "x/frames/": ("pictures",),
        "x/sub/b.mp4": ("b",),
    }
    assert discovery.omitted_captions == [
        f"2 rows of metadata files name no video of the source, such as gone.mp4 in {file}"
    ]
    assert not discovery.ignored


def plain_rows() -> list[tuple[str, str]]:
    """The rows with one caption each."""
    rows = [(row["file_name"], row["text"]) for row in ROWS]
    return [(str(name), text or "") for name, texts in rows for text in (texts if isinstance(texts, list) else [texts])]


def test_captions_belong_to_one_file(tmp_path: Path) -> None:
    metadata = json.dumps({"file_name": "a.mp4", "text": "one"})
    files = {"a.mp4": "x", "b.mp4": "x", "a.txt": "two", "metadata.jsonl": metadata}
    with pytest.raises(DataError, match=r"a\.mp4 has captions in .*a\.txt and in .*metadata\.jsonl: keep"):
        found(tmp_path, files)
    (tmp_path / "a.txt").write_text("")  # without a caption it is no second source
    assert captions_of(found(tmp_path, {}), tmp_path) == {"a.mp4": ("one",), "b.mp4": ()}


def test_what_is_no_caption_is_counted(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{name}.mp4": "x" for name in "abcdef"}
    files |= {"a.txt": LATIN, "b.txt": "long " * 20_000 + "\ngood", "c.txt": "x" * (MAX_TEXT_BYTES + 1)}
    files |= {"d.txt": "\n".join(map(str, range(MAX_CAPTIONS + 3))), "e.txt": "y" * MAX_CHARACTERS}
    files["metadata.jsonl"] = r'{"file_name": "f.mp4", "text": "\ud800 half a pair"}'
    discovery = found(tmp_path, files)
    captions = captions_of(discovery, tmp_path)
    assert {name: len(kept) for name, kept in captions.items()} == {
        "a.mp4": 0,
        "b.mp4": 1,
        "c.mp4": 0,
        "d.mp4": MAX_CAPTIONS,
        "e.mp4": 1,
        "f.mp4": 0,
    }
    assert sorted(discovery.omitted_captions) == [
        f"1 captions are longer than 4096 characters, such as {tmp_path}/b.mp4",
        "1 captions are not Unicode, such as f.mp4",
        f"1 text files beside videos are larger than 1048576 bytes, such as {tmp_path}/c.txt",
        f"1 text files beside videos are not UTF-8, such as {tmp_path}/a.txt",
        f"3 captions come after the first 64 of a video, such as {tmp_path}/d.mp4",
    ]
    text = summarize([replace(record, status="ok") for record in discovery.records])
    assert text.endswith("captions: 66, of 3 videos; 3 videos have none")
    assert summarize([replace(discovery.records[0], status="ok")]).endswith("captions: none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", LATIN, "Line 1 of .* is not JSON in UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.mp4"}\n[1]', "Line 2 of .* is not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "text": 7}', r"a caption of a\.mp4 is 7, not text"),
        ("metadata.csv", b"file_name,text\na.mp4," + LATIN, "cannot be read as a metadata file .*UTF8"),
        ("metadata.parquet", b"PAR1", "cannot be read as a metadata file"),
    ],
)
def test_wrong_metadata(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(tmp_path, {"a.mp4": "x", name: content})


def test_text_of_a_parquet_file_is_checked(tmp_path: Path) -> None:
    texts = pa.array([LATIN], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.mp4"], "text": texts}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"cannot be read as a metadata file .*UTF8"):
        found(tmp_path, {"a.mp4": "x"})


def test_the_column_can_be_named(tmp_path: Path) -> None:
    files = {"a.mp4": "x", "metadata.csv": "file_name,title\na.mp4,a ring"}
    discovery = found(tmp_path, files)
    assert discovery.records[0].captions == ()
    [note] = discovery.omitted_captions
    assert note == f"1 metadata files have no column text or caption or captions, such as {tmp_path}/metadata.csv"
    assert found(tmp_path, {}, caption_column="title").records[0].captions == ("a ring",)
    with pytest.raises(DataError, match="has no column 'name': set caption_column to one of its columns"):
        found(tmp_path, {}, caption_column="name")


def test_lists_have_captions(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    source = tmp_path / "list.csv"
    source.write_text('uri,text\na.mp4,"one\ntwo"\nb.mp4,\na.mp4,three\n')
    records = discover(str(source), "/nowhere", "folders", 0.5).records
    assert [r.captions for r in records] == [("one two", "three"), ()]
    write_manifest(str(tmp_path / "manifest.parquet"), records)
    again = discover(str(tmp_path / "manifest.parquet"), "/nowhere", "folders", 0.5).records
    assert [r.captions for r in again] == [r.captions for r in records]
    source.write_text("uri,text,split\na.mp4,one,train\na.mp4,two,test\n")
    with pytest.raises(DataError, match=r"lists a\.mp4 twice with another class or split"):
        discover(str(source), "/nowhere", "folders", 0.5)


def test_captions_are_read_again_when_the_probe_is_not(tmp_path: Path) -> None:
    [record] = found(tmp_path, {"a.mp4": "x", "a.txt": "new"}).records
    known = VideoRecord(
        record.uri, record.size, "h264", 8, 8, 8.0, 9, 0, "x", "train", "ok", "", etag=record.etag, captions=("old",)
    )
    assert reuse_probe(record, known).captions == ("new",)
    assert reuse_probe(record, known).num_frames == 9


def test_s3_is_listed_once_and_only_text_files_are_read(s3_server: S3Server, s3_bucket: str) -> None:
    for name, data in {"a.mp4": b"x", "b.mp4": b"x", "a.txt": b"one", "metadata.jsonl": b""}.items():
        storage.write_bytes(f"{s3_bucket}/v/{name}", data)
    before = len(s3_server.requests(s3_bucket.removeprefix("s3://")))
    records = discover(f"{s3_bucket}/v", "/nowhere", "folders", 0.5).records
    assert [r.captions for r in records] == [("one",), ()]
    requests = s3_server.requests(s3_bucket.removeprefix("s3://"))[before:]
    assert len(requests) == 3, requests  # the listing, a.txt and metadata.jsonl
