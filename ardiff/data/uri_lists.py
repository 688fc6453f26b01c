"""Lists of videos: a text or CSV file, or a table, that names them by URI, and may have class, split and captions."""

from dataclasses import dataclass, replace
from typing import Any

from ardiff.data import storage
from ardiff.data.captions import COLUMNS, CaptionReader
from ardiff.data.layouts import SPLIT_FOLDERS
from ardiff.data.manifest import Split
from ardiff.data.omissions import Omissions
from ardiff.data.tables import read_columns
from ardiff.errors import DataError

LIST_SUFFIXES = (".txt", ".csv", ".parquet", ".lance")
_COLUMNS = ("class_name", "split")


@dataclass(frozen=True, slots=True)
class ListedVideo:
    """A line of a list."""

    uri: str
    class_name: str
    """Empty if the list has no classes."""
    split: Split | None
    """None if the list has no splits."""
    captions: tuple[str, ...] = ()


def is_list(uri: str) -> bool:
    """Whether ``uri`` names a list of videos, not a folder."""
    return uri.lower().endswith(LIST_SUFFIXES)


def read_list(uri: str, reader: CaptionReader, omitted: Omissions, column: str = "uri") -> list[ListedVideo]:
    """The videos of a list, in its order.

    A text file has a URI on each line. CSV files and tables have URIs in ``column``, and may have ``class_name`` and
    ``split``, as a manifest has, and captions. Local paths are relative to the folder of the list. If there are
    captions, several rows of a video are several captions; else rows after the first are omitted.

    Args:
        uri: The list.
        reader: Reads the captions.
        omitted: Counts rows that are not taken.
        column: Name of the column with URIs.

    Raises:
        DataError: The list cannot be read, lacks the column, is empty, or names a video with two classes or splits or
            a split that is neither for training nor for testing.
    """
    rows, caption_column = _read_rows(uri, reader, column)
    folder = storage.absolute(uri).rpartition("/")[0]
    videos: dict[str, ListedVideo] = {}
    for number, row in enumerate(rows, 1):
        name = str(row[column] or "").strip()
        if not name:
            omitted.add("rows of the list have no URI", f"row {number}")
            continue
        full = name if storage.is_remote(name) or name.startswith("/") else f"{folder}/{name}"
        split = str(row.get("split") or "").strip()
        if split and split.lower() not in SPLIT_FOLDERS:
            raise DataError(f"{uri}: the split '{split}' of {name} is none of {', '.join(SPLIT_FOLDERS)}.")
        captions = tuple(reader.clean(row[caption_column], name, uri)) if caption_column else ()
        video = ListedVideo(
            full,
            str(row.get("class_name") or ""),
            SPLIT_FOLDERS[split.lower()] if split else None,
            captions,
        )
        if (earlier := videos.get(full)) is not None:
            if (earlier.class_name, earlier.split) != (video.class_name, video.split):
                raise DataError(f"{uri} lists {name} twice with another class or split: keep one of the rows.")
            if not caption_column:
                omitted.add("rows of the list name a video of an earlier row", f"{name} in row {number}")
            video = replace(video, captions=earlier.captions + captions)
        videos[full] = video
    if not videos:
        raise DataError(f"{uri} lists no video.")
    return [replace(video, captions=reader.limited(video.captions, video.uri)) for video in videos.values()]


def _read_rows(uri: str, reader: CaptionReader, column: str) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a list, and its column of captions."""
    if uri.lower().endswith(".txt"):
        lines = storage.read_bytes(uri).decode("utf-8-sig", "replace").splitlines()
        return [{column: line} for line in lines if line.strip()], None
    captions = [reader.column] if reader.column else list(COLUMNS)
    table, names = read_columns(uri, [column, *_COLUMNS, *captions], "a list of videos")
    if column not in names:
        raise DataError(
            f"{uri} has no column '{column}': set uri_column to one of its columns ({', '.join(names) or 'none'})."
        )
    return table.to_pylist(), reader.column_of(uri, names)
