"""Decoding frames of video files with PyAV.

Frames are uint8 ``(F, H, W, 3)`` RGB, upright, and numbered from 0 in presentation order.
"""

from collections.abc import Collection, Iterator, Sequence

import av
import av.container
import numpy as np

from ardiff.data.container import Source, decode_error, decode_stream, has_b_frames, open_video, uses_packet_times
from ardiff.data.filters import deinterlaced
from ardiff.data.pictures import crop, pixel_aspect_of, to_rgb
from ardiff.data.probe import Timing
from ardiff.errors import ClipTooShortError, DecodeError
from ardiff.resolution import Resolution

_SEEKS = 3
"""Key frames that are tried before decoding starts at the beginning."""


def decode_clip(
    source: Source,
    start: int,
    num_frames: int,
    stride: int = 1,
    resolution: Resolution | None = None,
    filters: Collection[str] = (),
) -> np.ndarray:
    """A clip of ``num_frames`` frames from frame ``start`` on, every ``stride``-th: uint8 ``(F, H, W, 3)``.

    With ``resolution``, frames are scaled to cover that shape and cropped to its centre. ``filters`` are those of
    :func:`decode_frames`.

    Raises:
        ClipTooShortError: The video ends before the clip does.
        DecodeError: The file is no video, is damaged, or its frames change their size in the clip.
        ValueError: ``start`` is negative, or ``num_frames`` or ``stride`` is below 1.
    """
    if start < 0 or num_frames < 1 or stride < 1:
        raise ValueError(f"there is no clip of start {start}, num_frames {num_frames}, stride {stride}")
    frames = decode_frames(source, range(start, start + num_frames * stride, stride), resolution, None, filters)
    return crop(np.stack(list(frames.values())), resolution)


def decode_frames(
    source: Source,
    wanted: Sequence[int],
    resolution: Resolution | None = None,
    timing: Timing | None = None,
    filters: Collection[str] = (),
) -> dict[int, np.ndarray]:
    """The frames with the given numbers, each uint8 ``(H, W, 3)``, all of one size.

    Args:
        source: The file.
        wanted: Numbers of frames, ascending.
        resolution: If given, frames are scaled to just cover this shape, and not cropped.
        timing: From :func:`ardiff.data.probe.probe`. With it, decoding starts at the last key frame before the first
            wanted frame instead of the beginning. The frames are the same.
        filters: ``deinterlace``, ``tone_map``: see :mod:`ardiff.data.filters`. Frames that do not need them, stay as
            they are.

    Raises:
        ClipTooShortError: The video ends before the last wanted frame.
        DecodeError: The file is no video, is damaged, or its frames change their size.
    """
    pictures = None
    if timing is not None and timing.step and wanted[0] > 0:
        pictures = _decode_from_key_frame(source, wanted, resolution, timing, filters)
    if pictures is None:
        pictures = _decode_from_beginning(source, wanted, resolution, filters)
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise DecodeError("its frames change their size", "size changes")
    return pictures


class _PositionError(Exception):
    """Decoding has not started at or before the first frame that is needed, or the order of the frames has gaps."""


def _pictures(
    frames: Iterator[tuple[int, av.VideoFrame]],
    stream: av.VideoStream,
    wanted: Sequence[int],
    resolution: Resolution | None,
    filters: Collection[str],
) -> dict[int, np.ndarray]:
    """The wanted pictures among numbered frames; fewer if the frames end before."""
    pictures, numbers, aspect = dict[int, np.ndarray](), set(wanted), pixel_aspect_of(stream)
    for number, frame in deinterlaced(frames, numbers) if "deinterlace" in filters else frames:
        if number in numbers:
            pictures[number] = to_rgb(frame, resolution, aspect, "tone_map" in filters)
        if number == wanted[-1]:
            break
    return pictures


def _decode_from_beginning(
    source: Source, wanted: Sequence[int], resolution: Resolution | None, filters: Collection[str]
) -> dict[int, np.ndarray]:
    count = 0

    def numbered() -> Iterator[tuple[int, av.VideoFrame]]:
        nonlocal count
        for _, frame in decode_stream(container, stream):
            count += 1
            yield count - 1, frame

    try:
        with open_video(source) as (container, stream):
            pictures = _pictures(numbered(), stream, wanted, resolution, filters)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, count) from error
    if len(pictures) < len(set(wanted)):
        raise ClipTooShortError(f"the clip needs frame {wanted[-1]}, the video has {count} frames")
    return pictures


def _decode_from_key_frame(
    source: Source, wanted: Sequence[int], resolution: Resolution | None, timing: Timing, filters: Collection[str]
) -> dict[int, np.ndarray] | None:
    """Like :func:`decode_frames`; None if no key frame before the clip is found by its time, or there is damage."""
    first = wanted[0] - ("deinterlace" in filters)
    target = round(timing.start + first * timing.step)
    try:
        with open_video(source) as (container, stream):
            for _ in range(_SEEKS):
                container.seek(target, stream=stream, backward=True)
                try:
                    pictures = _pictures(
                        _frames_here(container, stream, first, timing), stream, wanted, resolution, filters
                    )
                    if len(pictures) == len(set(wanted)):
                        return pictures
                except _PositionError:
                    pass
                container.seek(target, stream=stream, backward=True)
                stored = next((p.dts for p in container.demux(stream) if p.dts is not None), None)
                if stored is None or stored > target:
                    return None
                target = stored - 1
    except (av.FFmpegError, IndexError, ValueError):
        return None
    return None


def _frames_here(
    container: av.container.InputContainer, stream: av.VideoStream, first: int, timing: Timing
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames from the container's position on, numbered by their times.

    The first frame must be a key frame: containers may mark others as such, and some decoders return grey for them.

    Raises:
        _PositionError: The first frame is later than ``first``, or a frame has no number of its own.
    """
    previous: int | None = None
    for time, frame in decode_stream(container, stream):
        if time is None:
            raise _PositionError
        index = round((time - timing.start) / timing.step)
        if abs(timing.start + index * timing.step - time) > 1.5:
            raise _PositionError
        if previous is None and (index > first or not frame.key_frame):
            raise _PositionError
        if previous is not None and index != previous + 1:
            raise _PositionError
        previous = index
        yield index, frame


def frame_times(source: Source, num_frames: int) -> np.ndarray:
    """When each of the ``num_frames`` frames is shown, in seconds after the first: float64 ``(num_frames,)``.

    Raises:
        DecodeError: The file cannot be decoded, has no times, or has another number of frames.
    """
    try:
        with open_video(source) as (container, stream):
            by_packet = uses_packet_times(container, stream)
            packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            shown = [packet.dts if by_packet else packet.pts for packet in packets]
            # Some packets hold no visible frame, or frames are returned later than their packets.
            if len(shown) != num_frames or (by_packet and has_b_frames(stream)):
                container.seek(0, stream=stream)
                shown = [time for time, _ in decode_stream(container, stream)]
            if len(shown) != num_frames or stream.time_base is None:
                raise ValueError(f"it has {len(shown)} frames, not {num_frames} as before")
            ticks = np.array(sorted(time for time in shown if time is not None), dtype=np.float64)
            if len(ticks) != num_frames:
                raise ValueError("its frames have no times")
            return (ticks - ticks[0]) * float(stream.time_base)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, 0) from error
