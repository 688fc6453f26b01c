"""Is a file whole? Its container states sizes and places, which the file must contain.

FFmpeg decodes what is left of a file that is cut off, without an error.
"""

import functools
import struct
from collections import Counter

import av
import av.container

from ardiff.data.container import Source, read_at, size_of
from ardiff.data.signatures import ReadAt, boxes
from ardiff.errors import DecodeError

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_AVI_SLACK = 8
"""Some writers count the header of eight bytes as content."""


def check_claims(source: Source) -> None:
    """Rejects an mp4 that claims more samples than it has bytes, for which FFmpeg would allocate an index.

    Raises:
        DecodeError: It does. Files that are read by ranges are not checked: they have at least as many bytes.
    """
    if not isinstance(source, bytes) or source[4:8] not in (b"ftyp", b"moov", b"moof", b"styp"):
        return
    claims = _claimed_samples(functools.partial(read_at, source), 0, len(source))
    samples = max(claims.values(), default=0)
    if samples > len(source):
        raise DecodeError(f"it claims {samples} samples in {len(source)} bytes", "too large")


def check_whole(source: Source, container: av.container.InputContainer, stream: av.VideoStream) -> None:
    """Raises DecodeError (``truncated`` or ``corrupt``) if the file does not hold what its container states."""
    names = container.format.name.split(",")
    if "mp4" in names:
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        _require(end, size_of(source), "its index points")
    elif "avi" in names:
        _check_avi(source)
    elif "matroska" in names:
        _check_matroska(source)


def missing_pictures(container: av.container.InputContainer, stream: av.VideoStream, num_frames: int) -> int:
    """How many pictures that the index of an AVI lists were not found. Empty chunks are no pictures.

    Moves the position of the container.
    """
    if container.format.name != "avi":
        return 0
    container.seek(0, stream=stream)  # loads the index
    listed = len(stream.index_entries)
    if num_frames >= listed:
        return 0
    return listed - sum(packet.size > 0 for packet in container.demux(stream))


def _require(end: int, size: int, statement: str) -> None:
    if end > size:
        raise DecodeError(f"it is cut off: {statement} to byte {end}, but it has only {size} bytes", "truncated")


def _claimed_samples(read: ReadAt, start: int, end: int) -> Counter[bytes]:
    """Samples by the type of the box that claims them. Sound is left out: FFmpeg reads it by chunks."""
    samples = Counter[bytes]()
    for name, content, stop in boxes(read, start, end):
        if name in _MP4_PARENTS and not (name == b"mdia" and _is_sound(read, content, stop)):
            samples += _claimed_samples(read, content, min(stop, end))
        elif name == b"stsz":
            samples[name] += int.from_bytes(read(content + 8, 4), "big")
        elif name == b"trun":
            samples[name] += int.from_bytes(read(content + 4, 4), "big")
        elif name == b"stts":
            count = min(int.from_bytes(read(content + 4, 4), "big"), (stop - content) // 8)
            table = read(content + 8, 8 * count)
            samples[name] += sum(number for number, _ in struct.iter_unpack(">II", table[: len(table) // 8 * 8]))
    return samples


def _is_sound(read: ReadAt, start: int, end: int) -> bool:
    return any(name == b"hdlr" and read(content + 8, 4) == b"soun" for name, content, _ in boxes(read, start, end))


def _check_avi(source: Source) -> None:
    """Each RIFF chunk of an AVI states its size; files above 1 GB have several."""
    position, size = 0, size_of(source)
    while (header := read_at(source, position, 12))[:4] == b"RIFF" and header[8:] in (b"AVI ", b"AVIX"):
        length = int.from_bytes(header[4:8], "little")
        if length in (0, 0xFFFFFFFF):  # never filled in: a capture that was interrupted, or a stream
            return
        position += 8 + length + length % 2
        _require(position - _AVI_SLACK - length % 2, size, "its header says that it goes on")


def _check_matroska(source: Source) -> None:
    """The segment states its size, unless it was streamed; each cluster and block states where the next one begins.

    The elements of a file that is read by ranges are not visited: each would cost a request.
    """
    head, size = read_at(source, 0, 4096), size_of(source)
    _, position, length = _element(head, 0) or (0, 0, None)
    identity, position, length = _element(head, position + (length or 0)) or (0, 0, None)
    if identity != _SEGMENT:
        return
    end = size
    if length is not None:
        end = position + length
        _require(end, size, "its header says that it goes on")
    while isinstance(source, bytes) and position < end:
        element = _element(source, position)
        if element is None:
            raise DecodeError(f"it is damaged: there is a hole at byte {position} of {size}", "corrupt")
        identity, content, length = element
        # A cluster is entered, so its blocks are visited next; it may state no size.
        position = content if identity == _CLUSTER or length is None else content + length
        _require(position, size, "a block goes on")


def _element(data: bytes, position: int) -> tuple[int, int, int | None] | None:
    """Identity, start of the content and size of an EBML element (RFC 8794); None if there is none at ``position``.

    An unknown size is None.
    """
    width = 9 - data[position].bit_length() if position < len(data) else 9
    place = position + width
    size_width = 9 - data[place].bit_length() if place < len(data) else 9
    if width > 4 or size_width > 8:
        return None
    identity = int.from_bytes(data[position:place], "big")
    mask = (1 << 7 * size_width) - 1
    length = int.from_bytes(data[place : place + size_width], "big") & mask
    return identity, place + size_width, None if length == mask else length
