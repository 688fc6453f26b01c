"""Decoding videos with PyAV: what a file holds, and clips of it as arrays.

Frames are uint8 ``(F, H, W, 3)`` RGB, upright whatever rotation the file asks for, and numbered from 0 in the order of
presentation. A file is given as its bytes, or as an open file of which only the parts that are needed are read.
"""

import functools
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import av
import av.container
import av.video.reformatter
import numpy as np
from PIL import Image, ImageOps

from ardiff.data.storage import RangeReader
from ardiff.errors import ClipTooShortError, DecodeError

Source = bytes | RangeReader
MAX_PIXELS = 1 << 26
"""Pixels of the largest picture that is decoded (8192 x 8192): a header may claim any size."""
# Left to guess among all formats it knows, FFmpeg takes some files of garbage for obscure kinds of video.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf"


@dataclass(frozen=True, slots=True)
class Timing:
    """When frames are shown, in units of the stream's time base: frame ``i`` at ``start + i * step``, within a unit.

    A step of 0 says that they follow no such rule: the frame rate varies, or there is but one frame.
    """

    start: int = 0
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class Probe:
    """What a video file holds, found by decoding it. Width and height are those of the upright picture."""

    codec: str
    width: int
    height: int
    fps: float
    """Of a variable rate, the mean."""
    num_frames: int
    rotation: int
    """Degrees, counter-clockwise, by which decoded pictures were turned to stand upright."""
    timing: Timing


def probe(source: Source) -> Probe:
    """Decodes the whole file and says what it holds.

    Containers lie about their length, and damage shows only when every packet is decoded strictly. Frames that an edit
    list hides are not counted, as :func:`decode_clips` does not see them. Damaged bytes that happen to be a valid
    stream stay unnoticed.

    Raises:
        DecodeError: The file is no video, is damaged, or ends before its container says it does.
    """
    size = len(source) if isinstance(source, bytes) else source.size
    height, width, rotation = 0, 0, 0
    times: list[int | None] = []
    try:
        with _open(source) as container:
            stream = container.streams.video[0]
            promised, codec, rate = stream.frames, stream.codec_context.codec.canonical_name, stream.average_rate
            base, cut_off = stream.time_base, _is_cut_off(container, source, size)
            try:
                for frame in container.decode(stream):
                    times.append(frame.pts)
                    if len(times) == 1:
                        height, width = _upright(frame.to_ndarray(format="gray8"), frame).shape
                        rotation = frame.rotation % 360
            except av.FFmpegError:
                if not cut_off:
                    raise
            # The number of frames that mp4 announces includes those that an edit list hides.
            cut_off = cut_off or ("mp4" not in container.format.name.split(",") and promised > len(times))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _failure(error, size, len(times)) from error
    if cut_off:
        raise _error("truncated", f"it is truncated: {promised} frames announced, {len(times)} found")
    if not times:
        raise _error("no frames", "it holds no frame")
    fps, shown = float(rate or 0), [t for t in times if t is not None]
    timing = _timing(times)
    if timing.step == 0 and base and len(shown) > 1 and shown[-1] > shown[0]:
        fps = (len(shown) - 1) / float((shown[-1] - shown[0]) * base)
    return Probe(codec, width, height, fps, len(times), rotation, timing)


def _is_cut_off(container: av.container.InputContainer, source: Source, size: int) -> bool:
    """Whether the file is shorter than its own index or header says."""
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
    # Containers round times to their units, Matroska to milliseconds.
    allowed = 1.0 if step >= 4 else 0.0
    return Timing(int(shown[0]), step) if step > 0 and np.abs(shown - regular).max() <= allowed else Timing()


def decode_clip(
    source: Source, start: int, num_frames: int, stride: int = 1, resolution: int | None = None
) -> np.ndarray:
    """``num_frames`` frames from frame ``start`` on, every ``stride``-th, uint8 ``(F, H, W, 3)``.

    See :func:`decode_clips`.
    """
    return decode_clips(source, [start], num_frames, stride, resolution)[0]


