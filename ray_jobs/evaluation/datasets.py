"""Evaluation datasets: the videos of a manifest, a folder or an S3 prefix, and the clips taken from them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.data

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.discovery import group_files, probe_record, unprobed_record, with_filters
from ardiff.data.filters import FilterMode
from ardiff.data.layouts import with_labels
from ardiff.data.manifest import VIDEO_SUFFIXES, Split, VideoRecord, read_manifest, record_of, usable, write_manifest
from ardiff.data.members import unpacked
from ardiff.data.storage import StoredFile
from ardiff.errors import ConfigError, DataError
from ardiff.metrics.arrays import SUFFIXES, list_array_videos
from ardiff.metrics.choice import draw, halves
from ardiff.randomness import numpy_generator
from ardiff.resolution import Resolution
from ray_jobs.evaluation.config import ScoredClips
from ray_jobs.evaluation.frames import Fit
from ray_jobs.runtime.progress import progress_bar


@dataclass(frozen=True, slots=True)
class Clip:
    """The frames of a video that make a clip."""

    video: VideoRecord
    start: int
    stride: int
    original: VideoRecord | None = None
    """The video that this one is compared with, frame by frame."""
    fps: float = 0.0
    """Frame rate at which start and stride count; 0 for the video's own."""
    fit: Fit = "crop"
    """How frames become square."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The list of a dataset's videos, before any video is opened."""

    uri: str
    records: list[VideoRecord] | None
    """Rows of a manifest, or the videos of array files; None for a folder of other videos."""
    videos: list[StoredFile]
    """Videos of a folder: files, and folders of pictures."""

    @property
    def name(self) -> str:
        """The name of the folder, or of the manifest's folder."""
        parts = self.uri.rstrip("/").split("/")
        return parts[-2] if self.is_manifest and len(parts) > 1 else parts[-1]

    def split_name(self, split: Split) -> str:
        """The split that a protocol records; ``folder`` for a folder, which has no splits."""
        return split if self.is_manifest else "folder"

    @property
    def is_manifest(self) -> bool:
        """Whether it is a manifest, which has splits."""
        return self.uri.endswith(".parquet")


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """A dataset with the records of its usable videos."""

    dataset: Dataset
    records: list[VideoRecord]

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.dataset.name


def list_videos(uri: str) -> Dataset:
    """Lists the videos of a manifest, a folder or an array file. Raises DataError if ``uri`` is none of them."""
    if uri.endswith(".parquet"):
        return Dataset(uri, read_manifest(uri), [])
    if not storage.exists(uri):
        raise DataError(f"There is no manifest or folder of videos {uri}: check the path.")
    folder = storage.absolute(uri)
    files = [storage.find_file(folder)] if uri.lower().endswith(SUFFIXES) else storage.list_objects(folder)
    videos = group_files(folder, files)
    arrays = [file for file in files if file.uri.lower().endswith(SUFFIXES)]
    if arrays and videos:
        raise DataError(
            f"{uri} has {len(arrays)} array files or GIFs, such as {arrays[0].uri}, beside {len(videos)} videos of "
            "other kinds: keep them in folders of their own."
        )
    if arrays:
        return Dataset(uri, [record for file in arrays for record in list_array_videos(file, "test")], [])
    if not videos:
        raise DataError(
            f"There is no video in {uri}: videos are {', '.join(VIDEO_SUFFIXES + SUFFIXES)} files and folders of "
            "pictures."
        )
    return Dataset(uri, None, videos)


@dataclass(frozen=True, slots=True)
class ProbeCache:
    """Records of folders that were probed before."""

    folder: str | None = None
    """Folder or ``s3://`` prefix; None keeps nothing."""
    join_cluster: Callable[[], None] = lambda: None
    """Called before videos are probed on Ray."""

    def read(self, dataset: Dataset) -> list[VideoRecord] | None:
        """The records of a folder, unless one of its files has changed."""
        file = self._file(dataset)
        return read_manifest(file) if file is not None and storage.exists(file) else None

    def write(self, dataset: Dataset, records: list[VideoRecord]) -> None:
        """Keeps the records."""
        if (file := self._file(dataset)) is not None:
            write_manifest(file, records)

    def _file(self, dataset: Dataset) -> str | None:
        if self.folder is None:
            return None
        key = fingerprint([[video.uri, video.size, video.etag] for video in dataset.videos])
        return storage.join(self.folder, "probes", f"{key}.parquet")


