"""Single pictures: decoded frames and image files as upright RGB arrays of square pixels, scaled and cropped."""

import functools
import io
import threading
from fractions import Fraction
from typing import NamedTuple

import av
import av.video.reformatter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from PIL import Image, ImageOps

from ardiff.data.container import MAX_PIXELS
from ardiff.data.tone_mapping import HLG, PQ, tone_map
from ardiff.errors import DecodeError
from ardiff.resolution import Resolution

IMAGE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Suffixes of pictures, and the formats that Pillow may take them for."""
MAX_ASPECT = 16
"""The largest ratio of the sides of a picture. Scaled to cover a frame, a narrower one would need much memory."""
HDR_TRANSFERS = (PQ, HLG)
"""Transfer characteristics of HDR frames."""
_NEARLY_SQUARE = 0.01


def decode_image(data: bytes, resolution: Resolution | None = None) -> np.ndarray:
    """A picture as uint8 ``(H, W, 3)``, upright, scaled like frames. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=sorted(set(IMAGE_FORMATS.values()))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"its picture of {image.width} x {image.height} is too large", "too large")
            check_aspect(image.width, image.height)
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt" if data else "empty"
        raise DecodeError(f"it cannot be decoded ({error})" if data else "it is empty", kind) from error
    return to_rgb(av.VideoFrame.from_ndarray(np.asarray(upright), format="rgb24"), resolution)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits scaled to 8 bits, which Pillow would clip; others as they are."""
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its values have more than 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def check_aspect(width: int, height: int) -> None:
    """Raises DecodeError if one side is more than MAX_ASPECT times the other."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError(f"its pictures of {width} x {height} are narrower than 1:{MAX_ASPECT}", "too narrow")


class _Scaler(threading.local):
    """A scaler per thread, which reuses FFmpeg's tables for videos of the same sizes.

    It computes in the calling thread. By default it would start one thread per core in every process, and sharing a
    small picture among threads costs more than it gains.
    """

    def __init__(self) -> None:
        self.reformat = functools.partial(av.video.reformatter.VideoReformatter().reformat, threads=1)


_scaler = _Scaler()


def check_convertible(frame: av.VideoFrame) -> None:
    """Raises ValueError if FFmpeg cannot convert this kind of pixels."""
    _scaler.reformat(frame, width=16, height=16, format="rgb24")


def to_rgb(
    frame: av.VideoFrame, resolution: Resolution | None, pixel_aspect: float = 1.0, tone_mapping: bool = False
) -> np.ndarray:
    """The frame as uint8 ``(H, W, 3)``, upright, scaled to just cover ``resolution`` if given.

    ``pixel_aspect`` is the width of a stored pixel divided by its height. With ``tone_mapping``, HDR frames become SDR,
    after scaling; other frames stay as they are. Raises ValueError if the primaries of an HDR frame are not supported.
    """
    is_mapped = tone_mapping and int(frame.color_trc) in HDR_TRANSFERS
    kind = "rgb48le" if is_mapped else "rgb24"
    width, height = square_pixels(frame.width, frame.height, pixel_aspect)
    turn, scale = orientation(frame), 1.0
    if resolution is not None:
        stored = resolution.turned if turn.quarters % 2 else resolution
        scale, width, height = stored.covering(width, height)
    if (width, height) == (frame.width, frame.height) and scale == 1.0:
        rgb = _scaler.reformat(frame, format=kind).to_ndarray()
    else:
        interpolation = "AREA" if scale < 1 else "BICUBIC"
        rgb = _scaler.reformat(frame, width=width, height=height, format=kind, interpolation=interpolation).to_ndarray()
    if is_mapped:
        rgb = tone_map(rgb, int(frame.color_trc), int(frame.color_primaries))
    return np.ascontiguousarray(turn.apply(rgb))


def pixel_aspect_of(stream: av.VideoStream) -> float:
    """Width of a stored pixel divided by its height. 1 if the file does not say, or says nearly 1.

    Encoders write ratios such as 640:639 after they have rounded a size.
    """
    ratio = stream.sample_aspect_ratio or Fraction(1)
    return 1.0 if ratio <= 0 or abs(ratio - 1) <= _NEARLY_SQUARE else float(ratio)


def square_pixels(width: int, height: int, pixel_aspect: float) -> tuple[int, int]:
    """The size of a picture whose pixels are made square. No side shrinks."""
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


class Orientation(NamedTuple):
    """How a stored picture is turned to stand upright."""

    mirrored: bool
    """Whether it is mirrored left to right, first."""
    quarters: int
    """Counter-clockwise turns by 90 degrees, 0 to 3."""

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turns a picture ``(H, W, ...)``; the result is a view."""
        if self.mirrored:
            picture = picture[:, ::-1]
        return np.rot90(picture, self.quarters) if self.quarters else picture


def orientation(frame: av.VideoFrame) -> Orientation:
    """The orientation nearest to the frame's display matrix (ISO/IEC 14496-12, 6.2.2).

    Matrices that are degenerate leave the picture as it is.
    """
    # Frame.side_data would keep the frame in a cycle of references, and so its memory until Python collects garbage.
    data = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # not in PyAV's annotations
    if data is None:
        return Orientation(False, 0)
    return _nearest_orientation(bytes(data))


@functools.lru_cache(maxsize=64)
def _nearest_orientation(matrix: bytes) -> Orientation:
    """From nine native 32-bit integers ``a b u, c d v, x y w``: points ``(x, y)``, y downwards, as row vectors."""
    linear = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(np.float64)
    scales = np.hypot(linear[0], linear[1])
    if not scales.all() or np.linalg.det(linear / scales) == 0:
        return Orientation(False, 0)
    quarter, mirror = np.array([[0.0, -1.0], [1.0, 0.0]]), np.diag([-1.0, 1.0])
    candidates = [Orientation(mirrored, quarters) for mirrored in (False, True) for quarters in range(4)]

    def similarity(candidate: Orientation) -> float:
        turned = np.linalg.matrix_power(quarter, candidate.quarters)
        return float(np.sum((mirror @ turned if candidate.mirrored else turned) * linear / scales))

    return max(candidates, key=similarity)


def crop(frames: np.ndarray, resolution: Resolution | None, position: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A region of ``resolution`` of frames uint8 ``(..., H, W, 3)``, as a view; the whole frames if it is None.

    ``position`` is the position of the region, from the top left (0, 0) to the bottom right (1, 1).
    """
    if resolution is None:
        return frames
    (height, width), (y, x) = resolution, position
    top, left = int((frames.shape[-3] - height) * y), int((frames.shape[-2] - width) * x)
    return frames[..., top : top + height, left : left + width, :]


def crop_square(frames: np.ndarray) -> np.ndarray:
    """The largest central square of frames uint8 ``(..., H, W, 3)``, as a view."""
    return crop(frames, Resolution.square(min(frames.shape[-3:-1])))
