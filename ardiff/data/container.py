"""Opening video files with PyAV, and the errors of files that cannot be opened or decoded."""

import io

import av
import av.container

from ardiff.data.storage import RangeReader
from ardiff.errors import DecodeError

Source = bytes | RangeReader
"""The content of a file, or an open file of which only the needed ranges are read."""
MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192). A header can claim any size."""
# Among all formats that FFmpeg knows, it would take some files of garbage for obscure kinds of video.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf"


def open_video(source: Source) -> av.container.InputContainer:
    """Opens the first video stream for strict decoding. Raises av.FFmpegError or ValueError."""
    options = {"err_detect": "explode", "format_whitelist": _FORMATS}
    # FFmpeg's default buffer of 32 KiB needs dozens of requests for a file that is read by ranges.
    file, buffer = (io.BytesIO(source), 32768) if isinstance(source, bytes) else (source, 1 << 20)
    if not isinstance(source, bytes):
        source.seek(0)
    container = av.open(file, mode="r", options=options, buffer_size=buffer)
    if not container.streams.video:
        container.close()
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # a truncated header; PyAV's annotations do not know it
        container.close()
        raise ValueError("its codec is not known")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        container.close()
        raise ValueError(f"its pictures of {size} are too large")
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return container


def size_of(source: Source) -> int:
    """Bytes of the file."""
    return len(source) if isinstance(source, bytes) else source.size


def decode_error(error: Exception, source: Source, decoded: int) -> DecodeError:
    """The DecodeError for an error of PyAV that occurred after ``decoded`` frames."""
    if size_of(source) == 0:
        return DecodeError("it is empty", "empty")
    if isinstance(error, av.FFmpegError):
        after = f" after {decoded} frames" if decoded else ""
        return DecodeError(f"it cannot be decoded{after} ({error.strerror})", "corrupt" if decoded else "undecodable")
    text = str(error) or "it is no video"
    kinds = {"no video stream": "no video stream", "too large": "too large", "frames, not": "changed"}
    return DecodeError(text, next((kind for part, kind in kinds.items() if part in text), "undecodable"))
