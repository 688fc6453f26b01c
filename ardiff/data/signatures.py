"""What a file that cannot be decoded is, in words, from its first bytes and its boxes."""

from collections.abc import Callable, Iterator

ReadAt = Callable[[int, int], bytes]
"""Reads ``length`` bytes at ``position`` of a file."""
_HEAD = 4096
_MAX_INDEX = 1 << 24
_MAX_BOXES = 10_000
Signatures = tuple[tuple[int, bytes, str], ...]
"""Position in a file, the bytes there, and what the file is then."""
_SIGNATURES: Signatures = (
    (0, b"version https://git-lfs", "it is a Git LFS pointer, not the video: run `git lfs pull`"),
    (0, b"GIF8", "it is a GIF picture, which is not taken as a video: convert it"),
    (0, b"\x89PNG", "it is a PNG picture"),
    (0, b"\xff\xd8\xff", "it is a JPEG picture"),
    (8, b"WEBP", "it is a WebP picture"),
    (8, b"WAVE", "it is sound without pictures (WAVE)"),
    (0, b"ID3", "it is sound without pictures (MP3)"),
    (0, b"fLaC", "it is sound without pictures (FLAC)"),
    (0, b"OggS", "it is an Ogg file, which is not taken: convert it"),
    (0, b"PK\x03\x04", "it is a zip archive: unpack it"),
    (0, b"\x1f\x8b", "it is a gzip archive: unpack it"),
    (0, b"Rar!", "it is a rar archive: unpack it"),
    (0, b"7z\xbc\xaf", "it is a 7z archive: unpack it"),
    (257, b"ustar", "it is a tar archive: unpack it"),
    (0, b"%PDF", "it is a PDF document"),
)


def explain(read_at: ReadAt, size: int) -> str:
    """Why a file of ``size`` bytes is no video that can be decoded; empty if nothing is recognized."""
    head = read_at(0, _HEAD)
    if text := recognize(head, _SIGNATURES):
        return text
    if not head.strip(b"\0"):
        return (
            "it begins with zeros: it was never written or is damaged"
            if _data_follows(read_at, size)
            else ("it is all zeros: it was never written or is damaged")
        )
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return _explain_mp4(read_at, size)
    if _is_text(head, whole=len(head) == size):
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype html", b"<html")):
            return "it is an HTML page, not a video: the download failed"
        return "it is text, not a video"
    return ""


def recognize(head: bytes, signatures: Signatures) -> str:
    """What a file that begins with ``head`` is, by the first signature that fits; empty if none does."""
    return next((text for start, magic, text in signatures if head[start : start + len(magic)] == magic), "")


def boxes(read_at: ReadAt, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start of the content and end of each box of an mp4 (ISO/IEC 14496-12, 4.2) between two positions."""
    for _ in range(_MAX_BOXES):
        header = read_at(start, 16)
        if start + 8 > end or len(header) < 8:
            return
        length, content = int.from_bytes(header[:4], "big"), start + 8
        if length == 1:
            length, content = int.from_bytes(header[8:16], "big"), start + 16
        stop = start + length if length else end
        if stop < content:
            return
        yield header[4:8], content, stop
        start = stop


def _explain_mp4(read_at: ReadAt, size: int) -> str:
    index = next(((start, stop) for name, start, stop in boxes(read_at, 0, size) if name == b"moov"), None)
    if index is None:
        return "its index (moov) is missing: it is cut off, or its recording was never finished"
    if b"encv" in read_at(index[0], min(index[1] - index[0], _MAX_INDEX)):
        return "it is encrypted (DRM)"
    return ""


def _data_follows(read_at: ReadAt, size: int) -> bool:
    return any(read_at(position, 1 << 20).strip(b"\0") for position in range(_HEAD, size, 1 << 20))


def _is_text(head: bytes, whole: bool) -> bool:
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:  # the end of the excerpt may cut a character
        return not whole and error.start > len(head) - 4
    return True
