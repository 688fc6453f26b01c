"""Encoding of videos, contact sheets and tiled videos. Frames are uint8 RGB."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

VideoCodec = Literal["h264", "vp9", "av1"]
_ENCODERS = {
    # With mbtree, x264's AVX-512 code reads past the rows of narrow pictures. The bytes there change a few percent of
    # videos.
    "h264": ("libx264", "mp4", {"preset": "medium", "bf": "0", "x264-params": "mbtree=0"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "good", "cpu-used": "4", "b": "0"}),
    "av1": ("libsvtav1", "mp4", {"preset": "8", "svtav1-params": "lp=1"}),
}


@contextlib.contextmanager
def keep_scheduling() -> Iterator[None]:
    """Restores this thread's scheduling policy after an encoder is opened.

    SVT-AV1, run by root, gives the thread that opens it a real-time policy (SCHED_FIFO), which its children inherit.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def file_suffix(codec: VideoCodec) -> str:
    """The file name extension of videos that :func:`encode_video` makes with ``codec``."""
    return _ENCODERS[codec][1]


def encode_video(frames: np.ndarray, fps: float, codec: VideoCodec = "h264", crf: int = 18) -> bytes:
    """Encodes ``frames`` uint8 ``(F, H, W, 3)`` as 4:2:0 video, which every browser plays.

    One thread. Equal frames give equal bytes on equal machines. Other processors may give other bytes, so a video is
    identified by a hash of its frames, not of its file. Odd heights and widths are padded by repeating the last row or
    column. ``h264`` and ``av1`` are written as mp4, ``vp9`` as webm. A smaller ``crf`` means better and larger files.

    Raises:
        ValueError: The frames have another shape or dtype, there are none, or ``fps`` is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (F, H, W, 3) with F >= 1, got {frames.dtype} {frames.shape}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    encoder, container_format, options = _ENCODERS[codec]
    buffer = io.BytesIO()
    # Without bitexact, WebM files contain random identifiers.
    with (
        keep_scheduling(),
        av.open(buffer, "w", format=container_format, container_options={"fflags": "+bitexact"}) as container,
    ):
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        stream.options = {**options, "crf": str(crf)}
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def reencode_mpeg4(frames: np.ndarray, fps: int = 25) -> np.ndarray:
    """Encodes and decodes ``frames`` uint8 ``(F, H, W, 3)`` with MPEG-4 part 2 (``mp4v``), as metric scripts do.

    64 bits per pixel, more than the finest quantiser needs, a key frame every 12 frames, 4:2:0, one thread. Keeps the
    shape.

    Raises:
        ValueError: The frames have another shape or dtype, or there are none.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (F, H, W, 3) with F >= 1, got {frames.dtype} {frames.shape}")
    count, height, width = frames.shape[:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
        stream.bit_rate, stream.gop_size = min(64 * fps * padded.shape[1] * padded.shape[2], 2**30), 12
        stream.codec_context.thread_count = 1
        for picture in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r", format="mp4") as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == count
    return np.stack(decoded)[:, :height, :width]


def contact_sheet(
    videos: np.ndarray, row_labels: Sequence[str] | None = None, max_frames: int = 16, scale: int = 2, gap: int = 2
) -> bytes:
    """A PNG with one row per video, showing evenly spaced frames.

    Args:
        videos: uint8 ``(B, F, H, W, 3)``.
        row_labels: Text to the left of each row.
        max_frames: Most frames per video.
        scale: Integer enlargement, without smoothing.
        gap: Pixels between pictures.
    """
    videos = enlarge(
        videos[:, np.linspace(0, videos.shape[1] - 1, min(videos.shape[1], max_frames)).round().astype(int)], scale
    )
    rows, columns, height, width = videos.shape[:4]
    font = ImageFont.load_default(size=min(14, max(10, height // 3)))
    margin = 0 if row_labels is None else int(max(font.getlength(text) for text in row_labels)) + 12
    sheet = Image.new("RGB", (margin + columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = row * (height + gap)
        for column in range(columns):
            sheet.paste(Image.fromarray(videos[row, column]), (margin + column * (width + gap), top))
        if row_labels is not None:
            draw.text((6, top + height // 2), row_labels[row], fill="black", font=font, anchor="lm")
    return _image_bytes(sheet, "PNG")


def tile(videos: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """All videos in one grid, with white gaps: uint8 ``(B, F, H, W, 3) -> (F, H', W', 3)``."""
    videos = enlarge(videos, scale)
    missing = -len(videos) % columns
    videos = np.concatenate([videos, np.full((missing, *videos.shape[1:]), 255, np.uint8)])
    padded = np.pad(videos, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return rearrange(padded, "(r c) f h w k -> f (r h) (c w) k", c=columns)[:, :-gap, :-gap]


def to_gif(frames: np.ndarray, fps: float) -> bytes:
    """``frames`` uint8 ``(F, H, W, 3)`` as a GIF that repeats forever."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def enlarge(videos: np.ndarray, scale: int) -> np.ndarray:
    """Repeats pixels: ``(..., H, W, 3) -> (..., scale H, scale W, 3)``."""
    return videos.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _image_bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
