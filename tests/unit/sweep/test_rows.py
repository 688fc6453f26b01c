import json
from dataclasses import replace
from pathlib import Path

import pytest

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.sweep.rows import (
    Record,
    VideoRow,
    find_complete,
    read_complete,
    read_record,
    read_rows,
    video_record,
    write_record,
    write_rows,
)


def make_row(folder: str, number: int = 0, latents: bool = False, **changes: object) -> VideoRow:
    row = VideoRow(
        id=f"id{number}",
        cell="cell",
        checkpoint="/model",
        weights="f00d",
        num_frames=8,
        ar_step=2,
        num_inference_steps=4,
        guidance_scale=1.0,
        mode="window",
        precision="fp32",
        label=1,
        class_name="ring",
        seed=number,
        fps=8.0,
        codec="h264",
        crf=8,
        uri=f"{folder}/videos/{number}.mp4",
        latents=f"{folder}/latents/{number}.safetensors" if latents else "",
        record=f"{folder}/records/{number}.json",
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def store(row: VideoRow, data: bytes = b"video") -> Record:
    """A row as if it had been made."""
    record = Record(
        id=row.id, status="ok", size=len(data), latents_size=3 if row.latents else 0, statistics={"a": [1.5]}
    )
    storage.write_bytes(row.uri, data)
    if row.latents:
        storage.write_bytes(row.latents, b"xyz")
    write_record(row, record)
    return record


def test_a_record_comes_back(tmp_path: Path) -> None:
    row = make_row(str(tmp_path))
    assert read_record(row) is None
    record = store(row)
    assert read_record(row) == record
    assert json.loads(Path(row.record).read_text())["row"]["seed"] == 0


@pytest.mark.parametrize("latents", [False, True])
def test_complete_is_what_record_and_files_agree_on(tmp_path: Path, latents: bool) -> None:
    folder = str(tmp_path)
    assert find_complete([make_row(folder)], f"{folder}/not-there") == {}
    rows = [make_row(folder, number, latents) for number in range(7)]
    records = [store(row) for row in rows]
    assert find_complete(rows, folder) == {row.id: record for row, record in zip(rows, records, strict=True)}
    Path(rows[1].uri).unlink()  # gone
    Path(rows[2].uri).write_bytes(b"vid")  # cut off
    Path(rows[3].record).write_text('{"record": {"id"')  # half a record
    write_record(rows[4], replace(records[4], status="failed"))
    write_record(rows[5], replace(records[5], id="another"))
    if latents:
        Path(rows[6].latents).write_bytes(b"")
    left = {"id0"} if latents else {"id0", "id6"}
    assert find_complete(rows, folder).keys() == left
    assert {row.id for row in rows if read_complete(row) is not None} == left


def test_a_row_with_latents_is_not_complete_without_them(tmp_path: Path) -> None:
    store(make_row(str(tmp_path)))
    assert find_complete([make_row(str(tmp_path), latents=True)], str(tmp_path)) == {}


def test_the_manifest_has_a_line_for_every_row(tmp_path: Path) -> None:
    rows = [make_row(str(tmp_path), number) for number in range(3)]
    records = {row.id: store(row) for row in rows[:2]}
    records["id1"] = Record(id="id1", status="failed", error="ValueError", message="no such class", attempts=2)
    write_rows(str(tmp_path / "m.parquet"), rows, records)
    lines = read_rows(str(tmp_path / "m.parquet"))
    assert [(line["id"], line["status"], line["error"]) for line in lines] == [
        ("id0", "ok", ""),
        ("id1", "failed", "ValueError"),
        ("id2", "missing", ""),
    ]
    assert lines[0]["statistics"] == {"a": [1.5]}
    assert (lines[1]["message"], lines[1]["attempts"], lines[1]["uri"]) == ("no such class", 2, rows[1].uri)


def test_other_files_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"no table")
    for place in ("m.parquet", "missing.parquet"):
        with pytest.raises(DataError, match="ardiff sweep"):
            read_rows(str(tmp_path / place))


def test_a_row_is_a_video_of_an_evaluation(tmp_path: Path) -> None:
    row = make_row(str(tmp_path), label=-1, class_name="")
    record = video_record(row, store(row), 16)
    assert (record.uri, record.size, record.codec, record.height, record.num_frames) == (row.uri, 5, "h264", 16, 8)
    assert (record.label, record.class_name, record.split, record.status) == (0, "video", "test", "ok")
