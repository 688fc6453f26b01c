"""Tables whose rows hold the bytes of videos: Parquet, Arrow as Hugging Face datasets writes it, and Lance.

A decoder needs files, so the bytes of each row are written once as a file, row group by row group. Tables are
untrusted: paths in them are never opened, and files are named by row.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.config import fingerprint
from ardiff.data import lance_tables, storage
from ardiff.data.captions import METADATA, CaptionReader
from ardiff.data.layouts import SPLIT_FOLDERS, split_of_name
from ardiff.data.omissions import Omissions
from ardiff.data.retries import is_bucket_error, is_transient, storage_error
from ardiff.data.signatures import Signatures, recognize
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError, DecodeError, StorageError

TABLE_SUFFIXES = (".parquet", ".arrow", ".lance")
MAX_GROUP_BYTES = 2**31
"""Most bytes of videos in a row group, which is read whole."""
_CLASS_COLUMNS = ("class_name", "label")
_SIGNATURES: Signatures = (
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
    (0, b"FLV", ".flv"),
    (0, b"\x30\x26\xb2\x75", ".wmv"),
    (0, b"\x00\x00\x01\xba", ".mpg"),
    (0, b"\x47", ".ts"),
)


@dataclass(frozen=True, slots=True)
class VideoTable:
    """A table with a column of videos."""

    file: StoredFile
    video_column: str
    """Binary values, or structures with a binary field ``bytes``."""
    class_column: str
    """Empty if there is none."""
    class_names: tuple[str, ...]
    """Names of the classes that the class column numbers; empty if it names them."""
    caption_column: str
    split_column: str
    split: str
    """Word for the split of all its videos, from its folders or its name; empty if there is none."""
    num_groups: int
    """Row groups; an Arrow file counts as one and is read batch by batch, a Lance table as one for some rows."""
    num_rows: int
    """0 if it is not known before the table is read."""
    num_bytes: int
    """Bytes of the videos, or of an Arrow file or Lance table."""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        names = (self.video_column, self.class_column, self.caption_column, self.split_column)
        return list(dict.fromkeys(filter(None, names)))

    def folder(self, output: str) -> str:
        """The folder of its videos below ``output``. Another content of the table has another folder."""
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", self.file.uri.rpartition("/")[2].rpartition(".")[0])[:80]
        name = f"{stem}-{fingerprint(self.file.uri, self.file.size, self.file.etag, self.video_column)}"
        return storage.join(output, "videos", name)


@dataclass(frozen=True, slots=True)
class WrittenVideo:
    """A video of a table, written as a file."""

    name: str
    """The file's name in the table's folder."""
    class_name: str
    """Empty if the table has no class for it."""
    split: str
    """Word for the split, of its row or else of the table; empty if there is none."""
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WrittenGroup:
    """What a row group of a table holds."""

    videos: list[WrittenVideo]
    omitted: Omissions
    omitted_captions: Omissions
    problem: DecodeError | None = None
    """Why the rest of the group cannot be read."""

    def to_json(self) -> str:
        """Text from which :meth:`from_json` restores the group."""
        videos = [[video.name, video.class_name, video.split, video.captions] for video in self.videos]
        counts = [[omitted.counts, omitted.examples] for omitted in (self.omitted, self.omitted_captions)]
        problem = None if self.problem is None else [str(self.problem), self.problem.kind]
        return json.dumps({"videos": videos, "omitted": counts, "problem": problem})

    @staticmethod
    def from_json(text: str) -> "WrittenGroup":
        """The group of :meth:`to_json`."""
        fields = json.loads(text)
        videos = [WrittenVideo(name, cls, split, tuple(captions)) for name, cls, split, captions in fields["videos"]]
        rows, captions = (Omissions(Counter(counts), examples) for counts, examples in fields["omitted"])
        problem = None if fields["problem"] is None else DecodeError(*fields["problem"])
        return WrittenGroup(videos, rows, captions, problem)


def is_table(uri: str) -> bool:
    """Whether the name is that of a table that may hold videos: not of metadata or of a cache of ``datasets``."""
    name = uri.rpartition("/")[2].lower()
    return name.endswith(TABLE_SUFFIXES) and name not in METADATA and not name.startswith("cache-")


def open_table(
    file: StoredFile, root: str, uri_column: str = "uri", video_column: str = "", caption_column: str = ""
) -> VideoTable | None:
    """The table; None if it has no column with bytes, or one with URIs, and no video column is asked for.

    Args:
        file: A Parquet or Arrow file, or a Lance table.
        root: The folder below which the path of the table may name the split.
        uri_column: The column with URIs in a list of videos, which is no table of videos.
        video_column: The column with videos. Empty: the only one that can be.
        caption_column: See :class:`ardiff.data.captions.CaptionReader`.

    Raises:
        DecodeError: The file is no table or is damaged.
        DataError: The columns do not fit.
    """
    sizes: list[pq.RowGroupMetaData] = []
    try:
        if lance_tables.is_lance(file.uri):
            file = lance_tables.find(file.uri)
            schema, rows = lance_tables.schema_of(file), lance_tables.count_rows(file)
            groups = -(-rows // lance_tables.ROWS_PER_GROUP)
        elif file.uri.lower().endswith(".arrow"):
            with _open_stream(file.uri) as reader:
                schema, groups, rows = reader.schema, 1, 0
        else:
            with _open_parquet(file.uri) as parquet:
                schema, groups, rows = parquet.schema_arrow, parquet.num_row_groups, parquet.metadata.num_rows
                sizes = [parquet.metadata.row_group(i) for i in range(groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _table_error(file, error) from error
    if uri_column in schema.names and not video_column:
        return None
    features = _features(schema)
    column = _video_column(file.uri, schema, features, video_column)
    if column is None:
        return None
    group_bytes = [_column_bytes(group, column) for group in sizes]
    if max(group_bytes, default=0) > MAX_GROUP_BYTES:
        raise DataError(
            f"{file.uri} has a row group with {max(group_bytes)} bytes of videos, more than {MAX_GROUP_BYTES}: "
            "write it again with fewer rows per group."
        )
    class_column = next((name for name in _CLASS_COLUMNS if name in schema.names), "")
    folders = [part for part in file.uri[len(root) + 1 :].lower().split("/")[:-1] if part in SPLIT_FOLDERS]
    return VideoTable(
        file,
        column,
        class_column,
        tuple(map(str, features.get(class_column, {}).get("names") or ())),
        CaptionReader(caption_column).column_of(file.uri, schema.names) or "",
        "split" if "split" in schema.names else "",
        folders[0] if folders else split_of_name(file.uri.rpartition("/")[2]),
        groups,
        rows,
        sum(group_bytes) if sizes else file.size,
    )


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.open_filesystem(uri, retry=True)
    return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def _open_stream(uri: str) -> pa.RecordBatchStreamReader:
    filesystem, path = storage.open_filesystem(uri, retry=True)
    source = pa.memory_map(path) if not storage.is_remote(uri) else filesystem.open_input_stream(path)
    return pa.ipc.open_stream(source)


def _table_error(file: StoredFile, error: Exception) -> StorageError | DecodeError:
    if isinstance(error, OSError) and (is_transient(error) or is_bucket_error(error)):
        return storage_error(f"Cannot read {file.uri}", error)
    return DecodeError(f"it cannot be read as a table ({str(error).splitlines()[0]:.200})", "corrupt")


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The features that Hugging Face datasets notes in a table, by column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _video_column(uri: str, schema: pa.Schema, features: dict[str, dict[str, Any]], wanted: str) -> str | None:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted:
        if wanted not in candidates:
            kind = f"holds {schema.field(wanted).type}" if wanted in schema.names else "is not there"
            raise DataError(
                f"{uri}: the column '{wanted}' {kind}: set video_column to a column with bytes "
                f"({', '.join(candidates) or 'there is none'})."
            )
        return wanted
    marked = [name for name in candidates if features.get(name, {}).get("_type") == "Video"]
    names = marked or candidates
    if len(names) > 1:
        raise DataError(f"{uri} has several columns with bytes ({', '.join(names)}): set video_column to one of them.")
    return names[0] if names else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}."))


def write_group(table: VideoTable, group: int, output: str) -> WrittenGroup:
    """Writes the videos of a row group as files below ``output``, unless an earlier run has.

    Raises:
        StorageError: Storage is unavailable.
        DataError: A caption is no text.
    """
    folder = table.folder(output)
    index = storage.join(folder, f"{group:05d}-{fingerprint(table.columns, table.split)}.json")
    if storage.exists(index):
        return WrittenGroup.from_json(storage.read_bytes(index).decode())
    reader, omitted = CaptionReader(table.caption_column), Omissions()
    videos: list[WrittenVideo] = []
    problem: DecodeError | None = None
    try:
        for number, row in enumerate(_rows(table, group)):
            row_name = f"row {number} of group {group} of {table.file.uri}"
            split = str(row.get(table.split_column) or table.split).strip().lower()
            if split and split not in SPLIT_FOLDERS:
                omitted.add(f"rows of tables have a split that is none of {', '.join(SPLIT_FOLDERS)}", row_name)
                continue
            if (data := _content(row[table.video_column], row_name, omitted)) is None:
                continue
            name = f"{group:05d}-{number:07d}{_suffix(data)}"
            uri = storage.join(folder, name)
            if storage.find_file(uri).size != len(data):
                storage.write_bytes(uri, data)
            captions = reader.clean(row.get(table.caption_column), row_name, table.file.uri)
            class_name = _class_name(table, row.get(table.class_column))
            videos.append(WrittenVideo(name, class_name, split, reader.limited(captions, row_name)))
    except (pa.ArrowException, OSError, ValueError) as error:
        failure = _table_error(table.file, error)
        if isinstance(failure, StorageError):
            raise failure from error
        problem = failure
    except DecodeError as error:
        problem = error
    written = WrittenGroup(videos, omitted, reader.omitted, problem)
    if problem is None:
        storage.write_bytes(index, written.to_json().encode())
    return written


def _rows(table: VideoTable, group: int) -> Iterator[dict[str, Any]]:
    """The rows of a group, one in memory at a time beside what Arrow holds."""
    if lance_tables.is_lance(table.file.uri):
        yield from lance_tables.read_rows(table.file, group, table.columns, table.video_column)
    elif table.file.uri.lower().endswith(".arrow"):
        with _open_stream(table.file.uri) as reader:
            yield from _rows_of(reader, table)
    else:
        with _open_parquet(table.file.uri) as parquet:
            batches = parquet.iter_batches(batch_size=1, row_groups=[group], columns=table.columns)
            yield from _rows_of(batches, table)


def _rows_of(batches: Iterator[pa.RecordBatch], table: VideoTable) -> Iterator[dict[str, Any]]:
    for batch in batches:
        selected = batch.select(table.columns)
        selected.validate(full=True)  # what is in the file is not checked before
        for i in range(selected.num_rows):
            yield {name: selected.column(name)[i].as_py() for name in table.columns}


def _content(value: Any, row_name: str, omitted: Omissions) -> bytes | None:
    """The bytes of a video; None, with a count, if there are none."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            omitted.add("rows of tables have a path instead of bytes; paths are taken from lists only", row_name)
            return None
        value = value.get("bytes")
    if value is None:
        omitted.add("rows of tables have no video", row_name)
        return None
    return bytes(value)


def _class_name(table: VideoTable, value: Any) -> str:
    if value is None or isinstance(value, bytes | float | list | dict):
        return ""
    if table.class_names and isinstance(value, int):
        return table.class_names[value] if 0 <= value < len(table.class_names) else ""
    return str(value).strip()


def _suffix(data: bytes) -> str:
    """A suffix by the first bytes, for those who look into the folder; decoding does not need it."""
    return recognize(data, _SIGNATURES) or ".bin"


def describe_tables(tables: Sequence[VideoTable], output: str) -> str:
    """What is going to be written, in a sentence."""
    rows, size = sum(table.num_rows for table in tables), sum(table.num_bytes for table in tables)
    count = f"{rows} rows, " if all(table.num_rows for table in tables) else ""
    return (
        f"the videos of {len(tables)} tables ({count}{size / 2**20:.1f} MiB) are written once as files to "
        f"{storage.join(output, 'videos')}, unless they are there"
    )
