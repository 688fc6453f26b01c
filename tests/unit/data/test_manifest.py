from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ardiff.data.manifest import (
    SCHEMA,
    VideoRecord,
    class_and_split,
    class_names,
    manifest_table,
    read_manifest,
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


def test_classes_are_first_folders_in_order() -> None:
    found = class_and_split(["walk/1.mp4", "jump/1.mp4", "jump/deep/2.mp4"], 0.5)
    assert [(name, label) for name, label, _ in found] == [("walk", 1), ("jump", 0), ("jump", 0)]


def test_one_class_without_folders() -> None:
    assert [x[:2] for x in class_and_split(["1.mp4", "2.mp4"], 0.5)] == [("video", 0)] * 2
    assert class_and_split([], 0.5) == []


def test_split_folders_are_no_classes() -> None:
    paths = ["train/jump/1.mp4", "Test/walk/1.mp4", "val/jump/2.mp4"]
    assert class_and_split(paths, 0.0) == [("jump", 0, "train"), ("walk", 1, "test"), ("jump", 0, "test")]
    assert class_and_split(["train/1.mp4", "validation/2.mp4"], 0.0) == [("video", 0, "train"), ("video", 0, "test")]


@pytest.mark.parametrize(
    ("paths", "odd"),
    [
        (["train/run/1.mp4", "test/run/2.mp4", "extras/x.mp4"], "extras/x.mp4 lies beside folders for training"),
        (["run/1.mp4", "jump/2.mp4", "intro.mp4"], "intro.mp4 lies in no class folder, but run/1.mp4 does"),
        (["train/run/1.mp4", "train/x.mp4", "val/run/2.mp4"], "train/x.mp4 lies in no class folder, but train/run"),
    ],
)
def test_a_stray_file_is_named(paths: list[str], odd: str) -> None:
    with pytest.raises(DataError, match=odd):
        class_and_split(paths, 0.5)


def test_a_class_may_be_called_train() -> None:
    assert [x[0] for x in class_and_split(["train/1.mp4", "bus/1.mp4"], 0.5)] == ["train", "bus"]


def test_hashed_split_depends_on_the_path_alone() -> None:
    paths = [f"c/{i}.mp4" for i in range(2000)]
    splits = {path: split for path, (_, _, split) in zip(paths, class_and_split(paths, 0.1), strict=True)}
    assert 150 < sum(split == "test" for split in splits.values()) < 250
    some = paths[1000:10:-7]
    assert [x[2] for x in class_and_split(some, 0.1)] == [splits[path] for path in some]


def test_usable_keeps_order_split_and_length() -> None:
    records = [replace(RECORD, uri=str(n), num_frames=n) for n in (30, 15, 16)]
    records += [replace(RECORD, split="test"), replace(RECORD, status="error")]
    assert [r.uri for r in usable(records, "train", 16)] == ["30", "16"]


def test_usable_says_why_none_is_left() -> None:
    bad = replace(RECORD, status="error", reason="it is empty")
    with pytest.raises(DataError, match="lists no video"):
        usable([], "train", 1)
    with pytest.raises(DataError, match="None of the 2 videos can be decoded; the first says: it is empty"):
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
