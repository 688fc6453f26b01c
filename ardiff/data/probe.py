"""Probing a video file: its codec, size, number of frames and timing, found by decoding all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from ardiff.data.container import Source, decode_error, decode_stream, open_video
from ardiff.data.integrity import check_claims, check_whole, missing_pictures
from ardiff.data.pictures import check_aspect, check_convertible, orientation, pixel_aspect_of, square_pixels
from ardiff.errors import DecodeError

_HDR_TRANSFERS = (16, 18)  # PQ and HLG, ITU-T H.273, table 3
_INTERLACED_SHARE = 0.1


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


def probe(source: Source) -> Probe:
    """Decodes the whole file.

    Containers may state a wrong length, and damage only shows when every packet is decoded strictly. Frames that an
    edit list hides are not counted, as decoding does not return them. Damaged bytes that form a valid stream are not
    noticed.

    Raises:
        DecodeError: The file is no video, is damaged, is shorter than its container states, its pictures change their
            size, or are too large or too narrow.
    """
    times: list[int | None] = []
    sizes: set[tuple[int, int]] = set()
    interlaced = 0
    try:
        check_claims(source)
        with open_video(source) as (container, stream):
            check_whole(source, container, stream)
            first: av.VideoFrame | None = None
            for time, frame in decode_stream(container, stream):
                if first is None:
                    first = frame
                times.append(time)
                sizes.add((frame.width, frame.height))
                interlaced += frame.interlaced_frame
            if first is None:
                raise DecodeError("it holds no frame", "no frames")
            check_convertible(first)
            codec, rate, base = stream.codec_context.codec.canonical_name, stream.average_rate, stream.time_base
            aspect = pixel_aspect_of(stream)
            missing = missing_pictures(container, stream, len(times))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, len(times)) from error
    if missing:
        raise DecodeError(f"it is damaged: {missing} pictures that its index lists are not there", "corrupt")
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
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
            ("interlaced", interlaced > _INTERLACED_SHARE * len(times)),
            ("hdr", int(first.color_trc) in _HDR_TRANSFERS),
        )
        if applies
    ]
    fps = _frame_rate(times, timing, base, rate)
    return Probe(codec, width, height, fps, len(times), 90 * turn.quarters, timing, aspect, tuple(warnings))


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
