"""Lists of videos in text, CSV and Parquet files: their classes, splits and relative paths."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_videos import encode, still

from ardiff.data import storage
from ardiff.data.discovery import probe_record
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.data.sources import discover
from ardiff.errors import DataError


def put(place: Path, data: bytes = b"x") -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return str(place)


def records_of(source: str, test_fraction: float = 0.5) -> list[VideoRecord]:
    return discover(source, "/nowhere", "folders", test_fraction).records


def test_a_text_list(tmp_path: Path) -> None:
    video = put(tmp_path / "videos" / "a b.mp4", encode(frames=3))
    put(tmp_path / "frames" / "1.png", still(1))
    source = put(tmp_path / "list.txt", f"videos/a b.mp4\n\n{tmp_path}/frames/\r\ngone.mp4\nhttps://x/y.mp4\n".encode())
    found, frames, gone, web = records_of(source)
    [listed] = storage.list_objects(str(tmp_path / "videos"))
    assert (found.uri, found.size, found.etag, found.status) == (video, listed.size, listed.etag, "")
    assert (probe_record(found, 25.0).num_frames, probe_record(frames, 25.0).num_frames) == (3, 1)
    assert (gone.uri, gone.status, gone.error) == (f"{tmp_path}/gone.mp4", "error", "unreadable")
    assert gone.reason == "there is no such file"
    assert (web.status, "https://x/y.mp4" in web.reason) == ("error", True)


def test_a_table_gives_classes_and_splits(tmp_path: Path) -> None:
    names = ["a.mp4", "b.mp4", "c.mp4"]
    for name in names:
        put(tmp_path / name)
    source = put(
        tmp_path / "l.csv", b"split,uri,class_name,note\ntrain,a.mp4,007,x\nval,b.mp4,cat,\ntest,c.mp4,007,y\n"
    )
    expected = [("007", 0, "train"), ("cat", 1, "test"), ("007", 0, "test")]
    assert [(r.class_name, r.label, r.split) for r in records_of(source)] == expected
    columns = {"uri": names, "class_name": ["007", "cat", "007"], "split": ["train", "val", "test"], "size": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    assert records_of(str(tmp_path / "l.parquet")) == records_of(source)


def test_a_manifest_is_a_list(tmp_path: Path) -> None:
    uri = put(tmp_path / "a.mp4")
    record = VideoRecord(uri, 1, "h264", 8, 8, 8.0, 9, 0, "cat", "test", "ok", "")
    write_manifest(str(tmp_path / "m.parquet"), [record])
    [found] = records_of(str(tmp_path / "m.parquet"))
    assert (found.uri, found.class_name, found.split, found.status) == (uri, "cat", "test", "")


def test_without_splits_a_share_is_for_tests(tmp_path: Path) -> None:
    source = put(tmp_path / "l.txt", "\n".join(f"/nowhere/{i}.mp4" for i in range(400)).encode())
    splits = [record.split for record in records_of(source, 0.25)]
    assert 0.18 < splits.count("test") / 400 < 0.32
    assert [record.split for record in records_of(source, 0.25)] == splits


def test_rows_that_are_not_taken_are_counted(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        put(tmp_path / name)
    source = put(tmp_path / "l.csv", b"link,class_name\na.mp4,x\n,x\na.mp4,x\nb.mp4,y\n , \nb.tar.gz,x\n")
    found = discover(source, "/nowhere", "folders", 0.5, uri_column="link")
    assert [(r.uri.rpartition("/")[2], r.class_name, r.reason) for r in found.records] == [
        ("a.mp4", "x", ""),
        ("b.mp4", "y", ""),
        ("b.tar.gz", "x", "it is a compressed tar: decompress it to .tar"),
    ]
    assert found.omitted == [
        "2 rows of the list have no URI, such as row 2",
        "1 rows of the list name a video of an earlier row, such as a.mp4 in row 3",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"\n \n", "lists no video"),
        ("l.csv", b"uri,split\na.mp4,train\na.mp4,test\n", r"lists a\.mp4 twice with another class or split"),
        ("l.csv", b"path,class\na.mp4,x\n", r"no column 'uri': set uri_column to one of its columns \(path, class\)"),
        ("l.csv", b"uri,split\na.mp4,later\n", r"the split 'later' of a\.mp4"),
        ("l.csv", b"", "cannot be read as a list"),
        ("l.parquet", b"x", "cannot be read as a list"),
    ],
)
def test_wrong_lists(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        records_of(put(tmp_path / name, content))


def test_split_lists_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give their splits in its column"):
        discover(put(tmp_path / "l.txt", b"a.mp4"), "/nowhere", "folders", 0.5, ("train.txt", "test.txt"))


def test_objects_are_found_on_s3(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/v/a.mp4", b"12345")
    [listed] = storage.list_objects(f"{s3_bucket}/v")
    assert storage.find_file(f"{s3_bucket}/v/a.mp4") == listed
    assert storage.find_file(f"{s3_bucket}/v/b.mp4").problem.startswith("Cannot look at")
