"""Clips of videos: of files or folders of pictures, local or on S3, by frame number or frame rate."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ardiff.data import storage
from ardiff.data.container import Source
from ardiff.data.decode import decode_frames, frame_times
from ardiff.data.error_log import BadSample, bad_sample
from ardiff.data.manifest import VideoRecord
from ardiff.data.pictures import IMAGE_FORMATS, crop, decode_image
from ardiff.data.probe import Count, Probe, Timing, probe
from ardiff.errors import DataError, DecodeError, StorageError
from ardiff.resolution import Resolution

IMAGE_SUFFIXES = tuple(IMAGE_FORMATS)
RANGE_BYTES = 20 * 2**20
"""Files from this size on are read by ranges if a small share of them is needed. Smaller files are read whole: one
request costs less than about six for the ranges of a clip (``benchmarks/data.py --part ranges``)."""
RANGE_SHARE = 0.25
"""The largest share of a video that counts as small."""


def probe_video(file: storage.StoredFile, count: Count = "decode") -> Probe:
    """Probes a video by decoding all of it, or a file by its packets. Raises StorageError or DecodeError."""
    if not file.uri.endswith("/"):
        return probe(_open_source(file.uri, file.size, whole=True), count)
    pictures = frame_files(file.uri)
    shapes = {_read_image(uri, None).shape for uri in pictures}
    if len(shapes) != 1:
        raise DecodeError("its pictures differ in size" if shapes else "it holds no picture", "size changes")
    [(height, width, _)] = shapes
    codec = IMAGE_FORMATS["." + pictures[0].rpartition(".")[2].lower()].lower()
    return Probe(codec, width, height, 0.0, len(pictures), 0, Timing())


def read_clip(
    video: VideoRecord, start: int, num_frames: int, stride: int, resolution: Resolution | None, fps: float = 0.0
) -> np.ndarray:
    """``num_frames`` frames from frame ``start`` on, every ``stride``-th: uint8 ``(F, H, W, 3)``.

    With ``fps``, frames are numbered at that rate. With ``resolution``, frames are scaled to cover that shape and
    cropped to its centre. Raises DataError, which names the video.
    """
    try:
        [clip] = read_clips(video, [range(start, start + num_frames * stride, stride)], fps, resolution)
    except DataError as error:
        raise DataError(f"{video.uri} cannot be decoded ({error}).") from error
    return crop(clip, resolution)


def read_clips(
    video: VideoRecord, clips: Sequence[Sequence[int]], fps: float, resolution: Resolution | None
) -> list[np.ndarray]:
    """Like :func:`read_frames`, but every clip is one array, uint8 ``(F, H, W, 3)``."""
    return [np.stack(frames) for frames in read_frames(video, clips, fps, resolution)]


def read_good_clips(
    video: VideoRecord,
    starts: Sequence[int],
    num_frames: int,
    stride: int,
    fps: float,
    resolution: Resolution,
    report: Callable[[BadSample], None],
) -> dict[int, np.ndarray]:
    """The clips at ``starts`` that can be decoded, by start: uint8 ``(F, H, W, 3)``, scaled to cover ``resolution`` and
    cropped to its centre.

    The other clips are reported. Raises StorageError if storage is unavailable.
    """
    clips: dict[int, np.ndarray] = {}
    groups = [sorted(set(starts))]
    while groups:
        group = groups.pop()
        frames = [range(start, start + num_frames * stride, stride) for start in group]
        try:
            decoded = read_clips(video, frames, fps, resolution)
        except (DecodeError, StorageError) as error:
            if len(group) > 1:  # find the bad clips
                groups += [[start] for start in group]
            else:
                report(bad_sample(video.uri, group[0], error))
            continue
        clips |= {start: crop(clip, resolution) for start, clip in zip(group, decoded, strict=True)}
    return clips


def read_frames(
    video: VideoRecord, clips: Sequence[Sequence[int]], fps: float, resolution: Resolution | None
) -> list[list[np.ndarray]]:
    """Clips of a video, given by their frame numbers; with ``fps``, by frame numbers at that rate.

    Returns:
        The frames of each clip, uint8 ``(H, W, 3)``, scaled to just cover ``resolution``, not cropped. Clips that
        overlap share frames.

    Raises:
        StorageError: The video cannot be read.
        DecodeError: The video cannot be decoded, or has changed since it was probed.
    """
    numbers = sorted({number for clip in clips for number in clip})
    if video.is_folder:
        frame_of = _at_rate(video, numbers, fps, None)
        pictures = _read_pictures(video, sorted(set(frame_of.values())), resolution)
    else:
        share = (numbers[-1] - numbers[0] + 1) / max(video.length_at(fps), 1)
        source = _open_source(video.uri, video.size, whole=share > RANGE_SHARE)
        frame_of = _at_rate(video, numbers, fps, source)
        timing = Timing(video.pts_start, video.pts_step)
        filters = video.filters.split(", ")
        pictures = decode_frames(source, sorted(set(frame_of.values())), resolution, timing, filters)
    return [[pictures[frame_of[number]] for number in clip] for clip in clips]


def frame_files(folder: str) -> list[str]:
    """The pictures directly in ``folder``, in the order of their numbers: ``2.png`` comes before ``10.png``."""
    names = [uri for uri in storage.list_files(folder, IMAGE_SUFFIXES) if "/" not in uri[len(folder) :]]
    return sorted(names, key=natural_order)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers inside names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _at_rate(video: VideoRecord, numbers: Sequence[int], fps: float, source: Source | None) -> dict[int, int]:
    """Maps frame numbers at the rate ``fps`` to the frames that are shown at those times."""
    if fps == 0 or video.fps == 0:
        return {number: number for number in numbers}
    times = np.array(numbers) / fps + 1e-6
    if source is None or video.pts_step:
        frames = np.minimum(times * video.fps, video.num_frames - 1).astype(np.int64)
    else:
        frames = np.searchsorted(frame_times(source, video.num_frames), times, side="right") - 1
    return dict(zip(numbers, frames.tolist(), strict=True))


def _open_source(uri: str, size: int, whole: bool) -> Source:
    """The file, read whole by one request or by ranges, whichever costs less."""
    by_ranges = size >= RANGE_BYTES and (not whole or size >= 8 * RANGE_BYTES)  # the latter to save memory
    return storage.RangeReader(uri, size) if by_ranges else storage.read_bytes(uri)


def _read_pictures(video: VideoRecord, frames: Sequence[int], resolution: Resolution | None) -> dict[int, np.ndarray]:
    files = frame_files(video.uri)
    if len(files) != video.num_frames:
        raise DecodeError(f"it has {len(files)} pictures, not {video.num_frames} as before", "changed")
    with ThreadPoolExecutor(8) as pool:  # the threads mostly wait for storage
        pictures = list(pool.map(lambda frame: _read_image(files[frame], resolution), frames))
    if len({picture.shape for picture in pictures}) > 1:
        raise DecodeError("its pictures differ in size", "size changes")
    return dict(zip(frames, pictures, strict=True))


def _read_image(uri: str, resolution: Resolution | None) -> np.ndarray:
    try:
        return decode_image(storage.read_bytes(uri), resolution)
    except DecodeError as error:
        raise DecodeError(f"{uri.rpartition('/')[2]}: {error}", error.kind) from error
