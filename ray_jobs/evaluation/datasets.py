"""The videos of an evaluation: a manifest, or a folder or S3 prefix, and the clips that are taken of them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.data

from ardiff.data import storage
from ardiff.data.discovery import group_files, probe_record, unprobed_record
from ardiff.data.layouts import Assignment
from ardiff.data.manifest import VIDEO_SUFFIXES, Split, VideoRecord, read_manifest, usable
from ardiff.data.storage import StoredFile
from ardiff.errors import ConfigError, DataError
from ardiff.randomness import numpy_generator
from ray_jobs.evaluation.features import Clip
from ray_jobs.runtime.progress import progress_bar


@dataclass(frozen=True, slots=True)
class Listed:
    """What lies at a place before any video is opened."""

    uri: str
    records: list[VideoRecord] | None
    """Rows of a manifest; None for a folder."""
    videos: list[StoredFile]
    """Videos of a folder: files, and folders of pictures."""

    @property
    def name(self) -> str:
        """What the set is called: the folder, or the folder of the manifest."""
        parts = self.uri.rstrip("/").split("/")
        return parts[-1] if self.records is None or len(parts) < 2 else parts[-2]

    def split(self, asked: Split) -> str:
        """What a protocol records as the split: folders have none."""
        return "folder" if self.records is None else asked


def locate(uri: str) -> Listed:
    """Looks at a place. Raises DataError if it is neither a manifest nor a folder of videos."""
    if uri.endswith(".parquet"):
        return Listed(uri, read_manifest(uri), [])
    if not storage.exists(uri):
        raise DataError(f"There is no manifest or folder of videos {uri}: check the path.")
    folder = storage.absolute(uri)
    videos = group_files(folder, storage.list_objects(folder))
    if not videos:
        raise DataError(
            f"There is no video in {uri} ({', '.join(VIDEO_SUFFIXES)} and folders of pictures are looked for)."
        )
    return Listed(uri, None, videos)


def open_videos(listed: Listed, split: Split, min_frames: int, fps: float = 0.0) -> list[VideoRecord]:
    """The usable videos: those of the manifest's split, or all of the folder, which are probed on Ray.

    With ``fps`` they have ``min_frames`` frames at that rate.

    Raises:
        DataError: None is left.
    """
    if listed.records is not None:
        return usable(listed.records, split, min_frames, fps)
    rows = [asdict(unprobed_record(video, Assignment("video", 0, split))) for video in listed.videos]
    blocks = min(max(len(rows) // 4, 1), 512)
    records: list[VideoRecord] = []
    with progress_bar(f"probing {listed.name}", len(rows), "video") as bar:
        for row in ray.data.from_items(rows, override_num_blocks=blocks).map(_probe, num_cpus=0.5).iter_rows():
            records.append(VideoRecord(**row))
            bar.update(len(records))
    bad = [r for r in records if r.status != "ok"]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(records)} videos in {listed.uri} cannot be decoded, the first is {bad[0].uri} "
            f"({bad[0].reason}): remove or mend them, they would be missing from the score."
        )
    return usable(records, split, min_frames, fps)


def _probe(row: dict[str, Any]) -> dict[str, Any]:
    return asdict(probe_record(VideoRecord(**row), frame_fps=0.0))


def real_clips(
    records: list[VideoRecord], count: int, span: int, stride: int, seed: int, fps: float = 0.0
) -> list[Clip]:
    """``count`` clips at random places: every video once, then, if there are too few, other places of the same ones."""
    clips = []
    for index in range(count):
        record = records[index % len(records)]
        start = numpy_generator("evaluation clip", seed, index).integers(record.length_at(fps) - span + 1)
        clips.append(Clip(record, int(start), stride, fps=fps))
    return clips


def fake_clips(listed: Listed, records: list[VideoRecord], count: int, num_frames: int, start: int = 0) -> list[Clip]:
    """The first ``count`` videos from frame ``start`` on. Raises DataError if there are fewer."""
    if len(records) < count:
        raise DataError(
            f"{listed.uri} has {len(records)} videos of {num_frames} frames, but {count} are to be "
            "scored: generate more, or lower num_clips (for all sets that are to be compared)."
        )
    return [Clip(record, start, 1) for record in records[:count]]


def paired_clips(listed: Listed, fake: list[Clip], real: Listed, originals: list[VideoRecord]) -> list[Clip]:
    """Each clip with the original of the same name: its path below the set's folder, without the ending.

    Raises:
        DataError: A video has no original.
    """
    by_name = dict(zip(_names([r.uri for r in originals]), originals, strict=True))
    pairs = []
    for name, clip in zip(_names([c.video.uri for c in fake]), fake, strict=True):
        if name not in by_name:
            raise DataError(
                f"{clip.video.uri} of {listed.uri} has no original called '{name}' in {real.uri}: psnr, ssim and lpips "
                "compare videos of the same name."
            )
        pairs.append(replace(clip, original=by_name[name]))
    return pairs


def _names(uris: list[str]) -> list[str]:
    uris = [uri.rstrip("/") for uri in uris]
    folders = [uri.split("/")[:-1] for uri in uris]
    common = 0
    while all(len(f) > common and f[common] == folders[0][common] for f in folders):
        common += 1
    return [str(Path("/".join(uri.split("/")[common:])).with_suffix("")) for uri in uris]


def common_size(records: list[VideoRecord], resolution: int | None) -> str:
    """Height x width of the compared videos. Raises ConfigError if they differ and ``resolution`` is not given."""
    if resolution is not None:
        return f"{resolution}x{resolution}"
    sizes = sorted({(r.height, r.width) for r in records})
    if len(sizes) > 1:
        shown = " and ".join(f"{w}x{h}" for h, w in sizes[:3])
        raise ConfigError(
            f"The videos have different sizes ({shown}): give --resolution to scale and crop them to one."
        )
    return f"{sizes[0][0]}x{sizes[0][1]}"


def codecs(records: list[VideoRecord]) -> str:
    """Names of the codecs of the files."""
    return "+".join(sorted({r.codec for r in records}))
