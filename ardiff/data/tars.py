"""Lists the videos of tars, such as the shards of WebDataset, from the headers alone.

Members are not read, but for short texts: captions and classes. A tar is untrusted: its names become no paths, and
memory is bounded whatever its headers claim.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ardiff.data import storage
from ardiff.data.captions import COLUMNS, MAX_TEXT_BYTES, CaptionReader
from ardiff.data.discovery import suffix_of
from ardiff.data.manifest import VIDEO_SUFFIXES
from ardiff.data.members import TAR_SUFFIX, Member
from ardiff.data.omissions import Omissions
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError, DecodeError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Suffixes of tars whose members cannot be read in place."""
TEXT_SUFFIXES = (".txt", ".json", ".cls")
"""Suffixes of members with the captions or the class of the video of the same key."""
_HEADER_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 15
"""Bytes of a request: a header, and the short members and headers that follow."""
_BLOCK = tarfile.BLOCKSIZE


@dataclass(slots=True)
class TarListing:
    """What a tar holds."""

    tar: StoredFile
    videos: list[Member] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    """Contents of the members with captions and classes, by name."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that are no video and belong to none, by suffix."""
    omitted: Omissions = field(default_factory=Omissions)
    problem: DataError | None = None
    """Why the listing ends early. The members before are there."""


@dataclass(frozen=True, slots=True)
class TarVideo:
    """A video in a tar."""

    member: Member
    captions: tuple[str, ...]
    class_name: str
    """Empty if the tar does not name a class."""


def list_tar(tar: StoredFile) -> TarListing:
    """The videos and texts of a tar. Raises StorageError if it cannot be read."""
    listing = TarListing(tar)
    videos: dict[str, Member] = {}
    try:
        with _Headers(storage.RangeReader(tar.uri, tar.size), _BUFFER_BYTES) as headers:
            for info in _entries(headers, tar.size):
                if (name := _usable_name(info, tar, listing.omitted)) is None:
                    continue
                if name in videos:
                    listing.omitted.add("members of tars are followed by another one of the same name", _at(tar, name))
                if name.lower().endswith(VIDEO_SUFFIXES):
                    videos[name] = Member(tar.uri, info.offset_data, info.size, name)
                elif not name.lower().endswith(TEXT_SUFFIXES):
                    listing.ignored[suffix_of(name)] += 1
                elif info.size > MAX_TEXT_BYTES:
                    listing.omitted.add(f"texts in tars are larger than {MAX_TEXT_BYTES} bytes", _at(tar, name))
                else:
                    listing.texts[name] = headers.content(info.offset_data, info.size)
    except DecodeError as error:
        listing.problem = error
    listing.videos = list(videos.values())
    return listing


