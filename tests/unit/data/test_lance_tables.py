"""Lance tables: of the bytes of videos, as columns or blobs, and of URIs."""

import shutil
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from broken_videos import encode
from lance.blob import Blob, blob_array, blob_field

from ardiff.data import lance_tables, storage
from ardiff.data.lance_tables import with_tables
from ardiff.data.sources import Discovery, discover, records_of_tables
from ardiff.data.storage import StoredFile
from ardiff.data.video_tables import VideoTable, write_group
from ardiff.errors import DataError

VIDEOS = [encode(frames=3, crf=15 + i) for i in range(5)]
LEGACY_BLOB = {"lance-encoding:blob": "true"}


def write_lance(table: pa.Table, path: Path, **options: Any) -> str:
    lance.write_dataset(table, str(path), **options)
    return str(path)


def tables_in(source: object, **options: str) -> Discovery:
    return discover(str(source), "/nowhere", "folders", 0.3, **options)


def written(tables: list[VideoTable], output: Path) -> Discovery:
    groups = [(t, [write_group(t, i, str(output)) for i in range(t.num_groups)]) for t in tables]
    return records_of_tables(groups, str(output), 0.3)


def rows_of(found: Discovery) -> list[tuple[bytes, str, str, tuple[str, ...]]]:
    return [(storage.read_bytes(r.uri), r.class_name, r.split, r.captions) for r in found.records]


def columns() -> dict[str, list[Any]]:
    return {
        "class_name": ["cat", "dog", "cat", "dog", "cat"],
        "split": ["train", "train", "test", "train", "train"],
        "caption": [f"c{i}" for i in range(5)],
    }


@pytest.mark.parametrize("kind", ["binary", "blob of version 2.0", "blob of version 2.1", "blob"])
def test_a_table_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(lance_tables, "ROWS_PER_GROUP", 2)
    if kind == "binary":
        field, options = pa.field("video", pa.binary()), {}
    else:
        version = kind.removeprefix("blob of version ")
        field = pa.field("video", pa.large_binary(), metadata=LEGACY_BLOB)
        options = {"data_storage_version": version} if version != kind else {}
    video = pa.array([*VIDEOS[:3], None, VIDEOS[4]], field.type)
    table = pa.table(columns()).append_column(field, video)
    source = write_lance(table, tmp_path / "clips.lance", max_rows_per_file=3, **options)
    lance.dataset(source).delete("caption = 'c1'")  # Lance marks rows as deleted
    [opened] = tables_in(source).tables
    assert (opened.num_groups, opened.num_rows, opened.video_column) == (2, 4, "video")
    found = written([opened], tmp_path / "out")
    assert rows_of(found) == [
        (VIDEOS[0], "cat", "train", ("c0",)),
        (VIDEOS[2], "cat", "test", ("c2",)),
        (VIDEOS[4], "cat", "train", ("c4",)),
    ]
    assert found.omitted == [f"1 rows of tables have no video, such as row 0 of group 1 of {source}"]


def test_a_table_that_grows_while_it_is_read_is_read_as_it_was(tmp_path: Path) -> None:
    source = write_lance(pa.table({"video": VIDEOS[:2]}), tmp_path / "a.lance")
    [opened] = tables_in(source).tables
    write_lance(pa.table({"video": VIDEOS[2:3]}), tmp_path / "a.lance", mode="overwrite")
    assert [row[0] for row in rows_of(written([opened], tmp_path / "out"))] == VIDEOS[:2]
    [newer] = tables_in(source).tables
    assert newer.folder("out") != opened.folder("out")
    assert [row[0] for row in rows_of(written([newer], tmp_path / "out"))] == VIDEOS[2:3]


