"""Moving MNIST (Srivastava et al. 2015): digits that move through a square frame and bounce off its edges.

Every video is a function of (digits, seed, split, index). Nothing is unpickled.

Shapes: N digits of S x S pixels, F frames of H x H pixels.
"""

import gzip
import io
import math
import zipfile
import zlib

import numpy as np
from einops import rearrange, repeat
from PIL import Image

from ardiff.data import storage
from ardiff.data.config import MovingDigitsConfig
from ardiff.data.manifest import Split, VideoRecord
from ardiff.data.synthetic_set import store_video
from ardiff.errors import DataError
from ardiff.randomness import numpy_generator

MAX_BYTES = 2**30
"""The largest content of a file of digits, uncompressed."""
MAX_SIDE = 512
"""The largest height and width of a digit, in pixels."""
IDX_IMAGES = b"\0\0\x08\x03"
"""How an IDX file of bytes in three dimensions begins."""
CLASS = "digits"
"""The only class of the videos."""


def read_digits(uri: str, side: int) -> np.ndarray:
    """The digits of a file as uint8 ``(N, S, S)``, with S = ``side``.

    Args:
        uri: An IDX file of images, as MNIST's, or a npy or npz file with one array of numbers ``(N, height, width)``;
            each may be compressed with gzip. Numbers other than uint8 are scaled so that the largest becomes 255.
        side: Pixels; digits of another size are scaled.

    Raises:
        DataError: The file is missing, too large, or holds no digits.
    """
    if not storage.exists(uri):
        raise DataError(f"There is no file of digits {uri}: check the path.")
    _check_size(uri, storage.size(uri))
    data = storage.read_bytes(uri)
    if data.startswith(b"\x1f\x8b"):
        data = _decompress(uri, data)
    digits = _idx(uri, data) if data.startswith(IDX_IMAGES) else _array(uri, data)
    if digits.ndim != 3 or not np.issubdtype(digits.dtype, np.number) or np.iscomplexobj(digits) or not digits.size:
        raise DataError(f"{uri} holds {digits.dtype} {digits.shape}: digits are numbers (digits, height, width).")
    if max(digits.shape[1:]) > MAX_SIDE:
        raise DataError(f"{uri} has digits of {digits.shape[1]}x{digits.shape[2]} pixels, more than {MAX_SIDE} a side.")
    if digits.dtype != np.uint8:
        digits = _to_uint8(uri, digits)
    if digits.shape[1:] == (side, side):
        return digits
    scaled = [Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC) for digit in digits]
    return np.stack([np.asarray(digit) for digit in scaled])


def split_digits(config: MovingDigitsConfig, digits: str, test_digits: str | None) -> dict[Split, np.ndarray]:
    """The digits of each split, uint8 ``(N, S, S)``: those of two files, or the last tenth of one for testing.

    Raises:
        DataError: A file holds no digits, or too few for both splits.
    """
    train = read_digits(digits, config.digit_side)
    if test_digits is not None:
        return {"train": train, "test": read_digits(test_digits, config.digit_side)}
    test_count = math.ceil(len(train) / 10)
    if test_count == len(train):
        raise DataError(f"{digits} holds one digit: both splits need digits of their own.")
    return {"train": train[:-test_count], "test": train[-test_count:]}


def trajectory(config: MovingDigitsConfig, generator: np.random.Generator) -> np.ndarray:
    """The upper left corner of a digit in each frame, y and x in whole pixels, int64 ``(F, 2)``.

    Position and direction are uniform, the speed is constant. A digit that would pass an edge stops at it and turns
    around, as in the published generation.
    """
    position, angle = generator.uniform(size=2), generator.uniform(0.0, 2.0 * np.pi)
    step = config.speed * np.array([np.sin(angle), np.cos(angle)])
    positions = []
    for _ in range(config.num_frames):
        position = position + step
        step = np.where((position <= 0.0) | (position >= 1.0), -step, step)
        position = position.clip(0.0, 1.0)
        positions.append(position)
    free = config.frame_side - config.digit_side
    return np.floor(np.stack(positions) * free).astype(np.int64)


def render(config: MovingDigitsConfig, digits: np.ndarray, index: int, split: Split) -> np.ndarray:
    """Video ``index`` of ``split``, uint8 ``(F, H, H, 3)``. Where digits overlap, the brighter pixel counts."""
    generator = numpy_generator("moving digits", config.seed, split, index)
    chosen = digits[generator.integers(len(digits), size=config.digits_per_video)]
    side = config.frame_side
    frames = np.zeros((config.num_frames, side, side), np.uint8)
    for digit in chosen:
        for frame, (y, x) in zip(frames, trajectory(config, generator), strict=True):
            window = frame[y : y + len(digit), x : x + len(digit)]
            np.maximum(window, digit, out=window)
    return repeat(frames, "f h w -> f h w c", c=3)


def write_video(config: MovingDigitsConfig, digits: np.ndarray, root: str, index: int, split: Split) -> VideoRecord:
    """Encodes video ``index`` as H.264 to ``root/<split>/digits/<split>_<index>.mp4`` and returns its record.

    The file has no loss but that of the conversion to the video's luma, less than one of 255 levels on average.
    """
    frames = render(config, digits, index, split)
    return store_video(frames, root, index, split, CLASS, config.fps, crf=0)


def _check_size(uri: str, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{uri} has more than {MAX_BYTES / 2**30:.0f} GiB of data: take fewer digits.")


def _decompress(uri: str, data: bytes) -> bytes:
    """The content of a gzip file. Raises DataError if it is damaged or larger than ``MAX_BYTES``."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{uri} cannot be decompressed ({error}): copy it again.") from error
    _check_size(uri, len(content))
    return content


def _idx(uri: str, data: bytes) -> np.ndarray:
    """The images of an IDX file, uint8 ``(N, height, width)``."""
    header = len(IDX_IMAGES) + 12
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if len(data) != header + math.prod(shape):
        raise DataError(f"{uri} should have {header + math.prod(shape)} bytes, but has {len(data)}: copy it again.")
    return rearrange(np.frombuffer(data, np.uint8, offset=header), "(n h w) -> n h w", n=shape[0], h=shape[1])


def _array(uri: str, data: bytes) -> np.ndarray:
    """The only array of a npy or npz file."""
    try:
        content = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            _check_size(uri, sum(member.file_size for member in content.zip.infolist()))
            if len(content.files) == 1:
                only: np.ndarray = content[content.files[0]]
                return only
            names = ", ".join(content.files[:5])
    except (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{uri} is neither an IDX file of images nor an array that can be read without pickle ({error})."
        ) from error
    raise DataError(f"{uri} holds the arrays {names or 'none'}: save the digits alone, as a npy file.")


def _to_uint8(uri: str, digits: np.ndarray) -> np.ndarray:
    low, high = digits.min(), digits.max()
    if not (np.isfinite([low, high]).all() and low >= 0 and high > 0):
        raise DataError(f"{uri} has values from {low} to {high}: pixels are finite, from 0 for the background.")
    return np.round(digits * (255.0 / high)).astype(np.uint8)
