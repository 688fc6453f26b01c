"""Tables with the bytes of videos: Parquet, and Arrow as Hugging Face datasets writes it; damage and hostile rows."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_videos import encode

from ardiff.data import storage
from ardiff.data.discovery import probe_record
from ardiff.data.manifest import VideoRecord
from ardiff.data.sources import Discovery, discover, find_tables, records_of_tables
from ardiff.data.video_tables import VideoTable, WrittenGroup, describe_tables, write_group
from ardiff.errors import DataError, StorageError

VIDEO = encode(frames=3)
MKV = encode(container="matroska", frames=2)
VIDEO_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def table_of(values: list[Any], kind: pa.DataType = VIDEO_TYPE, **columns: Any) -> pa.Table:
    arrays = {"video": pa.array(values, kind), **{name: pa.array(column) for name, column in columns.items()}}
    return pa.table(arrays)


def hugging_face(table: pa.Table, names: list[str]) -> pa.Table:
    """The table with the notes of ``datasets``."""
    features = {"video": {"_type": "Video"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_arrow(table: pa.Table, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return str(path)


def write_parquet(table: pa.Table, path: Path, rows: int = 2) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


def tables_in(source: object, **settings: str) -> Discovery:
    return discover(str(source), "/nowhere", "folders", 0.5, **settings)


def written(tables: list[VideoTable], output: Path) -> Discovery:
    groups = [
        (table, [WrittenGroup.from_json(write_group(table, i, str(output)).to_json()) for i in range(table.num_groups)])
        for table in tables
    ]
    return records_of_tables(groups, str(output), 0.5)


def rows_of(records: list[VideoRecord]) -> list[tuple[object, ...]]:
    return [(storage.read_bytes(r.uri), r.class_name, r.split, r.captions) for r in records if not r.status]


def test_rows_of_parquet_become_files(tmp_path: Path) -> None:
    table = table_of(
        [VIDEO, None, MKV, b"text", VIDEO],
        pa.binary(),
        class_name=["cat", "cat", "dog", None, "dog"],
        split=["train", "train", "val", "test", "later"],
        caption=[" a  cat", "x", "a dog", None, "x"],
    )
    source = write_parquet(table, tmp_path / "in" / "clips.x.parquet")
    found = tables_in(source)
    [opened] = found.tables
    assert (opened.num_groups, opened.num_rows, opened.video_column) == (3, 5, "video")
    result = written(found.tables, tmp_path / "out")
    assert rows_of(result.records) == [
        (VIDEO, "cat", "train", ("a cat",)),
        (MKV, "dog", "test", ("a dog",)),
        (b"text", "video", "test", ()),
    ]
    assert [(r.etag, r.size) for r in result.records] == [
        (f.etag, f.size) for f in (storage.find_file(r.uri) for r in result.records)
    ]
    names = [r.uri.rpartition("/")[2] for r in result.records]
    assert names == ["00000-0000000.mp4", "00001-0000000.mkv", "00001-0000001.bin"]
    assert (tmp_path / "out" / "videos").is_dir()
    probes = [probe_record(record, 25.0) for record in result.records]
    assert [(p.num_frames, p.error) for p in probes] == [(3, ""), (2, ""), (0, "undecodable")]
    assert result.omitted == [
        f"1 rows of tables have no video, such as row 1 of group 0 of {source}",
        "1 rows of tables have a split that is none of train, training, test, testing, val, valid, validation, such as "
        f"row 0 of group 2 of {source}",
    ]


def test_without_splits_a_share_of_small_tables_is_for_tests(tmp_path: Path) -> None:
    for i in range(40):
        write_parquet(table_of([b"x"], pa.binary()), tmp_path / "in" / f"p{i}.parquet")
    splits = [r.split for r in written(tables_in(tmp_path / "in").tables, tmp_path / "out").records]
    assert len(splits) == 40
    assert set(splits) == {"train", "test"}


def test_what_is_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([VIDEO, MKV, VIDEO], pa.binary(), caption=["a", "b", "c"], note=["d", "e", "f"])
    source = write_parquet(table, tmp_path / "t.parquet")
    [opened] = tables_in(source).tables
    write_group(opened, 0, str(tmp_path / "out"))
    puts: list[str] = []
    put = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (puts.append(uri), put(uri, data)))
    first = written([opened], tmp_path / "out")
    assert [uri.rpartition("/")[2][:13] for uri in puts] == ["00001-0000000", puts[1].rpartition("/")[2][:13]]
    assert written([opened], tmp_path / "out") == first
    assert len(puts) == 2
    [renamed] = tables_in(source, caption_column="note").tables  # rows are read again, videos are not written again
    assert [r.captions for r in written([renamed], tmp_path / "out").records] == [("d",), ("e",), ("f",)]
    assert all(uri.endswith(".json") for uri in puts[2:])
    write_parquet(table_of([MKV], pa.binary()), tmp_path / "t.parquet")
    os.utime(source, ns=(1, 1))
    [changed] = tables_in(source).tables
    [record] = written([changed], tmp_path / "out").records
    assert storage.read_bytes(record.uri) == MKV
    assert record.uri not in {r.uri for r in first.records}


def test_a_folder_of_hugging_face_datasets(tmp_path: Path) -> None:
    names = ["ape", "bat"]
    train_videos = [{"bytes": VIDEO, "path": "/etc/passwd"}, {"bytes": MKV}, {"bytes": VIDEO}]
    test_videos = [{"bytes": MKV, "path": "../b.mp4"}, {"bytes": None, "path": "/etc/passwd"}]
    train = hugging_face(table_of(train_videos, label=[1, 0, -1]), names)
    test = hugging_face(table_of(test_videos, label=[1, 0]), names)
    write_arrow(train, tmp_path / "saved" / "train" / "data-00000-of-00001.arrow")
    write_arrow(test, tmp_path / "saved" / "test" / "data-00000-of-00001.arrow")
    write_arrow(test, tmp_path / "saved" / "test" / "cache-0123.arrow")
    for name in ("dataset_dict.json", "train/state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    found = tables_in(tmp_path / "saved")
    assert found.ignored == {".json": 2, ".arrow": 1}
    result = written(found.tables, tmp_path / "out")
    expected = [(VIDEO, "bat", "train", ()), (MKV, "ape", "train", ()), (VIDEO, "video", "train", ())]
    assert sorted(map(str, rows_of(result.records))) == sorted(map(str, [*expected, (MKV, "bat", "test", ())]))
    assert [line.partition(", such as")[0] for line in result.omitted] == [
        "1 rows of tables have a path instead of bytes; paths are taken from lists only"
    ]
    write_parquet(train, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    write_parquet(test, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    hub = written(tables_in(tmp_path / "hub").tables, tmp_path / "out")
    assert sorted(map(str, rows_of(hub.records))) == sorted(map(str, rows_of(result.records)))


def test_lists_and_tables_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(VIDEO)
    both = pa.table({"uri": ["a.mp4"], "thumbnail": [b"x"]})
    source = write_parquet(both, tmp_path / "l.parquet")
    assert [r.uri for r in tables_in(source).records] == [f"{tmp_path}/a.mp4"]
    assert [t.video_column for t in tables_in(source, video_column="thumbnail").tables] == ["thumbnail"]
    assert tables_in(tmp_path).tables == []  # tables beside videos are not taken
    assert find_tables(str(tmp_path), "/nowhere") == find_tables(source, "/nowhere") == []
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match=r"l\.parquet has no column with bytes of videos\. For a table of URIs"):
        tables_in(tmp_path)
    other = write_parquet(pa.table({"video": [b"x"], "thumbnail": [b"x"], "n": [1]}), tmp_path / "o" / "l.parquet")
    with pytest.raises(DataError, match=r"several columns with bytes \(video, thumbnail\): set video_column"):
        tables_in(other)
    with pytest.raises(DataError, match=r"the column 'n' holds int64: set video_column to .* \(video, thumbnail\)"):
        tables_in(other, video_column="n")
    with pytest.raises(DataError, match="the column 'm' is not there"):
        tables_in(other, video_column="m")
    with pytest.raises(DataError, match="give their splits in a column 'split'"):
        discover(f"{tmp_path}/o", "/nowhere", "folders", 0.5, ("a", "b"), video_column="video")
    with pytest.raises(DataError, match=r"gone\.arrow cannot be read \(there is no such file\)"):
        tables_in(tmp_path / "gone.arrow")
    uris = write_arrow(pa.table({"uri": ["a.mp4"]}), tmp_path / "u.arrow")
    with pytest.raises(DataError, match=r"u\.arrow has no column with bytes of videos, .*: set video_column, or write"):
        tables_in(uris)


def test_errors_of_buckets_are_no_damage_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(table_of([VIDEO], pa.binary()), tmp_path / "t.parquet")
    [table] = tables_in(source).tables
    for text, remedy in (
        ("google::cloud::Status(PERMISSION_DENIED: no) error_info={x}", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("AWS Error ACCESS_DENIED during GetObject operation", "AWS_ENDPOINT_URL"),
    ):

        def fail(uri: str, text: str = text) -> None:
            raise OSError(text)

        monkeypatch.setattr("ardiff.data.video_tables._open_parquet", fail)
        with pytest.raises(StorageError, match=rf"Cannot read {source}: .*{remedy}") as info:
            write_group(table, 0, str(tmp_path / "out"))
        assert not info.value.transient
        assert "error_info" not in str(info.value)


def test_damaged_tables_are_rows_of_the_error_log(tmp_path: Path) -> None:
    table = table_of([os.urandom(3000) for _ in range(6)], pa.binary())
    good = write_parquet(table, tmp_path / "p" / "a.parquet")
    data = Path(good).read_bytes()
    (tmp_path / "p" / "b.parquet").write_bytes(data[:-100])
    group = pq.ParquetFile(good).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    (tmp_path / "p" / "c.parquet").write_bytes(data[:start] + b"\xff" * 60 + data[start + 60 :])
    found = tables_in(tmp_path / "p")
    assert [(r.uri.rpartition("/")[2], r.status, r.error) for r in found.records] == [("b.parquet", "error", "corrupt")]
    result = written(found.tables, tmp_path / "out")
    bad = [(r.uri.rpartition("/")[2], r.error, r.class_name) for r in result.records if r.status]
    assert bad == [("c.parquet", "corrupt", "")]
    assert len(rows_of(result.records)) == 6 + 4
    assert len(list((tmp_path / "out" / "videos").rglob("*.json"))) == 3 + 2  # a damaged group is read again

    arrow = write_arrow(table, tmp_path / "x" / "a.arrow")
    whole = Path(arrow).read_bytes()
    Path(arrow).write_bytes(whole[: len(whole) // 2])
    records = written(tables_in(arrow).tables, tmp_path / "out").records
    assert [r.error for r in records if r.status] == ["corrupt"]
    assert len(records) == 3
    for cut in (10, 0):
        Path(arrow).write_bytes(whole[:cut])
        with pytest.raises(DataError, match="it cannot be read as a table"):
            tables_in(arrow)


def test_offsets_of_arrow_files_are_checked(tmp_path: Path) -> None:
    """Arrow trusts the offsets in a file; a wrong one would read foreign memory."""
    source = write_arrow(table_of([b"a" * 64, b"b" * 64], pa.binary()), tmp_path / "a.arrow")
    data = Path(source).read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 64, 128))
    assert data.count(offsets) == 1
    Path(source).write_bytes(data.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little")))
    [record] = written(tables_in(source).tables, tmp_path / "out").records
    assert record.error == "corrupt"


def test_large_row_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(table_of([VIDEO, VIDEO], pa.binary()), tmp_path / "t.parquet")
    monkeypatch.setattr("ardiff.data.video_tables.MAX_GROUP_BYTES", len(VIDEO))
    with pytest.raises(DataError, match=r"a row group with \d+ bytes of videos, more than \d+: write it again"):
        tables_in(source)


def test_a_plan_names_the_size(tmp_path: Path) -> None:
    source = write_parquet(table_of([os.urandom(1 << 20)] * 3, pa.binary()), tmp_path / "d" / "t.parquet", rows=3)
    assert len(find_tables(str(tmp_path / "d"), str(tmp_path / "d"))) == 1
    for uri in (source, str(tmp_path / "d")):
        plan = describe_tables(find_tables(uri, f"{tmp_path}/out"), f"{tmp_path}/out")
        assert plan.startswith("the videos of 1 tables (3 rows, ")
        assert plan.endswith(f"to {tmp_path}/out/videos, unless they are there")
        assert 0.9 < float(plan.partition(" MiB")[0].rpartition(" ")[2]) < 3.1


def test_tables_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    local = write_parquet(table_of([VIDEO, MKV], pa.binary()), tmp_path / "a.parquet")
    storage.write_bytes(f"{s3_bucket}/t/a.parquet", Path(local).read_bytes())
    arrow = write_arrow(table_of([{"bytes": VIDEO}, {"bytes": MKV}]), tmp_path / "a.arrow")
    storage.write_bytes(f"{s3_bucket}/u/a.arrow", Path(arrow).read_bytes())
    for source in (f"{s3_bucket}/t", f"{s3_bucket}/u"):
        groups = [(t, [write_group(t, 0, f"{s3_bucket}/out")]) for t in tables_in(source).tables]
        records = records_of_tables(groups, f"{s3_bucket}/out", 0.5).records
        assert [storage.read_bytes(r.uri) for r in records] == [VIDEO, MKV]
        assert all(r.uri.startswith(f"{s3_bucket}/out/videos/a-") for r in records)
