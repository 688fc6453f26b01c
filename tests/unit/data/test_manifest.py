from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ardiff.data.manifest import (
    SCHEMA,
    VideoRecord,
    class_names,
    content_of,
    manifest_table,
    read_manifest,
    record_at,
    usable,
    write_manifest,
)
from ardiff.errors import DataError

RECORD = VideoRecord("a/b.mp4", 1234, "h264", 64, 48, 29.97, 20, 1, "run", "train", "ok", "")


def test_round_trip(tmp_path: Path) -> None:
    place = str(tmp_path / "manifest.parquet")
    records = [RECORD, replace(RECORD, uri="é.mp4", status="error", reason="it is empty", split="test")]
    write_manifest(place, records)
    assert read_manifest(place) == records
    assert manifest_table(records).schema == SCHEMA


def test_captions_and_manifests_from_before_them(tmp_path: Path) -> None:
    place = str(tmp_path / "manifest.parquet")
    records = [replace(RECORD, captions=("a ring", "ein Ring é")), RECORD]
    write_manifest(place, records)
    assert read_manifest(place) == records
    assert [record_at(manifest_table(records), i) for i in range(2)] == records
    pq.write_table(manifest_table(records).drop_columns(["captions", "filters"]), place)
    assert read_manifest(place) == [RECORD, RECORD]
    binary = pa.field("captions", pa.list_(pa.binary()))
    pq.write_table(manifest_table([RECORD]).cast(SCHEMA.set(SCHEMA.names.index("captions"), binary)), place)
    with pytest.raises(DataError, match="captions list<"):
        read_manifest(place)


def test_captions_do_not_change_the_fingerprint_of_videos() -> None:
    assert content_of([RECORD]) == content_of([replace(RECORD, captions=("a ring",))]) == "194ec9a0f6cc1651"


def test_filters_and_manifests_from_before_them(tmp_path: Path) -> None:
    place = str(tmp_path / "manifest.parquet")
    filtered = replace(RECORD, captions=("a ring",), warnings="interlaced", filters="deinterlace")
    write_manifest(place, [filtered])
    assert read_manifest(place) == [filtered]
    pq.write_table(manifest_table([filtered]).drop_columns("filters"), place)
    assert read_manifest(place) == [replace(filtered, filters="")]


def test_filters_change_the_fingerprint_of_videos_that_have_them() -> None:
    """Videos without filters keep the fingerprint of versions before filters, so that training resumes."""
    kinds = [replace(RECORD, etag="e", filters=filters) for filters in ("", "deinterlace", "deinterlace, tone_map")]
    assert len({content_of([record]) for record in kinds}) == 3
    assert kinds[0].version == "e"


def test_empty_manifest_keeps_its_columns(tmp_path: Path) -> None:
    place = str(tmp_path / "manifest.parquet")
    write_manifest(place, [])
    assert read_manifest(place) == []


def test_missing_damaged_and_foreign_manifests(tmp_path: Path) -> None:
    place = tmp_path / "manifest.parquet"
    with pytest.raises(DataError, match="There is no manifest"):
        read_manifest(str(place))
    place.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="is not a manifest"):
        read_manifest(str(place))
    write_manifest(str(place), [RECORD] * 50)
    place.write_bytes(b"PAR1" + bytes(40) + place.read_bytes()[-200:])
    with pytest.raises(DataError, match="is not a manifest"):
        read_manifest(str(place))
    pq.write_table(pa.table({"uri": ["a"], "frames": [3]}), place)
    with pytest.raises(DataError, match="uri string, frames int64"):
        read_manifest(str(place))
    pq.write_table(manifest_table([RECORD]).cast(SCHEMA.set(1, pa.field("size", pa.float64()))), place)
    with pytest.raises(DataError, match="size double"):
        read_manifest(str(place))


def test_usable_keeps_order_split_and_length() -> None:
    records = [replace(RECORD, uri=str(n), num_frames=n) for n in (30, 15, 16)]
    records += [replace(RECORD, split="test"), replace(RECORD, status="error")]
    assert [r.uri for r in usable(records, "train", 16)] == ["30", "16"]


def test_usable_says_why_none_is_left() -> None:
    bad = replace(RECORD, status="error", reason="it is empty")
    with pytest.raises(DataError, match="lists no video"):
        usable([], "train", 1)
    with pytest.raises(DataError, match=r"None of the 2 videos can be decoded\. The first one: it is empty"):
        usable([bad, bad], "train", 1)
    with pytest.raises(DataError, match="None of the 1 decodable videos is in the 'test' split"):
        usable([RECORD, bad], "test", 1)
    with pytest.raises(DataError, match=r"All 2 .* shorter than the 48 .*shortest has 7, the longest 20"):
        usable([RECORD, replace(RECORD, num_frames=7), bad], "train", 48)


def test_class_names() -> None:
    records = [replace(RECORD, label=i, class_name=n) for i, n in [(1, "run"), (0, "jump"), (1, "run")]]
    assert class_names(records) == ["jump", "run"]
    skipped = replace(RECORD, label=0, class_name="", status="skipped")
    assert class_names([*records, skipped]) == ["jump", "run"]
    assert class_names([replace(r, status="error") for r in records]) == ["jump", "run"]  # as their labels are kept