class _Headers(io.BufferedReader):
    """Reads the headers of a tar. What headers claim about the length of names is bounded."""

    left = _HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes. Raises tarfile.ReadError above the limit."""
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header has more than {_HEADER_BYTES} bytes")
        self.left -= size
        return super().read(size)

    def content(self, start: int, size: int) -> bytes:
        """The content of a short member."""
        self.seek(start)
        return super().read(size)


def _entries(headers: _Headers, size: int) -> Iterator[tarfile.TarInfo]:
    """The members in their order. Raises DecodeError where the tar is damaged or ends early."""
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            position = 0
            while (info := tar.next()) is not None:
                headers.left = _HEADER_BYTES
                tar.members.clear()  # type: ignore[attr-defined]  # else they grow with the tar
                if tar.offset <= position or info.size < 0:
                    raise tarfile.ReadError(f"the header at byte {position} has a wrong size")
                if info.offset_data + (info.size if info.isreg() else 0) > size:
                    raise DecodeError(f"it is cut off in the member {_printable(info.name):.200}", "truncated")
                position = tar.offset
                yield info
            end = headers.content(tar.offset, _BLOCK)
    except (tarfile.TarError, ValueError, OverflowError, KeyError, RecursionError) as error:
        raise _damage(headers, size, str(error)) from error
    if len(end) < _BLOCK:  # archives end with blocks of zeros
        raise DecodeError("it is cut off: it lacks the end of an archive, and perhaps members", "truncated")
    if end.strip(b"\0"):
        raise DecodeError(f"it is damaged: there is no header at byte {tar.offset} of {size}", "corrupt")


def _damage(headers: _Headers, size: int, reason: str) -> DecodeError:
    if size == 0:
        return DecodeError("it is empty", "empty")
    if headers.content(0, 2) == b"\x1f\x8b":
        return DecodeError("it is compressed with gzip, so its members cannot be read in place: gunzip it")
    if "unexpected end" in reason or "truncated" in reason:
        return DecodeError(f"it is cut off ({reason})", "truncated")
    return DecodeError(f"it is no tar, or damaged ({reason})", "corrupt")


def _usable_name(info: tarfile.TarInfo, tar: StoredFile, omitted: Omissions) -> str | None:
    """The member's name; None for folders, hidden files, and members that are counted as omitted."""
    name = info.name
    while name.startswith("./"):
        name = name.removeprefix("./")
    parts = name.split("/")
    if info.isdir() or any(part.startswith(".") and part != ".." for part in parts):
        return None
    if info.issparse() or not info.isreg():
        omitted.add("members of tars are links, devices or sparse files", _at(tar, name))
    elif name.startswith("/") or ".." in parts or "\\" in name:
        omitted.add("members of tars have names that lead out of it", _at(tar, name))
    elif _printable(name) != name:
        omitted.add("members of tars have names with control characters or bytes that are not UTF-8", _at(tar, name))
    else:
        return name
    return None


def _printable(name: str) -> str:
    """The name on one line, without escape sequences of terminals."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _at(tar: StoredFile, name: str) -> str:
    return f"{_printable(name):.200} in {tar.uri}"


def tar_videos(listing: TarListing, reader: CaptionReader) -> list[TarVideo]:
    """The videos of a tar with their captions and classes.

    A text belongs to a video if it has the same name but for the suffix, or the same key, which is the name up to the
    first dot, as in WebDataset. ``.txt`` has a caption on each line, ``.json`` has captions and ``class_name`` as a row
    of a list has, ``.cls`` has the class.

    Raises:
        DataError: A caption is no text.
    """
    used: set[str] = set()
    videos = []
    for member in listing.videos:
        folder, slash, base = member.name.rpartition("/")
        stems = dict.fromkeys([f"{folder}{slash}{base.rpartition('.')[0]}", f"{folder}{slash}{base.partition('.')[0]}"])
        texts = {stem + suffix: suffix for stem in stems for suffix in TEXT_SUFFIXES}
        captions: list[str] = []
        class_name = ""
        for name, suffix in texts.items():
            if name not in listing.texts:
                continue
            used.add(name)
            text = _decode(listing, name, reader)
            if suffix == ".txt":
                captions += reader.clean(text.splitlines(), member.name, listing.tar.uri)
            elif suffix == ".cls":
                class_name = text.strip() or class_name
            else:
                fields = _read_json(listing, name, text, reader)
                column = reader.column or next((column for column in COLUMNS if column in fields), "")
                captions += reader.clean(fields.get(column), member.name, listing.tar.uri)
                class_name = class_name or str(fields.get("class_name") or "")
        videos.append(TarVideo(member, reader.limited(captions, member.name), class_name))
    listing.ignored.update(suffix_of(name) for name in listing.texts.keys() - used)
    return videos


def _decode(listing: TarListing, name: str, reader: CaptionReader) -> str:
    try:
        return listing.texts[name].decode("utf-8-sig")
    except UnicodeDecodeError:
        reader.omitted.add("texts in tars are not UTF-8", _at(listing.tar, name))
        return ""


def _read_json(listing: TarListing, name: str, text: str, reader: CaptionReader) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        reader.omitted.add("texts in tars are not JSON objects", _at(listing.tar, name))
        return {}
    return fields


def is_tar(uri: str) -> bool:
    """Whether the name is that of a tar."""
    return uri.lower().endswith(TAR_SUFFIX)


def is_compressed_tar(uri: str) -> bool:
    """Whether the name is that of a tar whose members cannot be read in place."""
    return uri.lower().endswith(COMPRESSED_SUFFIXES)
