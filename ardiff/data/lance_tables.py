"""Lance tables: folders such as ``clips.lance``, read by Lance's own library, which is an extra.

Rows are read by number, as the version of the table that was found first has them. Tables are untrusted: a video that
lies outside of its table, as Lance's blobs may, is never opened.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa

from ardiff.data import s3
from ardiff.data.retries import storage_error
from ardiff.data.storage import StoredFile
from ardiff.errors import ArdiffError, DecodeError

SUFFIX = ".lance"
ROWS_PER_GROUP = 256
"""Rows that a task reads."""
_BLOB_V2 = "lance.blob.v2"
_BLOB_V1 = b"lance-encoding:blob"
_VERSIONS = f"{SUFFIX}/_versions/"
"""Part of the names of the files that make a folder a table."""


def is_lance(uri: str) -> bool:
    """Whether the name is that of a Lance table."""
    return uri.lower().endswith(SUFFIX)


def with_tables(files: Iterable[StoredFile]) -> list[StoredFile]:
    """The files of a listing, with one entry for each Lance table instead of the table's own files."""
    listed = list(files)
    roots = {file.uri.partition(_VERSIONS)[0] + SUFFIX for file in listed if _VERSIONS in file.uri}
    if not roots:
        return listed
    others = [file for file in listed if not any(parent in roots for parent in _folders(file.uri))]
    return sorted([*others, *(StoredFile(root, 0, "") for root in roots)], key=lambda file: file.uri)


def _folders(uri: str) -> list[str]:
    return [uri[: match.start()] for match in re.finditer("/", uri) if is_lance(uri[: match.start()])]


def find(uri: str) -> StoredFile:
    """The table as a file: the size of its files, and its version as the etag.

    Raises:
        ArdiffError: The library is not installed.
        DecodeError: There is no table, or it is damaged.
        StorageError: Storage is unavailable.
    """
    dataset = _open(uri, None)
    latest = dataset.versions()[-1]
    size = int(latest["metadata"].get("total_files_size", 0))
    return StoredFile(uri, size, f"{dataset.version}-{int(latest['timestamp'].timestamp() * 1e6):x}")


def schema_of(file: StoredFile) -> pa.Schema:
    """The columns; those of blobs are binary. Raises as :func:`find`."""
    schema: pa.Schema = _dataset(file).schema
    for index, field in enumerate(schema):
        if _is_blob(field):
            schema = schema.set(index, pa.field(field.name, pa.large_binary()))
    return schema


def count_rows(file: StoredFile) -> int:
    """Rows of the table. Raises as :func:`find`."""
    return int(_dataset(file).count_rows())


def read_rows(file: StoredFile, group: int, columns: Sequence[str], video_column: str) -> Iterator[dict[str, Any]]:
    """The rows of a group of :data:`ROWS_PER_GROUP`, with one video in memory at a time.

    A video outside of the table is ``{"bytes": None, "path": ...}``. Raises as :func:`find`.
    """
    dataset = _dataset(file)
    numbers = range(group * ROWS_PER_GROUP, min((group + 1) * ROWS_PER_GROUP, count_rows(file)))
    is_blob = _is_blob(dataset.schema.field(video_column))
    small = [name for name in columns if is_blob or name != video_column]  # of blobs, only where they lie
    with _errors(file.uri):
        rows = dataset.take(list(numbers), columns=small).to_pylist() if small else [{} for _ in numbers]
        for number, row in zip(numbers, rows, strict=True):
            if is_blob:
                video = _blob(dataset, video_column, number, row[video_column])
            else:
                video = dataset.take([number], columns=[video_column])[video_column][0].as_py()
            yield {**row, video_column: video}


def read_columns(uri: str, names: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Those of the columns ``names`` that the table has, and the names of all its columns. Raises as :func:`find`."""
    with _errors(uri):
        dataset = _open(uri, None)
        columns = list(dataset.schema.names)
        return dataset.to_table(columns=[name for name in names if name in columns]), columns


def _blob(dataset: Any, column: str, number: int, place: dict[str, Any] | None) -> bytes | dict[str, Any] | None:
    """The content of a blob. ``place`` is where Lance says that it lies."""
    if place is None:
        return None
    if place.get("blob_uri"):
        return {"bytes": None, "path": place["blob_uri"]}
    if not place["size"]:
        return None
    [blob] = dataset.take_blobs(column, indices=[number])
    with blob:
        content: bytes = blob.readall()
    return content


def _is_blob(field: pa.Field) -> bool:
    return getattr(field.type, "extension_name", "") == _BLOB_V2 or _BLOB_V1 in (field.metadata or {})


def _dataset(file: StoredFile) -> Any:
    return _open(file.uri, int(file.etag.partition("-")[0]))


def _open(uri: str, version: int | None) -> Any:
    with _errors(uri):
        options = tuple(sorted(_storage_options(uri).items()))
        return _load(uri, None, options) if version is None else _version(uri, version, options)


def _load(uri: str, version: int | None, options: tuple[tuple[str, str], ...]) -> Any:
    """A version of a table; None is the newest one."""
    try:
        import lance
    except ModuleNotFoundError as error:
        raise ArdiffError(
            f"Lance tables need the package {error.name}, which is not installed: pip install 'ardiff[lance]'."
        ) from error
    # Processes that begin as forks of this one, such as those of Ray, run another program and never use Lance.
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    return lance.dataset(uri, version=version, storage_options=dict(options))


@lru_cache(maxsize=4)
def _version(uri: str, version: int, options: tuple[tuple[str, str], ...]) -> Any:
    """A version of a table never changes, so a process opens it once."""
    return _load(uri, version, options)


def _storage_options(uri: str) -> dict[str, str]:
    """How Lance's own client of S3 reaches a bucket. Its clients of other storage read their variables themselves."""
    config = s3.current()
    options = {"client_retry_timeout": str(max(int(config.retry_seconds), 1))} if "://" in uri else {}
    if uri.startswith("s3://"):
        region = s3.region(uri.removeprefix("s3://").partition("/")[0])
        options |= {"aws_region": region, "aws_skip_signature": str(config.anonymous).lower()}
        if endpoint := s3.endpoint():
            options |= {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
            options["aws_virtual_hosted_style_request"] = str(not config.path_style).lower()
    return options


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turns what Lance raises into errors of this project, in one line and without places in Lance's sources."""
    try:
        yield
    except ArdiffError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        text = re.sub(r",? /\S+\.rs:\d+:\d+", "", str(error).splitlines()[0])
        if re.search("Generic (S3|GCS|MicrosoftAzure) error", text):
            raise storage_error(f"Cannot read {uri}", OSError(text)) from error
        raise DecodeError(f"it cannot be read as a table ({text:.200})", "corrupt") from error
