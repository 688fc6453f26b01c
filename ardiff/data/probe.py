"""Probing a video file: its codec, size, number of frames and timing, found by decoding all of it or by its packets."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import av.container
import numpy as np

from ardiff.data.container import Source, decode_error, decode_stream, open_video
from ardiff.data.integrity import check_claims, check_whole, missing_pictures
from ardiff.data.pictures import (
    HDR_TRANSFERS,
    check_aspect,
    check_convertible,
    orientation,
    pixel_aspect_of,
    square_pixels,
)
from ardiff.errors import DecodeError

_INTERLACED_SHARE = 0.1
_ONE_FRAME_A_PACKET = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
Count = Literal["decode", "packets"]
"""How frames are counted: see :func:`probe`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When frames are shown, in units of the stream's time base: frame ``i`` at ``start + i * step``, within one unit.

    A step of 0 means that no such rule holds: the frame rate varies, or there is only one frame.
    """

    start: int = 0
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Properties of a video file. Width and height are those of the upright picture with square pixels."""

    codec: str
    width: int
    height: int
    fps: float
    """From the times of the frames; the mean, for a variable rate."""
    num_frames: int
    rotation: int
    """Degrees, counter-clockwise, by which decoded pictures are turned to stand upright."""
    timing: Timing
    pixel_aspect: float = 1.0
    """Width of a stored pixel divided by its height."""
    warnings: tuple[str, ...] = ()
    """What the pictures suffer from: ``interlaced``, ``hdr``."""


@dataclass(frozen=True, slots=True)
class _Frames:
    """What was found in a stream, beside the times of its frames."""

    first: av.VideoFrame
    sizes: set[tuple[int, int]]
    """Of the decoded frames."""
    decoded: int
    interlaced: int
    """How many of the decoded frames are."""


def probe(source: Source, count: Count = "decode") -> Probe:
    """Decodes the whole file, or with ``count="packets"`` its first frame, and counts packets.

    Containers may state a wrong length, and damage only shows when every packet is decoded strictly. Frames that an
    edit list hides are not counted, as decoding does not return them. Damaged bytes that form a valid stream are not
    noticed.

    Packets are counted in mp4, mov, Matroska and WebM, where each holds a frame and its time, but not of VP8, which has
    invisible frames; other files are decoded. Damage inside packets and pictures that change their size are not found.

    Raises:
        DecodeError: The file is no video, is damaged, is shorter than its container states, its pictures change their
            size, or are too large or too narrow.
    """
    times: list[int | None] = []
    try:
        check_claims(source)
        with open_video(source) as (container, stream):
            check_whole(source, container, stream)
            look = _count_packets if count == "packets" and _has_frames_as_packets(container, stream) else _decode_all
            found = look(container, stream, times)
            first = found.first
            check_convertible(first)
            codec, rate, base = stream.codec_context.codec.canonical_name, stream.average_rate, stream.time_base
            aspect = pixel_aspect_of(stream)
            missing = missing_pictures(container, stream, len(times))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, len(times)) from error
    if missing:
        raise DecodeError(f"it is damaged: {missing} pictures that its index lists are not there", "corrupt")
    if len(found.sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(found.sizes))
        raise DecodeError(f"its frames change their size ({listed})", "size changes")
    width, height = square_pixels(first.width, first.height, aspect)
    check_aspect(width, height)
    turn = orientation(first)
    if turn.quarters % 2:
        width, height = height, width
    timing = _timing(times)
    warnings = [
        name
        for name, applies in (
            ("interlaced", found.interlaced > _INTERLACED_SHARE * found.decoded),
            ("hdr", int(first.color_trc) in HDR_TRANSFERS),
        )
        if applies
    ]
    fps = _frame_rate(times, timing, base, rate)
    return Probe(codec, width, height, fps, len(times), 90 * turn.quarters, timing, aspect, tuple(warnings))


def _decode_all(container: av.container.InputContainer, stream: av.VideoStream, times: list[int | None]) -> _Frames:
    """Decodes the stream. ``times`` is filled on the way, for the message of an error."""
    first: av.VideoFrame | None = None
    sizes: set[tuple[int, int]] = set()
    interlaced = 0
    for time, frame in decode_stream(container, stream):
        if first is None:
            first = frame
        times.append(time)
        sizes.add((frame.width, frame.height))
        interlaced += frame.interlaced_frame
    return _Frames(_required(first), sizes, len(times), interlaced)


def _has_frames_as_packets(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether each packet holds a frame that is shown, and the time of the frame."""
    return container.format.name in _ONE_FRAME_A_PACKET and stream.codec_context.name != "vp8"


def _count_packets(container: av.container.InputContainer, stream: av.VideoStream, times: list[int | None]) -> _Frames:
    """Decodes the first frame, and reads the times of all others off their packets, from the first key frame on."""
    first: av.VideoFrame | None = None
    started = False
    shown: list[int | None] = []
    for packet in container.demux(stream):
        started = started or packet.is_keyframe
        if not started:
            continue
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size and not packet.is_discard:
            shown.append(packet.pts)
    times += sorted(shown) if None not in shown else shown  # type: ignore[type-var]
    first = _required(first)
    return _Frames(first, {(first.width, first.height)}, 1, int(first.interlaced_frame))


def _required(first: av.VideoFrame | None) -> av.VideoFrame:
    if first is None:
        raise DecodeError("it holds no frame", "no frames")
    return first


def _frame_rate(times: Sequence[int | None], timing: Timing, base: Fraction | None, stated: Fraction | None) -> float:
    """Frames per second, from the times of the frames; what the file states if there are no times.

    Containers round times to their units. A stated rate within this error is more precise than the measured one.
    """
    shown = [time for time in times if time is not None]
    if base is None or len(shown) < 2 or max(shown) == min(shown):
        return float(stated or 0)
    step = timing.step or (max(shown) - min(shown)) / (len(shown) - 1)
    error = 2 / (len(shown) - 1)
    if timing.step and stated and abs(float(1 / (stated * base)) - step) <= error:
        return float(stated)
    return 1 / (step * float(base))


def _timing(times: Sequence[int | None]) -> Timing:
    if len(times) < 2 or any(time is None for time in times):
        return Timing()
    shown = np.array(times, dtype=np.int64)
    step = float(shown[-1] - shown[0]) / (len(shown) - 1)
    regular = shown[0] + step * np.arange(len(shown))
    # Containers round times to their units; Matroska rounds to milliseconds.
    allowed = 1.0 if step >= 4 else 0.0
    return Timing(int(shown[0]), step) if step > 0 and np.abs(shown - regular).max() <= allowed else Timing()