NO_CACHE = ProbeCache()


def open_videos(
    dataset: Dataset,
    split: Split,
    min_frames: int,
    fps: float = 0.0,
    cache: ProbeCache = NO_CACHE,
    filters: tuple[FilterMode, FilterMode] = ("off", "off"),
) -> OpenDataset:
    """Finds the usable videos: those of the manifest's split, or all of a folder, which are probed on Ray.

    ``filters`` are whether videos of a folder are deinterlaced and tone mapped; a manifest says so itself.

    Raises:
        DataError: No video has ``min_frames`` frames, counted at ``fps`` if given, or a video of a folder is damaged.
    """
    records = _records(dataset, split, cache)
    if not dataset.is_manifest:
        records = [with_filters(replace(record, split=split), *filters) for record in records]
    return OpenDataset(dataset, usable(records, split, min_frames, fps))


def open_generated(dataset: Dataset, num_frames: int, cache: ProbeCache = NO_CACHE) -> OpenDataset:
    """All videos of a generated set. None may be missing: those that a model makes badly count.

    Raises:
        DataError: A video is damaged or shorter than ``num_frames``.
    """
    records = _records(dataset, "test", cache)
    _raise_if_damaged(dataset, records)
    short = [r for r in records if r.num_frames < num_frames]
    if short and len(short) < len(records):
        raise DataError(
            f"{len(short)} of {len(records)} videos in {dataset.uri} have fewer than {num_frames} frames, the first is "
            f"{short[0].uri} ({short[0].num_frames}): generate them again, or lower --frames. The score would leave "
            "them out."
        )
    return OpenDataset(dataset, usable(records, "test", num_frames))


def check_count(dataset: Dataset, count: int) -> None:
    """Raises DataError if a generated set lists fewer than ``count`` videos. No video is opened."""
    listed = len(dataset.videos) if dataset.records is None else len(dataset.records)
    if listed < count:
        raise DataError(
            f"{dataset.uri} has {listed} videos, but num_clips is {count}: generate more videos, or lower num_clips "
            "for all sets that you compare."
        )


def _records(dataset: Dataset, split: Split, cache: ProbeCache) -> list[VideoRecord]:
    """The records of a manifest or of array files, or those of a folder's videos, which are probed."""
    return _probed(dataset, split, cache) if dataset.records is None else dataset.records


def _probed(dataset: Dataset, split: Split, cache: ProbeCache) -> list[VideoRecord]:
    """The records of a folder's videos, probed on Ray. A video's class is the folder that it lies in."""
    if (known := cache.read(dataset)) is not None:
        return [replace(record, split=split) for record in known]
    cache.join_cluster()
    root = len(storage.absolute(dataset.uri).rstrip("/")) + 1
    folders = [video.uri.rstrip("/")[root:].rpartition("/")[0] or "video" for video in dataset.videos]
    assigned = with_labels([(folder, split) for folder in folders])
    rows = [asdict(unprobed_record(video, a)) for video, a in zip(dataset.videos, assigned, strict=True)]
    blocks = min(max(len(rows) // 4, 1), 512)
    records: list[VideoRecord] = []
    with progress_bar(f"probing {dataset.name}", len(rows), "video") as bar:
        for row in ray.data.from_items(rows, override_num_blocks=blocks).map(_probe, num_cpus=0.5).iter_rows():
            records.append(record_of(row))
            bar.update(len(records))
    _raise_if_damaged(dataset, records)
    cache.write(dataset, records)
    return records


def _raise_if_damaged(dataset: Dataset, records: list[VideoRecord]) -> None:
    bad = [r for r in records if r.status != "ok"]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(records)} videos in {dataset.uri} cannot be decoded, the first is {bad[0].uri} "
            f"({bad[0].reason}): remove or repair them, the score would leave them out."
        )


def _probe(row: dict[str, Any]) -> dict[str, Any]:
    return asdict(probe_record(record_of(row), frame_fps=0.0))


def real_clips(
    records: list[VideoRecord], count: int, config: ScoredClips, num_frames: int | None = None
) -> list[Clip]:
    """``count`` clips of videos drawn at random, balanced over classes, that start at random frames.

    There is one clip per video, and further ones only if there are fewer videos than clips. ``num_frames`` overrides
    the configuration's.
    """
    return _random_clips(draw(*_names_and_classes(records), config.seed, "real"), records, count, config, num_frames)


