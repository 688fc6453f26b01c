"""The manifest of a data set: a Parquet file with one row per video.

A video is a file or a folder of pictures. The URI of a folder ends with a slash.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.tables import to_parquet
from ardiff.errors import DataError

Split = Literal["train", "test"]
_SUFFIXES = "mp4 m4v mov 3gp avi mkv webm ts m2ts mts mpg mpeg wmv asf flv mxf"
VIDEO_SUFFIXES = tuple(f".{suffix}" for suffix in _SUFFIXES.split())


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """A row of the manifest: one video."""

    uri: str
    size: int
    """Bytes."""
    codec: str
    width: int
    height: int
    fps: float
    num_frames: int
    label: int
    """Class index."""
    class_name: str
    split: str
    """``train`` or ``test``."""
    status: str
    """``ok``, ``error`` or ``skipped``."""
    reason: str
    """Why the video cannot be used; empty if it can."""
    error: str = ""
    """The kind of error; empty if there is none."""
    attempts: int = 1
    """Number of times it was read."""
    etag: str = ""
    """Changes when the content changes; see :class:`ardiff.data.storage.StoredFile`."""
    rotation: int = 0
    """Degrees, counter-clockwise, by which decoded pictures are turned to stand upright."""
    pts_start: int = 0
    pts_step: float = 0.0
    """When frames are shown: :class:`ardiff.data.probe.Timing`."""
    pixel_aspect: float = 1.0
    """Width of a stored pixel divided by its height. Width and height are those with square pixels."""
    warnings: str = ""
    """What the pictures suffer from, separated by commas: ``interlaced``, ``hdr``."""
    captions: tuple[str, ...] = ()
    """What the video shows, in words; several captions are several descriptions of the whole video."""
    filters: str = ""
    """What is done to the pictures whenever they are read, separated by commas: ``deinterlace``, ``tone_map``."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of pictures, one per frame."""
        return self.uri.endswith("/")

    @property
    def version(self) -> str:
        """Changes when the pictures change that are read: the etag, and the filters if there are any."""
        return f"{self.etag} {self.filters}" if self.filters else self.etag

    def length_at(self, fps: float) -> int:
        """Number of frames at the rate ``fps``; all frames of the file if it is 0."""
        return int(lengths_at(np.array([self.num_frames]), np.array([self.fps]), fps)[0])


_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "tuple[str, ...]": pa.list_(pa.string()),
}
SCHEMA = pa.schema([pa.field(f.name, _TYPES[cast(str, f.type)]) for f in fields(VideoRecord)])


def lengths_at(num_frames: np.ndarray, rates: np.ndarray, fps: float) -> np.ndarray:
    """Numbers of frames at the rate ``fps``, for videos of ``num_frames`` frames at their ``rates``: int64 ``(n,)``.

    All frames if ``fps`` is 0 or a video has no rate.
    """
    if fps == 0:
        return num_frames.astype(np.int64)
    at_rate = ((num_frames - 1) / np.where(rates > 0, rates, 1.0) * fps + 1e-6).astype(np.int64) + 1
    return np.where(rates > 0, np.where(num_frames > 0, at_rate, 0), num_frames).astype(np.int64)


def manifest_table(records: Sequence[VideoRecord]) -> pa.Table:
    """The records as a table with ``SCHEMA``, in their order."""
    return pa.Table.from_pylist([asdict(r) for r in records], schema=SCHEMA)


def record_at(table: pa.Table, index: int) -> VideoRecord:
    """A row of a table of records, as a record."""
    values = [column[index].as_py() for column in table.columns]
    return record_of(dict(zip(table.column_names, values, strict=True)))


def record_of(row: Mapping[str, Any]) -> VideoRecord:
    """The record of a row of a table or of Ray Data, whose captions are null, a list or an array."""
    captions = row["captions"]
    return VideoRecord(**{**row, "captions": () if captions is None else tuple(map(str, captions))})


def write_manifest(uri: str, records: Sequence[VideoRecord]) -> None:
    """Writes the records as one Parquet file."""
    storage.write_bytes(uri, to_parquet(manifest_table(records)))


def read_manifest(uri: str) -> list[VideoRecord]:
    """Reads the records. Raises DataError if there is no manifest, it is damaged, or it has other columns."""
    if not storage.exists(uri):
        raise DataError(f"There is no manifest {uri}: run `ardiff prepare` first.")
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri} is not a manifest ({error}): run `ardiff prepare` again.") from error
    columns = ", ".join(f"{f.name} {f.type}" for f in table.schema)
    for name, value in (("captions", None), ("filters", "")):  # manifests before these columns
        if name not in table.column_names:
            table = table.append_column(
                SCHEMA.field(name), pa.array([value] * len(table), type=SCHEMA.field(name).type)
            )
    if not table.schema.equals(SCHEMA):
        raise DataError(
            f"{uri} is not a manifest of this version (its columns are {columns}): run `ardiff prepare` again."
        )
    return [record_of(row) for row in table.to_pylist()]


def usable(records: Sequence[VideoRecord], split: Split, min_frames: int, fps: float = 0.0) -> list[VideoRecord]:
    """The records of ``split`` that can be decoded and have at least ``min_frames`` frames, in their order.

    With ``fps``, frames are counted at that rate.

    Raises:
        DataError: No record is left; the message says why.
    """
    decodable = [r for r in records if r.status == "ok"]
    in_split = [r for r in decodable if r.split == split]
    long_enough = [r for r in in_split if r.length_at(fps) >= min_frames]
    if long_enough:
        return long_enough
    if not records:
        raise DataError("The manifest lists no video: check the source given to `ardiff prepare`.")
    if not decodable:
        raise DataError(f"None of the {len(records)} videos can be decoded. The first one: {records[0].reason}")
    if not in_split:
        raise DataError(f"None of the {len(decodable)} decodable videos is in the '{split}' split.")
    lengths = [r.length_at(fps) for r in in_split]
    raise DataError(
        f"All {len(in_split)} videos of the '{split}' split are shorter than the {min_frames} frames of a clip "
        f"(the shortest has {min(lengths)}, the longest {max(lengths)}): use shorter clips or a smaller stride."
    )


def content_of(records: Sequence[VideoRecord]) -> str:
    """Fingerprint of the videos, their filters, their order and their classes. Captions do not change it."""
    return fingerprint([[r.uri, r.size, r.version, r.num_frames, r.label] for r in records])


def class_names(records: Sequence[VideoRecord]) -> list[str]:
    """Class names by index. Videos of no split have no class, nor have tars and tables that cannot be read."""
    names = {r.label: r.class_name for r in records if r.status == "ok" or (r.status == "error" and r.class_name)}
    return [names[i] for i in sorted(names)]
