"""Single pictures: decoded frames and image files as upright RGB arrays, scaled and cropped."""

import functools
import io
import threading

import av
import av.video.reformatter
import numpy as np
from PIL import Image, ImageOps

from ardiff.data.container import MAX_PIXELS
from ardiff.errors import DecodeError


def decode_image(data: bytes, resolution: int | None = None) -> np.ndarray:
    """A PNG or JPEG picture as uint8 ``(H, W, 3)``, upright, scaled like frames. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"its picture of {image.width} x {image.height} is too large", "too large")
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt" if data else "empty"
        raise DecodeError(f"it cannot be decoded ({error})" if data else "it is empty", kind) from error
    return to_rgb(av.VideoFrame.from_ndarray(np.asarray(upright), format="rgb24"), resolution)


class _Scaler(threading.local):
    """A scaler per thread, which reuses FFmpeg's tables for videos of the same sizes.

    It computes in the calling thread. By default it would start one thread per core in every process, and sharing a
    small picture among threads costs more than it gains.
    """

    def __init__(self) -> None:
        self.reformat = functools.partial(av.video.reformatter.VideoReformatter().reformat, threads=1)


_scaler = _Scaler()


def to_rgb(frame: av.VideoFrame, resolution: int | None) -> np.ndarray:
    """The frame as uint8 ``(H, W, 3)``, upright, its short side scaled to ``resolution`` pixels if given."""
    if resolution is None or min(frame.width, frame.height) == resolution:
        rgb = _scaler.reformat(frame, format="rgb24").to_ndarray()
    else:
        scale = resolution / min(frame.width, frame.height)
        width, height = (max(round(side * scale), resolution) for side in (frame.width, frame.height))
        interpolation = "AREA" if scale < 1 else "BICUBIC"
        rgb = _scaler.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=interpolation
        ).to_ndarray()
    return np.ascontiguousarray(turn_upright(rgb, frame))


def turn_upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns a picture ``(H, W, ...)`` by the frame's rotation."""
    quarters = frame.rotation // 90
    return np.rot90(picture, quarters) if quarters else picture


def crop_square(frames: np.ndarray, resolution: int | None, position: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A square of ``resolution`` pixels of frames uint8 ``(..., H, W, 3)``, as a view; the whole frames if it is None.

    ``position`` is the position of the square, from the top left (0, 0) to the bottom right (1, 1).
    """
    if resolution is None:
        return frames
    top, left = (int((side - resolution) * p) for side, p in zip(frames.shape[-3:-1], position, strict=True))
    return frames[..., top : top + resolution, left : left + resolution, :]
