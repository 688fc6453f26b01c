"""Opening video files with PyAV: the video stream, its frames with their times, and the errors of unusable files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import av
import av.container
from av.stream import Disposition

from ardiff.data.signatures import explain
from ardiff.errors import DecodeError


class OpenFile(Protocol):
    """An open file of known size, such as :class:`ardiff.data.storage.RangeReader`, which this module must not import:
    the process that decodes uploads starts without the clients of storage.
    """

    size: int

    def seek(self, offset: int, /) -> int:
        """Moves to a position."""

    def read(self, length: int, /) -> bytes | None:
        """The next bytes, fewer at the end of the file."""


Source = bytes | OpenFile
"""The content of a file, or an open file of which only the needed ranges are read."""
MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192). A header can claim any size."""
# Among all formats that FFmpeg knows, it would take some files of garbage for obscure kinds of video.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,mxf"
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Their decoders fail on pictures before the first key frame, which others skip.
_NEED_KEY_FRAME = ("vp8", "vp9")

# With B-frames, the delay of these decoders is one frame. That of H.264 can change within a file.
_DELAY_OF_ONE = ("mpeg1video", "mpeg2video", "mpeg4")


@contextmanager
def open_video(source: Source) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens the best video stream for strict decoding. Raises av.FFmpegError or ValueError.

    The best stream is FFmpeg's choice among those that are neither cover art nor thumbnails.
    """
    options = {"err_detect": "explode", "format_whitelist": _FORMATS}
    # FFmpeg's default buffer of 32 KiB needs dozens of requests for a file that is read by ranges.
    file, buffer = (io.BytesIO(source), 32768) if isinstance(source, bytes) else (source, 1 << 20)
    if not isinstance(source, bytes):
        source.seek(0)
    # Titles and comments may be in any encoding, and nothing here reads them.
    with av.open(file, mode="r", options=options, buffer_size=buffer, metadata_errors="replace") as container:
        stream = _video_stream(container)
        if stream.codec_context is None:  # a truncated header; PyAV's annotations do not know it
            raise ValueError("its codec is not known")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"its pictures of {width} x {height} are too large")
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        yield container, stream


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & _NO_VIDEO]
    if not streams:
        raise ValueError("it has no video stream")
    best = container.streams.best("video")
    return next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])


def decode_stream(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """The frames from the current position on, in presentation order, each with its time in the stream's units.

    Pictures before the first key frame are skipped. AVI stores no presentation times, and FFmpeg's guesses are out of
    order where there are B-frames. There, the time of a frame is that of the packet with which the decoder returns it.
    The delay between both is constant.
    """
    by_packet = uses_packet_times(container, stream)
    started = stream.codec_context.name not in _NEED_KEY_FRAME
    time: int | None = None
    step = 0
    for packet in container.demux(stream):
        started = started or packet.is_keyframe
        if not started:
            continue
        for frame in packet.decode():
            if not by_packet:
                yield frame.pts, frame
                continue
            previous = time
            # The last frames come out when no packet is left.
            time = frame.dts if frame.dts is not None else previous and previous + step
            step = time - previous if time is not None and previous is not None else 0
            yield time, frame


def uses_packet_times(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether the times of frames are those of packets; see :func:`decode_stream`."""
    delay_is_constant = not has_b_frames(stream) or stream.codec_context.name in _DELAY_OF_ONE
    return container.format.name == "avi" and delay_is_constant


def has_b_frames(stream: av.VideoStream) -> bool:
    """Whether frames are stored in another order than they are shown."""
    return bool(stream.codec_context.has_b_frames)


def size_of(source: Source) -> int:
    """Bytes of the file."""
    return len(source) if isinstance(source, bytes) else source.size


def read_at(source: Source, position: int, length: int) -> bytes:
    """``length`` bytes from ``position`` on, fewer at the end of the file."""
    if isinstance(source, bytes):
        return source[position : position + length]
    source.seek(position)
    return source.read(length) or b""


def decode_error(error: Exception, source: Source, decoded: int) -> DecodeError:
    """The DecodeError for an error of PyAV that occurred after ``decoded`` frames."""
    size = size_of(source)
    if size == 0:
        return DecodeError("it is empty", "empty")
    text = str(error) or "it is no video"
    if isinstance(error, av.FFmpegError) or "codec is not known" in text:
        cause = explain(lambda position, length: read_at(source, position, length), size)
        reason = cause or getattr(error, "strerror", text)
        after = f" after {decoded} frames" if decoded else ""
        kind = "corrupt" if decoded else "undecodable"
        return DecodeError(f"it cannot be decoded{after}: {reason}", kind)
    kinds = {"no video stream": "no video stream", "too large": "too large", "frames, not": "changed"}
    return DecodeError(text, next((kind for part, kind in kinds.items() if part in text), "undecodable"))