def two_draws(records: list[VideoRecord], count: int, config: ScoredClips) -> tuple[list[Clip], list[Clip]]:
    """Two exchangeable draws of ``count`` real clips. They share no video if there are ``2 count`` videos."""
    if len(records) >= 2 * count:
        orders = halves(*_names_and_classes(records), config.seed)
        first, second = (
            _random_clips(order, records, count, config, first=i * count) for i, order in enumerate(orders)
        )
        return first, second
    clips = real_clips(records, 2 * count, config)
    return clips[:count], clips[count:]


def _random_clips(
    order: list[int],
    records: list[VideoRecord],
    count: int,
    config: ScoredClips,
    num_frames: int | None = None,
    first: int = 0,
) -> list[Clip]:
    """Clips of the records in the given order, again from its beginning if it ends. ``first`` is the first's number."""
    span = config.span if num_frames is None else (num_frames - 1) * config.stride + 1
    clips = []
    for index in range(count):
        record = records[order[index % len(order)]]
        latest = record.length_at(config.fps) - span
        start = numpy_generator("evaluation clip", config.seed, first + index).integers(latest + 1)
        clips.append(Clip(record, int(start), config.stride, fps=config.fps, fit=config.fit))
    return clips


def generated_clips(generated: OpenDataset, config: ScoredClips, start: int = 0) -> list[Clip]:
    """``num_clips`` videos, drawn at random and balanced over classes, from frame ``start`` on.

    Raises:
        DataError: There are fewer videos.
    """
    records = generated.records
    if len(records) < config.num_clips:
        raise DataError(
            f"{generated.dataset.uri} has {len(records)} videos of {config.num_frames} frames, but num_clips is "
            f"{config.num_clips}: generate more videos, or lower num_clips for all sets that you compare."
        )
    order = draw(*_names_and_classes(records), config.seed, "generated")
    return [Clip(records[i], start, 1, fit=config.fit) for i in order[: config.num_clips]]


def _names_and_classes(records: list[VideoRecord]) -> tuple[list[str], list[int]]:
    return [r.uri for r in records], [r.label for r in records]


def frame_rates(clips: list[Clip]) -> list[float]:
    """Frames a second of each clip; 0 if its video has no rate."""
    return [(clip.fps or clip.video.fps) / clip.stride if clip.video.fps else 0.0 for clip in clips]


def paired_clips(uri: str, clips: list[Clip], real: OpenDataset) -> list[Clip]:
    """The clips with their originals. An original has the same path below its dataset's folder, without the suffix.

    Raises:
        DataError: A video has no original.
    """
    by_name = dict(zip(_names([r.uri for r in real.records]), real.records, strict=True))
    pairs = []
    for name, clip in zip(_names([c.video.uri for c in clips]), clips, strict=True):
        if name not in by_name:
            raise DataError(
                f"{clip.video.uri} of {uri} has no original called '{name}' in {real.dataset.uri}: "
                "paired metrics compare videos of the same name."
            )
        pairs.append(replace(clip, original=by_name[name]))
    return pairs


def _names(uris: list[str]) -> list[str]:
    """The paths below the deepest common folder, without suffix."""
    uris = [unpacked(uri).rstrip("/") for uri in uris]
    folders = [uri.split("/")[:-1] for uri in uris]
    common = 0
    while all(len(f) > common and f[common] == folders[0][common] for f in folders):
        common += 1
    return [str(Path("/".join(uri.split("/")[common:])).with_suffix("")) for uri in uris]


def common_size(records: list[VideoRecord], resolution: Resolution | None) -> str:
    """Height x width of all videos. Raises ConfigError if they differ and no ``resolution`` is given."""
    if resolution is not None:
        return str(resolution)
    sizes = sorted({(r.height, r.width) for r in records})
    if len(sizes) > 1:
        shown = " and ".join(f"{h}x{w}" for h, w in sizes[:3])
        raise ConfigError(
            f"The videos have different sizes ({shown}, height x width): give --resolution to scale and crop them to "
            "one."
        )
    return str(Resolution(*sizes[0]))


def codecs(records: list[VideoRecord]) -> str:
    """The codecs of the files, joined by +."""
    return "+".join(sorted({r.codec for r in records}))