def decode_clips(
    source: Source, starts: Sequence[int], num_frames: int, stride: int = 1, resolution: int | None = None
) -> list[np.ndarray]:
    """Several clips of one video in one pass over it.

    Args:
        source: The file.
        starts: First frame of each clip.
        num_frames: Frames per clip, F.
        stride: Distance between two frames of a clip.
        resolution: If given, frames are scaled so that the short side has this many pixels, then cropped to the
            central square; frames of that size already are not touched.

    Returns:
        For each start uint8 ``(F, H, W, 3)``.

    Raises:
        ClipTooShortError: The video ends before a clip does.
        DecodeError: The file is no video, or damaged where the clips lie, or changes its size there.
        ValueError: A start is negative, there is none, or ``num_frames`` or ``stride`` is below 1.
    """
    if not starts or min(starts) < 0 or num_frames < 1 or stride < 1:
        raise ValueError(f"no clips: starts {list(starts)}, num_frames {num_frames}, stride {stride}")
    wanted = [[start + stride * i for i in range(num_frames)] for start in starts]
    pictures = decode_frames(source, sorted({index for clip in wanted for index in clip}), resolution)
    return [crop_square(np.stack([pictures[index] for index in clip]), resolution) for clip in wanted]


def decode_frames(
    source: Source, wanted: Sequence[int], resolution: int | None = None, timing: Timing | None = None
) -> dict[int, np.ndarray]:
    """The frames of the given numbers, each uint8 ``(H, W, 3)`` of one size.

    Args:
        source: The file.
        wanted: Numbers of frames, ascending.
        resolution: If given, frames are scaled so that the short side has this many pixels.
        timing: What :func:`probe` said of the file. With it decoding starts at the last key frame before the first
            frame that is wanted rather than at the beginning. The frames are the same.

    Raises:
        ClipTooShortError: The video ends before the last one.
        DecodeError: The file is no video, or damaged where the frames lie, or changes its size there.
    """
    size = len(source) if isinstance(source, bytes) else source.size
    pictures = None
    if timing is not None and timing.step and wanted[0] > 0:
        pictures = _decode_from_key_frame(source, wanted, resolution, timing)
    if pictures is None:
        pictures, count = {}, 0
        chosen = set(wanted)
        try:
            with _open(source) as container:
                for index, frame in enumerate(container.decode(container.streams.video[0])):
                    count = index + 1
                    if index in chosen:
                        pictures[index] = _picture(frame, resolution)
                    if index == wanted[-1]:
                        break
        except (av.FFmpegError, IndexError, ValueError) as error:
            raise _failure(error, size, count) from error
        if len(pictures) < len(chosen):
            raise ClipTooShortError(f"the clip needs frame {wanted[-1]}, the video has {count} frames")
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise _error("size changes", "its frames change their size")
    return pictures


def _decode_from_key_frame(
    source: Source, wanted: Sequence[int], resolution: int | None, timing: Timing
) -> dict[int, np.ndarray] | None:
    """As :func:`decode_frames`; None if the frames cannot be told by their times, or what lies there is damaged."""
    pictures, chosen = dict[int, np.ndarray](), set(wanted)
    try:
        with _open(source) as container:
            stream = container.streams.video[0]
            container.seek(round(timing.start + wanted[0] * timing.step), stream=stream, backward=True)
            before: int | None = None
            for frame in container.decode(stream):
                if frame.pts is None:
                    return None
                index = round((frame.pts - timing.start) / timing.step)
                late = index > wanted[0] if before is None else index != before + 1
                if late or abs(timing.start + index * timing.step - frame.pts) > 1.5:
                    return None
                before = index
                if index in chosen:
                    pictures[index] = _picture(frame, resolution)
                if index == wanted[-1]:
                    return pictures
    except (av.FFmpegError, IndexError, ValueError):
        return None
    return None


def frame_times(source: Source, num_frames: int) -> np.ndarray:
    """When each of the ``num_frames`` frames is shown, in seconds after the first: float64 ``(num_frames,)``.

    Raises:
        DecodeError: The file cannot be decoded, has no times, or another number of frames.
    """
    size = len(source) if isinstance(source, bytes) else source.size
    try:
        with _open(source) as container:
            stream = container.streams.video[0]
            shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            if len(shown) != num_frames:  # some packets hold no frame that is shown
                container.seek(0, stream=stream)
                shown = [frame.pts for frame in container.decode(stream)]
            if len(shown) != num_frames or stream.time_base is None:
                raise ValueError(f"it has {len(shown)} frames, not {num_frames} as before")
            ticks = np.array(sorted(time for time in shown if time is not None), dtype=np.float64)
            if len(ticks) != num_frames:
                raise ValueError("its frames have no times")
            return (ticks - ticks[0]) * float(stream.time_base)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _failure(error, size, 0) from error


