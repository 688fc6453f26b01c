"""Decoding videos with PyAV: what a file holds, and clips of it as arrays.

Frames are uint8 ``(F, H, W, 3)`` RGB, upright whatever rotation the file asks for.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import av.container
import av.video.reformatter
import numpy as np

from ardiff.errors import ClipTooShortError, DecodeError

# Left to guess among all formats it knows, FFmpeg takes some files of garbage for obscure kinds of video.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a video file holds, found by decoding it. Width and height are those of the upright picture."""

    codec: str
    width: int
    height: int
    fps: float
    num_frames: int


def probe(data: bytes) -> Probe:
    """Decodes the whole file and says what it holds.

    Containers lie about their length, and damage shows only when every packet is decoded strictly. Frames that an edit
    list hides are not counted, as :func:`decode_clips` does not see them. Damaged bytes that happen to be a valid
    stream stay unnoticed.

    Raises:
        DecodeError: The file is no video, is damaged, or ends before its container says it does.
    """
    missing = False
    try:
        with _open(data) as container:
            stream = container.streams.video[0]
            promised, codec, rate = stream.frames, stream.codec_context.codec.canonical_name, stream.average_rate
            count, height, width = 0, 0, 0
            for frame in container.decode(stream):
                count += 1
                if count == 1:
                    height, width = _upright(frame.to_ndarray(format="gray8"), frame).shape
            if "mp4" in container.format.name.split(","):
                # The number of frames announced includes those that an edit list hides.
                missing = any(entry.pos + entry.size > len(data) for entry in stream.index_entries)
            else:
                missing = promised > count
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DecodeError(_reason(error, data)) from error
    if missing:
        raise DecodeError(f"it is truncated: {promised} frames announced, {count} found")
    if count == 0:
        raise DecodeError("it holds no frame")
    return Probe(codec, width, height, float(rate or 0), count)


def decode_clip(data: bytes, start: int, num_frames: int, stride: int = 1, resolution: int | None = None) -> np.ndarray:
    """``num_frames`` frames from frame ``start`` on, every ``stride``-th, uint8 ``(F, H, W, 3)``.

    See :func:`decode_clips`.
    """
    return decode_clips(data, [start], num_frames, stride, resolution)[0]


def decode_clips(
    data: bytes, starts: Sequence[int], num_frames: int, stride: int = 1, resolution: int | None = None
) -> list[np.ndarray]:
    """Several clips of one video in one pass over it.

    Args:
        data: The whole file.
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
    wanted = {start + stride * i for start in starts for i in range(num_frames)}
    last, kept = max(wanted), dict[int, np.ndarray]()
    scaler = av.video.reformatter.VideoReformatter()
    try:
        with _open(data) as container:
            count = 0
            for index, frame in enumerate(_frames(container)):
                count = index + 1
                if index in wanted:
                    kept[index] = _picture(frame, resolution, scaler)
                if index == last:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DecodeError(_reason(error, data)) from error
    if len(kept) < len(wanted):
        raise ClipTooShortError(f"the clip needs frame {last}, the video has {count} frames")
    if len({picture.shape for picture in kept.values()}) > 1:
        raise DecodeError("its frames change their size")
    return [np.stack([kept[start + stride * i] for i in range(num_frames)]) for start in starts]


def _open(data: bytes) -> av.container.InputContainer:
    options = {"err_detect": "explode", "format_whitelist": _CONTAINERS}
    container = av.open(io.BytesIO(data), mode="r", options=options)
    if not container.streams.video:
        container.close()
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "explode"}
    return container


def _frames(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    yield from container.decode(container.streams.video[0])


def _picture(frame: av.VideoFrame, resolution: int | None, scaler: av.video.reformatter.VideoReformatter) -> np.ndarray:
    if resolution is None or min(frame.width, frame.height) == resolution:
        rgb = scaler.reformat(frame, format="rgb24").to_ndarray()
    else:
        scale = resolution / min(frame.width, frame.height)
        size = (max(round(frame.width * scale), resolution), max(round(frame.height * scale), resolution))
        how = "AREA" if scale < 1 else "BICUBIC"
        rgb = scaler.reformat(frame, width=size[0], height=size[1], format="rgb24", interpolation=how).to_ndarray()
    if resolution is not None:
        top, left = (rgb.shape[0] - resolution) // 2, (rgb.shape[1] - resolution) // 2
        rgb = rgb[top : top + resolution, left : left + resolution]
    return np.ascontiguousarray(_upright(rgb, frame))


def _upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(picture, frame.rotation // 90)


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "it is empty"
    if isinstance(error, av.FFmpegError):
        return f"it cannot be decoded ({error.strerror})"
    return str(error) or "it is no video"
