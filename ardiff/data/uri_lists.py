"""Lists of videos: a text, CSV or Parquet file that names them by URI, with or without class and split."""

import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.layouts import SPLIT_FOLDERS, hashed_split
from ardiff.data.manifest import Split
from ardiff.errors import DataError

LIST_SUFFIXES = (".txt", ".csv", ".parquet")
_COLUMNS = ("uri", "class_name", "split")


@dataclass(frozen=True, slots=True)
class ListedVideo:
    """A line of a list."""

    uri: str
    class_name: str
    """``video`` if the list has no classes."""
    split: Split


def is_list(uri: str) -> bool:
    """Whether ``uri`` names a list of videos, not a folder."""
    return uri.lower().endswith(LIST_SUFFIXES)


def read_list(uri: str, test_fraction: float) -> list[ListedVideo]:
    """The videos of a list, in its order.

    A text file has a URI on each line. CSV and Parquet files have a column ``uri``, and may have ``class_name`` and
    ``split``, as a manifest has. Local paths are relative to the folder of the list. Without splits,
    ``test_fraction`` of the videos are test videos, chosen by a hash of their URIs.

    Raises:
        DataError: The list cannot be read, lacks the column ``uri``, is empty, or names a video twice or a split that
            is neither for training nor for testing.
    """
    rows = _read_rows(uri)
    folder = storage.absolute(uri).rpartition("/")[0]
    videos: dict[str, ListedVideo] = {}
    for row in rows:
        name = str(row["uri"] or "").strip()
        if not name:
            continue
        full = name if storage.is_remote(name) or name.startswith("/") else f"{folder}/{name}"
        split = str(row.get("split") or "").strip()
        if split and split.lower() not in SPLIT_FOLDERS:
            raise DataError(f"{uri}: the split '{split}' of {name} is none of {', '.join(SPLIT_FOLDERS)}.")
        if full in videos:
            raise DataError(f"{uri} lists {name} twice.")
        videos[full] = ListedVideo(
            full,
            str(row.get("class_name") or "video"),
            SPLIT_FOLDERS[split.lower()] if split else hashed_split(full, test_fraction),
        )
    if not videos:
        raise DataError(f"{uri} lists no video.")
    return list(videos.values())


def _read_rows(uri: str) -> list[dict[str, Any]]:
    data = storage.read_bytes(uri)
    if uri.lower().endswith(".txt"):
        return [{"uri": line} for line in data.decode("utf-8", "replace").splitlines()]
    try:
        if uri.lower().endswith(".csv"):
            # Names such as 007 are text, not numbers.
            types = pacsv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string()))
            table = pacsv.read_csv(io.BytesIO(data), convert_options=types)
        else:
            file = pq.ParquetFile(io.BytesIO(data))
            table = file.read([name for name in _COLUMNS if name in file.schema_arrow.names])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri} cannot be read as a list of videos ({error}).") from error
    if "uri" not in table.column_names:
        raise DataError(f"{uri} has no column 'uri': its columns are {', '.join(table.column_names) or 'others'}.")
    rows: list[dict[str, Any]] = table.select([name for name in _COLUMNS if name in table.column_names]).to_pylist()
    return rows
