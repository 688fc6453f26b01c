"""HLS playlists (RFC 8216) of fragmented mp4, for players such as Safari that play them without a script.

A media segment is the frames from one key frame to the next. A playlist lists the complete segments; a player reads it
again and again until it ends.
"""

import asyncio
import itertools
import math
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO

from ardiff.data.signatures import ReadAt, boxes
from ardiff.serving.async_store import Stores
from ardiff.serving.errors import RequestError, video_unavailable
from ardiff.serving.fragments import KEY_FRAMES, as_fragments
from ardiff.serving.records import JobRecord
from ardiff.serving.videos import Videos

MAX_FILES = 16
"""Videos of which a replica keeps a copy for HLS players."""
WAIT_SECONDS, PAUSE_SECONDS = 30.0, 0.25
"""Seconds that a player waits for the first segment, and between two looks at the database."""
_NOT_SYNC = 0x10000
"""Sample flag of frames that are no key frames (ISO/IEC 14496-12, 8.8.3.1)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A media segment: its bytes in the stream, and its number of frames."""

    start: int
    stop: int
    num_frames: int


def split(read_at: ReadAt, size: int, ended: bool) -> tuple[int, list[Segment]]:
    """The bytes of the header, and the complete segments of a stream: the last one is complete when the stream ends."""
    starts, bounds, position, stop = list[int](), list[bool](), 0, 0
    for name, content, end in boxes(read_at, 0, size):
        if end > size:
            break
        if name == b"moof":
            starts.append(position)
            bounds.append(_is_key_frame(read_at(content, end - content)))
        position = stop = end
    keys = [i for i, is_key in enumerate(bounds) if is_key or i == 0]
    complete = list(itertools.pairwise([*keys, len(starts)]))[: None if ended else -1]
    offsets = [*starts, stop]
    return (starts or [0])[0], [Segment(offsets[first], offsets[last], last - first) for first, last in complete]


def playlist(segments: list[Segment], fps: float, ended: bool) -> str:
    """The media playlist. Its URIs are relative to ``/v1/videos/{id}/``."""
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        f"#EXT-X-TARGETDURATION:{math.ceil(KEY_FRAMES / fps)}",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        '#EXT-X-MAP:URI="hls/init.mp4"',
    ]
    for index, segment in enumerate(segments):
        lines += [f"#EXTINF:{segment.num_frames / fps:.5f},", f"hls/{index}.m4s"]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if ended else []), ""])


def _is_key_frame(moof: bytes) -> bool:
    """Whether the first frame of a movie fragment is a key frame, by ``trun`` or else the default of ``tfhd``."""
    track = _find(moof, b"traf")
    flags, values = _full_box(_find(track, b"trun"))
    skipped = 4 + (4 if flags & 0x1 else 0)  # number of samples, offset of the data
    if flags & 0x4:
        return not _integer(values, skipped) & _NOT_SYNC
    if flags & 0x400:
        return not _integer(values, skipped + (4 if flags & 0x100 else 0) + (4 if flags & 0x200 else 0)) & _NOT_SYNC
    flags, values = _full_box(_find(track, b"tfhd"))
    sizes = {0x1: 8, 0x2: 4, 0x8: 4, 0x10: 4}
    skipped = 4 + sum(size for flag, size in sizes.items() if flags & flag)
    return bool(flags & 0x20) and not _integer(values, skipped) & _NOT_SYNC


def _find(data: bytes, wanted: bytes) -> bytes:
    """The content of the first box of this type, or nothing."""
    for name, content, end in boxes(lambda start, length: data[start : start + length], 0, len(data)):
        if name == wanted:
            return data[content:end]
    return b""


def _full_box(content: bytes) -> tuple[int, bytes]:
    return int.from_bytes(content[1:4], "big"), content[4:]


def _integer(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 4], "big")


class StreamCopy:
    """A copy of a stream in a temporary file, which grows while the video is generated."""

    def __init__(self, begun: int) -> None:
        self.begun, self.ended = begun, False
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.size = 0
        self.header, self.segments = 0, list[Segment]()
        """Bytes of the header, and the complete segments, at the last update."""
        self.lock = asyncio.Lock()
        """Held during an update."""

    def append(self, data: bytes) -> None:
        """Adds the next bytes."""
        self.file.seek(self.size)
        self.file.write(data)
        self.size += len(data)

    def read_at(self, start: int, length: int) -> bytes:
        """``length`` bytes from ``start`` on."""
        self.file.seek(start)
        return self.file.read(length)


class HlsStreams:
    """The streams that HLS players read on this replica."""

    def __init__(self, videos: Videos, stores: Stores) -> None:
        self._videos, self._jobs, self._files = videos, stores.jobs, stores.files
        self._copies: OrderedDict[str, StreamCopy] = OrderedDict()

    async def playlist(self, owner: str, job_id: str) -> tuple[str, bool]:
        """The playlist with at least one segment, and whether it is final. Raises RequestError 400, 404, 409 or 410."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            record, copy = await self._copy(owner, job_id)
            if copy.segments:
                return playlist(copy.segments, record.fps, copy.ended), copy.ended
            if time.monotonic() > deadline:
                raise RequestError(409, "not_ready", "The video has not begun: try again later.", retry_after=5)
            await asyncio.sleep(PAUSE_SECONDS)

    async def segment(self, owner: str, job_id: str, index: int | None) -> bytes:
        """A media segment, or without an index the header. Raises RequestError 404 if there is none (yet)."""
        _, copy = await self._copy(owner, job_id)
        if index is None and copy.header:
            return copy.read_at(0, copy.header)
        if index is not None and 0 <= index < len(copy.segments):
            segment = copy.segments[index]
            return copy.read_at(segment.start, segment.stop - segment.start)
        raise RequestError(404, "not_found", "The video has no such segment, or not yet.")

    async def _copy(self, owner: str, job_id: str) -> tuple[JobRecord, StreamCopy]:
        """The record, and the present copy of the stream."""
        record = await self._videos.find(owner, job_id)
        if record.suffix != "mp4":
            raise RequestError(400, "not_supported", "HLS needs mp4: serve with service.codec=h264 or av1.")
        if record.ended and record.status != "completed":
            raise video_unavailable(record)
        copy = self._copies.get(job_id)
        if copy is None or copy.begun != record.begun:
            copy = self._copies[job_id] = StreamCopy(record.begun)
        self._copies.move_to_end(job_id)
        while len(self._copies) > MAX_FILES:  # a copy that is being read is closed when its reader has let go of it
            self._copies.popitem(last=False)
        async with copy.lock:
            if not copy.ended:
                await self._update(owner, record, copy)
                copy.header, copy.segments = split(copy.read_at, copy.size, copy.ended)
        return record, copy

    async def _update(self, owner: str, record: JobRecord, copy: StreamCopy) -> None:
        if record.status == "completed":  # its stored segments may be gone
            _, video = await self._videos.content(owner, record.id)
            copy.file = await self._files.call(as_fragments, video)
            copy.size, copy.ended = copy.file.seek(0, 2), True
            return
        while data := await self._jobs.call_timed(self._jobs.store.read_stream, record, copy.size):
            copy.append(data)
