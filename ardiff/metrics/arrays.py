"""Videos and features in array files: npy and npz, GIF as videos, Parquet as features. Nothing is unpickled.

A video in an array file has the URI ``FILE#/NAME`` with its number, or in an npz with the array's name.

Shapes: V videos, F frames, H W pixels, k rows of D features per video.
"""

import functools
import io
import zipfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ardiff.data import storage
from ardiff.data.manifest import Split, VideoRecord
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError, DecodeError

SUFFIXES = (".npy", ".npz", ".gif")
"""Files of videos."""
MAX_BYTES = 8 * 2**30
"""The largest content of a file, uncompressed."""
SEPARATOR = "#/"


def is_array_video(uri: str) -> bool:
    """Whether the video is in an array file."""
    return SEPARATOR in uri


def list_array_videos(file: StoredFile, split: Split) -> list[VideoRecord]:
    """The videos of a file. Raises DataError if it holds no videos, uint8 ``(V, F, H, W, 3)`` or ``(F, H, W, 3)``."""
    _load_videos.cache_clear()  # the file may have changed
    codec = "gif" if file.uri.lower().endswith(".gif") else "raw"
    records = []
    for name, video in _load_videos(file.uri).items():
        frames, height, width, _ = video.shape
        uri = f"{file.uri}{SEPARATOR}{name}"
        record = VideoRecord(uri, file.size, codec, width, height, 0.0, frames, 0, "video", split, "ok", "")
        records.append(replace(record, etag=file.etag))
    return records


def read_array_clip(uri: str, numbers: range) -> np.ndarray:
    """The frames ``numbers`` of a video in an array file, uint8 ``(F, H, W, 3)``. Raises DataError."""
    file, _, name = uri.partition(SEPARATOR)
    videos = _load_videos(file)
    if name not in videos or numbers[-1] >= len(videos[name]):
        raise DataError(f"{uri} has no {numbers[-1] + 1} frames any more: list the videos again.")
    return np.ascontiguousarray(videos[name][numbers.start : numbers.stop : numbers.step])


def read_features(uri: str) -> np.ndarray:
    """Features of videos from anywhere, as floats ``(V, k, D)``; k is 1 in arrays ``(V, D)``.

    An npz has one array or one called ``features``. A Parquet file has a column ``features`` of lists, one row a video.

    Raises:
        DataError: The file holds no such features.
    """
    if uri.lower().endswith(".parquet"):
        try:
            column = pq.read_table(io.BytesIO(_read(uri)), columns=["features"])["features"]
            features = np.stack([np.asarray(row, dtype=np.float64) for row in column.to_pylist()])
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{uri} has no column 'features' with lists of numbers of one length: {error}.") from error
    else:
        arrays = _arrays(uri)
        if "features" not in arrays and len(arrays) != 1:
            raise DataError(f"{uri} has the arrays {', '.join(arrays) or 'none'}: call the features 'features'.")
        features = arrays["features"] if "features" in arrays else next(iter(arrays.values()))
    if features.ndim not in (2, 3) or not np.issubdtype(features.dtype, np.floating) or 0 in features.shape:
        raise DataError(
            f"{uri} holds {features.dtype} {features.shape}: features are floats (videos, D) or (videos, frames, D)."
        )
    if not np.isfinite(features).all():
        raise DataError(f"{uri} holds NaN or infinity: compute the features again.")
    return features if features.ndim == 3 else features[:, None]


@functools.lru_cache(maxsize=1)
def _load_videos(uri: str) -> dict[str, np.ndarray]:
    """The videos of a file by name, uint8 ``(F, H, W, 3)`` each. The last file stays in memory."""
    arrays = {"0": _gif(uri)} if uri.lower().endswith(".gif") else _arrays(uri)
    videos: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
            raise DataError(
                f"{uri} holds {array.dtype} {array.shape}: videos are uint8 (frames, height, width, 3), or several of "
                "them."
            )
        if array.ndim == 4:
            videos[name] = array
        else:
            videos |= {f"{name}-{i:06d}" if len(arrays) > 1 else f"{i:06d}": video for i, video in enumerate(array)}
    return videos


def _arrays(uri: str) -> dict[str, np.ndarray]:
    """The arrays of an npy or npz file by name. Raises DataError."""
    data = _read(uri)
    try:
        if uri.lower().endswith(".npz"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                _check_size(uri, sum(member.file_size for member in archive.infolist()))
            with np.load(io.BytesIO(data), allow_pickle=False) as content:
                arrays = {name: content[name] for name in sorted(content.files)}
        else:
            arrays = {"0": np.load(io.BytesIO(data), allow_pickle=False)}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds something else than arrays, or has the suffix of another format")
        return arrays
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{uri} cannot be read as arrays without pickle: {error}.") from error


def _gif(uri: str) -> np.ndarray:
    """The frames of a GIF."""
    try:
        with Image.open(io.BytesIO(_read(uri)), formats=["GIF"]) as image:
            count = getattr(image, "n_frames", 1)
            _check_size(uri, count * image.width * image.height * 3)
            frames = []
            for number in range(count):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{uri} cannot be decoded ({error})") from error
    return np.stack(frames)


def _read(uri: str) -> bytes:
    _check_size(uri, storage.size(uri))
    return storage.read_bytes(uri)


def _check_size(uri: str, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{uri} has {size / 2**30:.1f} GiB of data, more than {MAX_BYTES / 2**30:.0f}: split it.")
