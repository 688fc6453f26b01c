"""The manifest of a sweep: one row per spec, with its sampling parameters and its record."""

import io
import json
import types
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.data.tables import to_parquet
from ardiff.errors import DataError
from ardiff.resolution import Resolution
from ardiff.sampling.params import SamplingParams
from ardiff.sweep.specs import Record, VideoSpec


def _arrow_type(hint: Any) -> pa.DataType:
    """The column type of a field; mappings and sequences are stored as JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        [inner] = [a for a in args if a is not type(None)]
        return _arrow_type(inner)
    if origin is Literal:
        return _arrow_type(type(args[0]))
    types_of_values = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return pa.string() if origin in (dict, tuple) else types_of_values[hint]


def _columns(cls: type[Any], *skipped: str) -> list[tuple[str, pa.DataType]]:
    hints = get_type_hints(cls)
    return [(f.name, _arrow_type(hints[f.name])) for f in fields(cls) if f.name not in skipped]


SCHEMA = pa.schema(
    [*_columns(VideoSpec, "sampling", "record"), *_columns(SamplingParams), *_columns(Record, "id")],
)
"""Columns of the manifest: the spec, its sampling parameters, and its record."""
JSON_COLUMNS = ("statistics", "conditions")


def write_manifest(uri: str, specs: Sequence[VideoSpec], records: dict[str, Record]) -> None:
    """Writes a row per spec, in their order. A spec without a record has the status ``missing``."""
    rows = []
    for spec in specs:
        record = asdict(records.get(spec.id, Record(id=spec.id, status="missing")))
        row = {**asdict(spec), **asdict(spec.sampling), **record}
        rows.append(row | {name: json.dumps(row[name]) for name in JSON_COLUMNS})
    storage.write_bytes(uri, to_parquet(pa.Table.from_pylist(rows, schema=SCHEMA)))


def read_manifest(uri: str) -> list[dict[str, Any]]:
    """The rows of a manifest, JSON as dicts and lists. Raises DataError if it is missing or not a sweep's manifest."""
    if not storage.exists(uri):
        raise DataError(f"There is no manifest {uri}: run `ardiff sweep` first.")
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri} is not a manifest ({error}): run `ardiff sweep` again.") from error
    if not table.schema.equals(SCHEMA):
        raise DataError(f"{uri} is not the manifest of a sweep of this version: run `ardiff sweep` again.")
    return [row | {name: json.loads(row[name]) for name in JSON_COLUMNS} for row in table.to_pylist()]


def video_record(spec: VideoSpec, record: Record, resolution: Resolution) -> VideoRecord:
    """A complete spec as a row of the manifest that `ardiff evaluate` reads."""
    shape = (spec.codec, resolution.width, resolution.height, spec.fps, spec.sampling.num_frames)
    label, captions = spec.sampling.class_label or 0, (spec.sampling.prompt,) if spec.sampling.prompt else ()
    name = spec.class_name or "video"
    return VideoRecord(spec.uri, record.file_size, *shape, label, name, "test", "ok", "", captions=captions)
