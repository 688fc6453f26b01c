"""Decoding frames of video files with PyAV.

Frames are uint8 ``(F, H, W, 3)`` RGB, upright, and numbered from 0 in presentation order.
"""

from collections.abc import Sequence

import av
import numpy as np

from ardiff.data.container import Source, decode_error, open_video
from ardiff.data.pictures import crop_square, to_rgb
from ardiff.data.probe import Timing
from ardiff.errors import ClipTooShortError, DecodeError


def decode_clip(
    source: Source, start: int, num_frames: int, stride: int = 1, resolution: int | None = None
) -> np.ndarray:
    """A clip of ``num_frames`` frames from frame ``start`` on, every ``stride``-th: uint8 ``(F, H, W, 3)``.

    With ``resolution``, frames are scaled and cropped to the central square of that size.

    Raises:
        ClipTooShortError: The video ends before the clip does.
        DecodeError: The file is no video, is damaged, or its frames change their size in the clip.
        ValueError: ``start`` is negative, or ``num_frames`` or ``stride`` is below 1.
    """
    if start < 0 or num_frames < 1 or stride < 1:
        raise ValueError(f"there is no clip of start {start}, num_frames {num_frames}, stride {stride}")
    frames = decode_frames(source, range(start, start + num_frames * stride, stride), resolution)
    return crop_square(np.stack(list(frames.values())), resolution)


def decode_frames(
    source: Source, wanted: Sequence[int], resolution: int | None = None, timing: Timing | None = None
) -> dict[int, np.ndarray]:
    """The frames with the given numbers, each uint8 ``(H, W, 3)``, all of one size.

    Args:
        source: The file.
        wanted: Numbers of frames, ascending.
        resolution: If given, frames are scaled so that the short side has this many pixels.
        timing: From :func:`ardiff.data.probe.probe`. With it, decoding starts at the last key frame before the first
            wanted frame instead of the beginning. The frames are the same.

    Raises:
        ClipTooShortError: The video ends before the last wanted frame.
        DecodeError: The file is no video, is damaged, or its frames change their size.
    """
    pictures = None
    if timing is not None and timing.step and wanted[0] > 0:
        pictures = _decode_from_key_frame(source, wanted, resolution, timing)
    if pictures is None:
        pictures, count = {}, 0
        numbers = set(wanted)
        try:
            with open_video(source) as container:
                for index, frame in enumerate(container.decode(container.streams.video[0])):
                    count = index + 1
                    if index in numbers:
                        pictures[index] = to_rgb(frame, resolution)
                    if index == wanted[-1]:
                        break
        except (av.FFmpegError, IndexError, ValueError) as error:
            raise decode_error(error, source, count) from error
        if len(pictures) < len(numbers):
            raise ClipTooShortError(f"the clip needs frame {wanted[-1]}, the video has {count} frames")
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise DecodeError("its frames change their size", "size changes")
    return pictures


def _decode_from_key_frame(
    source: Source, wanted: Sequence[int], resolution: int | None, timing: Timing
) -> dict[int, np.ndarray] | None:
    """Like :func:`decode_frames`; None if the times do not identify the frames, or there is damage."""
    pictures, numbers = dict[int, np.ndarray](), set(wanted)
    try:
        with open_video(source) as container:
            stream = container.streams.video[0]
            container.seek(round(timing.start + wanted[0] * timing.step), stream=stream, backward=True)
            previous: int | None = None
            for frame in container.decode(stream):
                if frame.pts is None:
                    return None
                index = round((frame.pts - timing.start) / timing.step)
                skipped = index > wanted[0] if previous is None else index != previous + 1
                if skipped or abs(timing.start + index * timing.step - frame.pts) > 1.5:
                    return None
                previous = index
                if index in numbers:
                    pictures[index] = to_rgb(frame, resolution)
                if index == wanted[-1]:
                    return pictures
    except (av.FFmpegError, IndexError, ValueError):
        return None
    return None


def frame_times(source: Source, num_frames: int) -> np.ndarray:
    """When each of the ``num_frames`` frames is shown, in seconds after the first: float64 ``(num_frames,)``.

    Raises:
        DecodeError: The file cannot be decoded, has no times, or has another number of frames.
    """
    try:
        with open_video(source) as container:
            stream = container.streams.video[0]
            shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            if len(shown) != num_frames:  # some packets hold no visible frame
                container.seek(0, stream=stream)
                shown = [frame.pts for frame in container.decode(stream)]
            if len(shown) != num_frames or stream.time_base is None:
                raise ValueError(f"it has {len(shown)} frames, not {num_frames} as before")
            ticks = np.array(sorted(time for time in shown if time is not None), dtype=np.float64)
            if len(ticks) != num_frames:
                raise ValueError("its frames have no times")
            return (ticks - ticks[0]) * float(stream.time_base)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, 0) from error
