"""Captions of videos, from text files beside them and from metadata files.

A text file ``a.txt`` beside ``a.mp4`` has a caption on each line. A file ``metadata.jsonl``, ``metadata.csv`` or
``metadata.parquet`` names videos below its folder in the column ``file_name`` and has captions in another one.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ardiff.data import storage
from ardiff.data.omissions import Omissions
from ardiff.data.storage import StoredFile
from ardiff.data.tables import read_columns
from ardiff.errors import DataError

MAX_CHARACTERS = 4096
"""Longest caption."""
MAX_CAPTIONS = 64
"""Most captions of a video."""
MAX_TEXT_BYTES = 2**20
"""Largest text file beside a video."""
MAX_METADATA_BYTES = 2**30
"""Largest metadata file."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS = ("text", "caption", "captions")
"""Columns with captions, unless another one is named."""
_READERS = 32


@dataclass(slots=True)
class CaptionReader:
    """Cleans captions, and counts what it leaves out."""

    column: str = ""
    """Column with captions; empty: the first of ``COLUMNS`` that there is."""
    omitted: Omissions = field(default_factory=Omissions)

    def column_of(self, uri: str, names: Sequence[str]) -> str | None:
        """The column with captions among ``names``. Raises DataError if the column that was named is not there."""
        if self.column and self.column not in names:
            raise DataError(
                f"{uri} has no column '{self.column}': set caption_column to one of its columns ({', '.join(names)})."
            )
        return self.column or next((name for name in COLUMNS if name in names), None)

    def clean(self, value: Any, video: str, uri: str) -> list[str]:
        """The captions in a value, without empty ones; every run of spaces and line breaks becomes one space.

        Args:
            value: Text, a list of texts, or None.
            video: The video's name, for messages.
            uri: The file that holds the value.

        Raises:
            DataError: The value is something else.
        """
        texts = value if isinstance(value, list) else [value]
        captions = []
        for text in (text for text in texts if text is not None):
            if not isinstance(text, str):
                raise DataError(
                    f"{uri}: a caption of {video} is {text!r:.80}, not text: name the right column with caption_column."
                )
            caption = " ".join(text.split())
            if len(caption) > MAX_CHARACTERS:
                self.omitted.add(f"captions are longer than {MAX_CHARACTERS} characters", video)
            elif not _is_unicode(caption):
                self.omitted.add("captions are not Unicode", video)
            elif caption:
                captions.append(caption)
        return captions

    def limited(self, captions: Sequence[str], video: str) -> tuple[str, ...]:
        """The captions of a video, each once, at most ``MAX_CAPTIONS``."""
        unique = tuple(dict.fromkeys(captions))
        for _ in unique[MAX_CAPTIONS:]:
            self.omitted.add(f"captions come after the first {MAX_CAPTIONS} of a video", video)
        return unique[:MAX_CAPTIONS]


def find_captions(
    files: Sequence[StoredFile], videos: Sequence[StoredFile], reader: CaptionReader
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """The captions of videos by URI, and the files that they come from.

    Args:
        files: All files below the source.
        videos: The videos among them.
        reader: Counts what is left out: captions that are too long, files that are not UTF-8, rows without a video.

    Raises:
        DataError: A metadata file cannot be read, or a video has captions in two files.
    """
    found: dict[str, list[str]] = {}
    origin: dict[str, str] = {}
    sources: set[str] = set()
    for uri, video, captions in [*_beside(files, videos, reader), *_metadata(files, videos, reader)]:
        sources.add(uri)
        if captions and origin.setdefault(video, uri) != uri:
            raise DataError(f"{video} has captions in {origin[video]} and in {uri}: keep those of one file.")
        found.setdefault(video, []).extend(captions)
    return {video: reader.limited(captions, video) for video, captions in found.items() if captions}, sources


Source = tuple[str, str, list[str]]
"""A file, a video, and captions of the video in the file."""


def _beside(files: Sequence[StoredFile], videos: Sequence[StoredFile], reader: CaptionReader) -> Iterator[Source]:
    """Captions from text files that are named like a video but for the suffix, a request for each."""
    named: dict[str, list[str]] = {}
    for video in videos:
        folder, _, name = video.uri.rstrip("/").rpartition("/")
        stem = name if video.uri.endswith("/") else name.rpartition(".")[0]
        named.setdefault(f"{folder}/{stem}", []).append(video.uri)
    texts = [file for file in files if file.uri.lower().endswith(".txt") and file.uri[:-4] in named]
    with ThreadPoolExecutor(_READERS) as pool:  # the threads wait for storage
        for file, data in zip(texts, pool.map(_read_text, texts), strict=True):
            for video_uri in named[file.uri[:-4]]:
                yield file.uri, video_uri, _lines(file, data, video_uri, reader)


def _read_text(file: StoredFile) -> bytes | None:
    return None if file.problem or file.size > MAX_TEXT_BYTES else storage.read_bytes(file.uri)


def _lines(file: StoredFile, data: bytes | None, video: str, reader: CaptionReader) -> list[str]:
    if data is None:
        reader.omitted.add(file.problem or f"text files beside videos are larger than {MAX_TEXT_BYTES} bytes", file.uri)
        return []
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        reader.omitted.add("text files beside videos are not UTF-8", file.uri)
        return []
    return reader.clean(lines, video, file.uri)


def _metadata(files: Sequence[StoredFile], videos: Sequence[StoredFile], reader: CaptionReader) -> Iterator[Source]:
    """Captions from metadata files. Several rows of a video are several captions."""
    uris = {video.uri.rstrip("/"): video.uri for video in videos}
    for file in files:
        folder, _, name = file.uri.rpartition("/")
        if name.lower() not in METADATA:
            continue
        if file.size > MAX_METADATA_BYTES:
            raise DataError(f"{file.uri} is larger than {MAX_METADATA_BYTES} bytes: split it by the folders of videos.")
        for named, value in _metadata_rows(file.uri, reader):
            if (video := uris.get(f"{folder}/{named.removeprefix('./').rstrip('/')}")) is None:
                reader.omitted.add("rows of metadata files name no video of the source", f"{named} in {file.uri}")
            else:
                yield file.uri, video, reader.clean(value, named, file.uri)


def _metadata_rows(uri: str, reader: CaptionReader) -> Iterator[tuple[str, Any]]:
    """Name and captions of each row; none, with a note, if the file has no column for one of them."""
    if uri.lower().endswith(".jsonl"):
        rows = _read_jsonl(uri)
        names = list(dict.fromkeys(name for row in rows for name in row))
    else:
        columns = [reader.column] if reader.column else list(COLUMNS)
        table, names = read_columns(uri, ["file_name", *columns], "a metadata file")
        rows = table.to_pylist()
    if "file_name" not in names or (column := reader.column_of(uri, names)) is None:
        missing = f"column {' or '.join(COLUMNS)}" if "file_name" in names else "column file_name"
        reader.omitted.add(f"metadata files have no {missing}", uri)
        return
    for row in rows:
        yield str(row.get("file_name") or ""), row.get(column)


def _read_jsonl(uri: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(storage.read_bytes(uri).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of UTF-8 as well
            raise DataError(f"Line {number} of {uri} is not JSON in UTF-8 ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f'Line {number} of {uri} is not a JSON object such as {{"file_name": ..., "text": ...}}.')
        rows.append(row)
    return rows


def _is_unicode(text: str) -> bool:
    """Whether the text has no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
