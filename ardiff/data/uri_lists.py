"""Lists of videos: a text, CSV or Parquet file that names them by URI, with or without class, split and captions."""

from dataclasses import dataclass, replace
from typing import Any

from ardiff.data import storage
from ardiff.data.captions import COLUMNS, CaptionReader
from ardiff.data.layouts import SPLIT_FOLDERS, hashed_split
from ardiff.data.manifest import Split
from ardiff.data.tables import read_columns
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
    captions: tuple[str, ...] = ()


def is_list(uri: str) -> bool:
    """Whether ``uri`` names a list of videos, not a folder."""
    return uri.lower().endswith(LIST_SUFFIXES)


def read_list(uri: str, test_fraction: float, reader: CaptionReader) -> list[ListedVideo]:
    """The videos of a list, in its order.

    A text file has a URI on each line. CSV and Parquet files have a column ``uri``, and may have ``class_name`` and
    ``split``, as a manifest has, and captions. Local paths are relative to the folder of the list. Without splits,
    ``test_fraction`` of the videos are test videos, chosen by a hash of their URIs. If there are captions, several rows
    of a video are several captions.

    Raises:
        DataError: The list cannot be read, lacks the column ``uri``, is empty, or names a video twice (or, with
            captions, with two classes or splits) or a split that is neither for training nor for testing.
    """
    rows, column = _read_rows(uri, reader)
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
        captions = tuple(reader.clean(row[column], name, uri)) if column else ()
        video = ListedVideo(
            full,
            str(row.get("class_name") or "video"),
            SPLIT_FOLDERS[split.lower()] if split else hashed_split(full, test_fraction),
            captions,
        )
        if (earlier := videos.get(full)) is not None:
            if not column or (earlier.class_name, earlier.split) != (video.class_name, video.split):
                raise DataError(f"{uri} lists {name} twice{' with another class or split' * bool(column)}.")
            video = replace(video, captions=earlier.captions + captions)
        videos[full] = video
    if not videos:
        raise DataError(f"{uri} lists no video.")
    return [replace(video, captions=reader.limited(video.captions, video.uri)) for video in videos.values()]


def _read_rows(uri: str, reader: CaptionReader) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a list, and its column of captions."""
    if uri.lower().endswith(".txt"):
        return [{"uri": line} for line in storage.read_bytes(uri).decode("utf-8", "replace").splitlines()], None
    captions = [reader.column] if reader.column else list(COLUMNS)
    table, names = read_columns(uri, [*_COLUMNS, *captions], "a list of videos")
    if "uri" not in names:
        raise DataError(f"{uri} has no column 'uri': its columns are {', '.join(names) or 'others'}.")
    return table.to_pylist(), reader.column_of(uri, names)