def test_blobs_outside_of_the_table_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(VIDEOS[0])
    blobs = blob_array([Blob.from_uri(f"file://{tmp_path}/secret"), VIDEOS[1]])
    table = pa.table({"video": blobs}, schema=pa.schema([blob_field("video")]))
    source = write_lance(table, tmp_path / "a.lance", allow_external_blob_outside_bases=True)
    found = written(tables_in(source).tables, tmp_path / "out")
    assert [row[0] for row in rows_of(found)] == [VIDEOS[1]]
    assert found.omitted[0].startswith("1 rows of tables have a path instead of bytes")


def test_a_folder_of_tables_names_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_lance(pa.table({"video": VIDEOS[:2]}), folder / "train.lance")
    write_lance(pa.table({"video": VIDEOS[2:3]}), folder / "test" / "part.lance")
    (folder / "README").write_text("")
    found = tables_in(folder)
    assert found.ignored == {"": 1}
    splits = {row[0]: row[2] for row in rows_of(written(found.tables, tmp_path / "out"))}
    assert splits == {VIDEOS[0]: "train", VIDEOS[1]: "train", VIDEOS[2]: "test"}
    lance_tables._version.cache_clear()  # a process that has opened a table knows where its columns lie
    damaged = next((folder / "test" / "part.lance" / "data").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:50])
    records = written(tables_in(folder).tables, tmp_path / "again").records
    assert [(r.uri, r.error) for r in records if r.status == "error"] == [(f"{folder}/test/part.lance", "corrupt")]
    assert len(records) == 3
    for manifest in (folder / "train.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"x")
    bad = tables_in(folder).records
    assert [(r.uri, r.error) for r in bad] == [(f"{folder}/train.lance", "corrupt")]
    assert ".rs:" not in bad[0].reason


def test_a_list_of_uris(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(VIDEOS[0])
    rows = {"uri": ["a.mp4"], "class_name": ["cat"], "split": ["test"], "caption": ["c"], "poster": [b"x"]}
    source = write_lance(pa.table(rows), tmp_path / "list.lance")
    [record] = tables_in(source).records
    assert (record.uri, record.class_name, record.split) == (f"{tmp_path}/a.mp4", "cat", "test")
    assert record.captions == ("c",)
    [table] = tables_in(source, video_column="poster").tables
    assert table.video_column == "poster"
    with pytest.raises(DataError, match=r"has no column 'u': set uri_column to one of its columns \(uri\)"):
        tables_in(write_lance(pa.table({"uri": ["x"]}), tmp_path / "b.lance"), uri_column="u")


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.lance cannot be read .*was not found"):
        tables_in(tmp_path / "gone.lance")
    shutil.copytree(write_lance(pa.table({"n": [1]}), tmp_path / "n.lance"), tmp_path / "d" / "n.lance")
    with pytest.raises(DataError, match="has no column 'uri'"):
        tables_in(tmp_path / "n.lance")
    with pytest.raises(DataError, match=r"n\.lance has no column with bytes of videos"):
        tables_in(tmp_path / "d")


def test_files_of_tables_are_one_entry_of_a_listing() -> None:
    names = ["a.lance/_versions/1", "a.lance/data/x.lance", "b/a.mp4", "c.lance/data/x.lance"]
    files = with_tables(StoredFile(name, 1, "e") for name in names)
    assert [file.uri for file in files] == ["a.lance", "b/a.mp4", "c.lance/data/x.lance"]


def test_tables_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    local = write_lance(pa.table({"video": VIDEOS[:2]}), tmp_path / "train.lance")
    storage.upload_folder(Path(local), f"{s3_bucket}/set/train.lance")
    for source in (f"{s3_bucket}/set", f"{s3_bucket}/set/train.lance"):
        [table] = tables_in(source).tables
        [first, second] = write_group(table, 0, f"{s3_bucket}/out").videos
        stored = [storage.read_bytes(f"{table.folder(f'{s3_bucket}/out')}/{video.name}") for video in (first, second)]
        assert stored == VIDEOS[:2]
    with pytest.raises(DataError, match=r"gone\.lance cannot be read"):
        tables_in(f"{s3_bucket}/gone.lance")
