"""Probing a video file: its codec, size, number of frames and timing, found by decoding all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import av
import av.container
import numpy as np

from ardiff.data.container import Source, decode_error, open_video, size_of
from ardiff.data.pictures import turn_upright
from ardiff.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Timing:
    """When frames are shown, in units of the stream's time base: frame ``i`` at ``start + i * step``, within one unit.

    A step of 0 means that no such rule holds: the frame rate varies, or there is only one frame.
    """

    start: int = 0
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Properties of a video file. Width and height are those of the upright picture."""

    codec: str
    width: int
    height: int
    fps: float
    """The mean, for a variable rate."""
    num_frames: int
    rotation: int
    """Degrees, counter-clockwise, by which decoded pictures are turned to stand upright."""
    timing: Timing


def probe(source: Source) -> Probe:
    """Decodes the whole file.

    Containers may state a wrong length, and damage only shows when every packet is decoded strictly. Frames that an
    edit list hides are not counted, as decoding does not return them. Damaged bytes that form a valid stream are not
    noticed.

    Raises:
        DecodeError: The file is no video, is damaged, or is shorter than its container states.
    """
    height, width, rotation = 0, 0, 0
    times: list[int | None] = []
    try:
        with open_video(source) as container:
            stream = container.streams.video[0]
            stated, codec, rate = stream.frames, stream.codec_context.codec.canonical_name, stream.average_rate
            base, truncated = stream.time_base, _is_truncated(container, source)
            try:
                for frame in container.decode(stream):
                    times.append(frame.pts)
                    if len(times) == 1:
                        height, width = turn_upright(frame.to_ndarray(format="gray8"), frame).shape
                        rotation = frame.rotation % 360
            except av.FFmpegError:
                if not truncated:
                    raise
            # The number of frames that mp4 states includes those that an edit list hides.
            truncated = truncated or ("mp4" not in container.format.name.split(",") and stated > len(times))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise decode_error(error, source, len(times)) from error
    if truncated:
        raise DecodeError(f"it is truncated: its header states {stated} frames, it has {len(times)}", "truncated")
    if not times:
        raise DecodeError("it holds no frame", "no frames")
    fps, shown = float(rate or 0), [t for t in times if t is not None]
    timing = _timing(times)
    if timing.step == 0 and base and len(shown) > 1 and shown[-1] > shown[0]:
        fps = (len(shown) - 1) / float((shown[-1] - shown[0]) * base)
    return Probe(codec, width, height, fps, len(times), rotation, timing)


def _is_truncated(container: av.container.InputContainer, source: Source) -> bool:
    """Whether the file is shorter than its index or header states."""
    size = size_of(source)
    if "mp4" in container.format.name.split(","):
        return any(entry.pos + entry.size > size for entry in container.streams.video[0].index_entries)
    if container.format.name == "avi" and isinstance(source, bytes):
        return size < int.from_bytes(source[4:8], "little") + 8
    return False


def _timing(times: Sequence[int | None]) -> Timing:
    if len(times) < 2 or any(time is None for time in times):
        return Timing()
    shown = np.array(times, dtype=np.int64)
    step = float(shown[-1] - shown[0]) / (len(shown) - 1)
    regular = shown[0] + step * np.arange(len(shown))
    # Containers round times to their units; Matroska rounds to milliseconds.
    allowed = 1.0 if step >= 4 else 0.0
    return Timing(int(shown[0]), step) if step > 0 and np.abs(shown - regular).max() <= allowed else Timing()