def decode_image(data: bytes, resolution: int | None = None) -> np.ndarray:
    """A PNG or JPEG picture as uint8 ``(H, W, 3)``, upright, scaled as frames are. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _error("too large", f"its picture of {image.width} x {image.height} is too large")
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt" if data else "empty"
        raise _error(kind, f"it cannot be decoded ({error})" if data else "it is empty") from error
    frame = av.VideoFrame.from_ndarray(np.asarray(upright), format="rgb24")
    return _picture(frame, resolution)


def crop_square(frames: np.ndarray, resolution: int | None, place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The square of ``resolution`` pixels out of frames uint8 ``(..., H, W, 3)``, a view; the whole if it is None.

    ``place`` says where the square lies in the room there is, from the top left (0, 0) to the bottom right (1, 1).
    """
    if resolution is None:
        return frames
    top, left = (int((have - resolution) * where) for have, where in zip(frames.shape[-3:-1], place, strict=True))
    return frames[..., top : top + resolution, left : left + resolution, :]


def _open(source: Source) -> av.container.InputContainer:
    options = {"err_detect": "explode", "format_whitelist": _CONTAINERS}
    # FFmpeg's own 32 KiB make dozens of requests of a file that is read by ranges.
    file, buffer = (io.BytesIO(source), 32768) if isinstance(source, bytes) else (source, 1 << 20)
    if not isinstance(source, bytes):
        source.seek(0)
    container = av.open(file, mode="r", options=options, buffer_size=buffer)
    if not container.streams.video:
        container.close()
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # a cut-off header; PyAV's annotations do not know it
        container.close()
        raise ValueError("its codec is not known")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        container.close()
        raise ValueError(f"its pictures of {size} are too large")
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return container


class _Scaler(threading.local):
    """One for every thread: what FFmpeg works out for a pair of sizes serves all videos of the same sizes.

    It computes in the calling thread. Left alone it starts a thread for every core of the machine, in every process,
    and handing strips of a small picture around costs more than it gains.
    """

    def __init__(self) -> None:
        self.reformat = functools.partial(av.video.reformatter.VideoReformatter().reformat, threads=1)


_scaler = _Scaler()


def _picture(frame: av.VideoFrame, resolution: int | None) -> np.ndarray:
    if resolution is None or min(frame.width, frame.height) == resolution:
        rgb = _scaler.reformat(frame, format="rgb24").to_ndarray()
    else:
        scale = resolution / min(frame.width, frame.height)
        size = (max(round(frame.width * scale), resolution), max(round(frame.height * scale), resolution))
        how = "AREA" if scale < 1 else "BICUBIC"
        rgb = _scaler.reformat(frame, width=size[0], height=size[1], format="rgb24", interpolation=how).to_ndarray()
    return np.ascontiguousarray(_upright(rgb, frame))


def _upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    quarters = frame.rotation // 90
    return np.rot90(picture, quarters) if quarters else picture


def _error(kind: str, message: str) -> DecodeError:
    error = DecodeError(message)
    error.kind = kind
    return error


def _failure(error: Exception, size: int, decoded: int) -> DecodeError:
    """What was wrong with a file of ``size`` bytes, of which ``decoded`` frames came out before."""
    if size == 0:
        return _error("empty", "it is empty")
    if isinstance(error, av.FFmpegError):
        kind = "corrupt" if decoded else "undecodable"
        after = f" after {decoded} frames" if decoded else ""
        return _error(kind, f"it cannot be decoded{after} ({error.strerror})")
    text = str(error) or "it is no video"
    kinds = {"no video stream": "no video stream", "too large": "too large", "frames, not": "changed"}
    return _error(next((kind for sign, kind in kinds.items() if sign in text), "undecodable"), text)
