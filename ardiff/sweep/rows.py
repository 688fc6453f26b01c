"""A row is one video to make; a record says what came of it. A record is one small object, written after the video.

The frames depend on the row alone, so two jobs that make the same row write the same frames; a file and its record are
each written whole or not at all. Whatever is interrupted leaves rows without a record, which are made again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.encode import VideoCodec
from ardiff.data.manifest import VideoRecord
from ardiff.errors import DataError
from ardiff.sampling.params import SamplingMode

READERS = 16
"""Records that are read at the same time."""
SUFFIXES: dict[VideoCodec, str] = {"h264": "mp4", "vp9": "webm", "av1": "mp4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRow:
    """One video: what its frames depend on, how they are stored, and where."""

    id: str
    """Names everything that the frames depend on."""
    cell: str
    """Rows of a cell differ in class and seed only."""
    checkpoint: str
    """Folder of the pipeline."""
    weights: str
    """Fingerprint of its files."""
    num_frames: int
    ar_step: int
    num_inference_steps: int
    guidance_scale: float
    mode: SamplingMode
    precision: str
    label: int
    """Class index; -1 is none."""
    class_name: str
    seed: int
    fps: float
    codec: VideoCodec
    crf: int
    uri: str
    """The video's file."""
    latents: str
    """File of its latents; empty if they are not kept."""
    record: str
    """Where its record goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What came of a row."""

    id: str
    status: str
    """``ok`` or ``failed``."""
    size: int = 0
    """Bytes of the video's file."""
    file_sha256: str = ""
    frames_sha256: str = ""
    """Of the raw frames, uint8 ``(F, H, W, 3)``, before they were encoded."""
    latents_size: int = 0
    """Bytes of the file of latents; 0 without one."""
    seconds: float = 0.0
    """The video's share of the time that its pack took, from noise to the stored file."""
    cpu_seconds: float = 0.0
    """Its share of the processor time of that."""
    started: float = 0.0
    """When its pack was begun, in seconds since 1970, by the worker's clock."""
    finished: float = 0.0
    """When the video was stored."""
    frames_per_second: float = 0.0
    evaluations: int = 0
    """Evaluations of a frame by the model, both branches of guidance counted."""
    pack: int = 0
    """Videos that were made together."""
    worker: str = ""
    """Machine and process."""
    device: str = ""
    attempts: int = 0
    error: str = ""
    """Class of the error; empty if there is none."""
    message: str = ""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """Of each part of the video; see :func:`ardiff.sweep.statistics.video_statistics`."""


def write_record(row: VideoRow, record: Record) -> None:
    """Writes what came of a row. Raises StorageError."""
    storage.write_bytes(row.record, json.dumps({"row": asdict(row), "record": asdict(record)}, indent=1).encode())


def read_record(row: VideoRow) -> Record | None:
    """What came of a row; None if there is no record, or one that is damaged or of another row. Raises StorageError."""
    if not storage.exists(row.record):
        return None
    try:
        record = Record(**json.loads(storage.read_bytes(row.record))["record"])
    except (ValueError, KeyError, TypeError):
        return None
    return record if record.id == row.id else None


def read_complete(row: VideoRow) -> Record | None:
    """The row's record if it says that the video is made, and the file is there in its recorded size."""
    record = read_record(row)
    if record is None or record.status != "ok":
        return None
    kept = [(row.uri, record.size), *([(row.latents, record.latents_size)] if row.latents else [])]
    return record if all(storage.exists(uri) and storage.size(uri) == size for uri, size in kept) else None


def find_complete(rows: Sequence[VideoRow], folder: str) -> dict[str, Record]:
    """Records of the rows that need not be made, by id; looks at two listings and reads the records that they show.

    Args:
        rows: Rows whose files and records all lie below ``folder``.
        folder: The output folder; it need not exist.

    Raises:
        StorageError: Storage cannot be listed or read.
    """
    sizes = _sizes(folder)
    listed = [row for row in rows if row.record in sizes and row.uri in sizes]
    found: dict[str, Record] = {}
    for row, record in zip(listed, in_parallel(read_record, listed), strict=True):
        if record is None or record.status != "ok" or sizes[row.uri] != record.size:
            continue
        if row.latents and sizes.get(row.latents) != record.latents_size:
            continue
        found[row.id] = record
    return found


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``function`` of each item, in their order, by a few threads: what waits for storage."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


def _sizes(folder: str) -> dict[str, int]:
    if not storage.exists(folder):
        return {}
    return {file.uri: file.size for file in storage.list_objects(folder)}


def video_record(row: VideoRow, record: Record, resolution: int) -> VideoRecord:
    """A complete row as a line of the manifest that `ardiff evaluate` reads; ``resolution`` is height and width."""
    shape = (row.codec, resolution, resolution, row.fps, row.num_frames)
    return VideoRecord(row.uri, record.size, *shape, max(row.label, 0), row.class_name or "video", "test", "ok", "")


TYPES = {
    "str": pa.string(),
    "VideoCodec": pa.string(),
    "SamplingMode": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "dict[str, list[float]]": pa.string(),
}
RESULTS = [f for f in fields(Record) if f.name != "id"]
NAMES = [f for f in fields(VideoRow) if f.name != "record"]
SCHEMA = pa.schema([(f.name, TYPES[str(f.type)]) for f in (*NAMES, *RESULTS)])
"""Columns of the manifest: the row, then its record; statistics as JSON."""


def write_rows(uri: str, rows: Sequence[VideoRow], records: dict[str, Record]) -> None:
    """Writes the manifest, one line a row in their order; rows without a record have the status ``missing``."""
    lines = []
    for row in rows:
        record = asdict(records.get(row.id, Record(id=row.id, status="missing")))
        lines.append({**asdict(row), **record, "statistics": json.dumps(record["statistics"])})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_rows(uri: str) -> list[dict[str, Any]]:
    """The lines of a manifest, statistics as dicts. Raises DataError if it is not one."""
    if not storage.exists(uri):
        raise DataError(f"There is no manifest {uri}: run `ardiff sweep` first.")
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri} is not a manifest ({error}): run `ardiff sweep` again.") from error
    if not table.schema.equals(SCHEMA):
        raise DataError(f"{uri} is not a manifest of a sweep of this version: run `ardiff sweep` again.")
    return [{**line, "statistics": json.loads(line["statistics"])} for line in table.to_pylist()]
