"""Records of videos: which files are a video, its class and split, its probe, and a summary of all."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ardiff.data.clips import IMAGE_SUFFIXES, natural_order, probe_video
from ardiff.data.error_log import BadSample, bad_sample
from ardiff.data.filters import REMEDIES, FilterMode, filters_for
from ardiff.data.layouts import Assignment
from ardiff.data.manifest import VIDEO_SUFFIXES, VideoRecord
from ardiff.data.probe import Count
from ardiff.data.storage import StoredFile
from ardiff.errors import DataError

PROBE_AGAIN = ("unreadable", "crashed")
"""Kinds of error that may not occur again in the next run."""

WARNINGS = {
    "interlaced": "moving edges are combs of lines; deinterlace=auto removes them",
    "hdr": "colours look pale; tone_map=auto maps them to SDR",
}
"""What the warnings of a probe mean, and what to do."""


def unprobed_record(video: StoredFile, assignment: Assignment | None, captions: tuple[str, ...] = ()) -> VideoRecord:
    """The record of a video of which only the class, the split and the captions are known."""
    name, label, split = assignment or ("", 0, "train")
    status, reason, error = "", "", ""
    if assignment is None:
        status, reason = "skipped", "it belongs to no split of this data set"
    elif video.problem:
        status, reason, error = "error", video.problem, "unreadable"
    fields = (label, name, split, status, reason, error)
    return VideoRecord(video.uri, video.size, "", 0, 0, 0.0, 0, *fields, etag=video.etag, captions=captions)


def group_files(source: str, files: Sequence[StoredFile]) -> list[StoredFile]:
    """The videos among the files below ``source``, sorted by name.

    A folder of pictures is one video: its name ends with a slash and its etag is a hash over all pictures. Pictures in
    a folder that also holds video files, directly or deeper, are ignored: they are posters and the like.
    """
    prefix = len(source.rstrip("/")) + 1
    videos = [file for file in files if file.uri.lower().endswith(VIDEO_SUFFIXES)]
    video_folders = {folder for file in videos for folder in _parents(file.uri)}
    folders = defaultdict[str, list[StoredFile]](list)
    for file in files:
        if file.uri.lower().endswith(IMAGE_SUFFIXES) and "/" in file.uri[prefix:]:
            folders[file.uri.rpartition("/")[0] + "/"].append(file)
    for folder in folders.keys() - video_folders:
        pictures = sorted(folders[folder], key=lambda file: natural_order(file.uri))
        content = "".join(f"{p.uri[len(folder) :]}\0{p.size}\0{p.etag}\0" for p in pictures)
        etag = hashlib.sha256(content.encode()).hexdigest()[:32]
        bad = next((f"{p.uri[len(folder) :]}: {p.problem}" for p in pictures if p.problem), "")
        videos.append(StoredFile(folder, sum(p.size for p in pictures), etag, bad))
    return sorted(videos, key=lambda file: file.uri)


def ignored_suffixes(source: str, files: Sequence[StoredFile], videos: Sequence[StoredFile]) -> Counter[str]:
    """The files that belong to none of the videos found in them, counted by suffix; empty for names without one."""
    names = {video.uri for video in videos}

    def is_used(file: StoredFile) -> bool:
        folder = file.uri.rpartition("/")[0] + "/"
        return file.uri in names or (folder in names and file.uri.lower().endswith(IMAGE_SUFFIXES))

    return Counter(suffix_of(file.uri) for file in files if not is_used(file))


def suffix_of(uri: str) -> str:
    """The suffix of a name, in lower case and with the dot; empty if it has none."""
    name = uri.rpartition("/")[2].lower()
    return f".{name.rpartition('.')[2]}" if "." in name else ""


def describe_suffixes(suffixes: Counter[str]) -> str:
    """Such as ``3 files (2 .txt, 1 without a suffix)``."""
    parts = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(10))
    more = f", and {len(suffixes) - 10} other suffixes" if len(suffixes) > 10 else ""
    return f"{suffixes.total()} files ({parts}{more})"


def _parents(uri: str) -> list[str]:
    return [uri[: i + 1] for i, letter in enumerate(uri) if letter == "/"]


def reuse_probe(record: VideoRecord, known: VideoRecord | None) -> VideoRecord:
    """The record with the probe of an earlier run, unless the video has changed or could not be read then."""
    if known is None or record.status or known.status not in ("ok", "error") or known.error in PROBE_AGAIN:
        return record
    if (known.size, known.etag) != (record.size, record.etag):
        return record
    current = {name: getattr(record, name) for name in ("label", "class_name", "split", "captions")}
    return replace(known, **current)


def probe_record(record: VideoRecord, frame_fps: float, count: Count = "decode") -> VideoRecord:
    """The record with what a probe finds; ``frame_fps`` is the rate of folders of pictures, and ``count`` as in
    :func:`ardiff.data.probe.probe`.

    Raises StorageError if storage is unavailable.
    """
    try:
        probe = probe_video(StoredFile(record.uri, record.size, record.etag), count)
    except DataError as error:
        return with_error(record, bad_sample(record.uri, -1, error))
    return replace(
        record,
        codec=probe.codec,
        width=probe.width,
        height=probe.height,
        fps=frame_fps if record.is_folder else probe.fps,
        num_frames=probe.num_frames,
        rotation=probe.rotation,
        pts_start=probe.timing.start,
        pts_step=probe.timing.step,
        pixel_aspect=probe.pixel_aspect,
        warnings=", ".join(probe.warnings),
        status="ok",
    )


def with_filters(record: VideoRecord, deinterlace: FilterMode, tone_map: FilterMode) -> VideoRecord:
    """The record of a video that is filtered when it is read, if its probe warned and the filter is not off."""
    names = filters_for(filter(None, record.warnings.split(", ")), deinterlace, tone_map)
    return replace(record, filters=", ".join(names))


def with_error(record: VideoRecord, sample: BadSample) -> VideoRecord:
    """The record of a video that cannot be used."""
    return replace(record, status="error", reason=sample.message, error=sample.error, attempts=sample.attempts)


def summarize(records: Sequence[VideoRecord]) -> str:
    """A table of the data set by split, and a line for every kind of error."""
    rows = [["", "videos", "classes", "frames", "hours", "frames/video", "size", "frames/s", "codecs"]]
    for split in ("train", "test"):
        videos = [r for r in records if r.status == "ok" and r.split == split]
        if not videos:
            continue
        frames = [r.num_frames for r in videos]
        hours = sum(r.num_frames / r.fps for r in videos if r.fps) / 3600
        sizes = Counter(f"{r.width}x{r.height}" for r in videos)
        codecs = ", ".join(name for name, _ in Counter(r.codec for r in videos).most_common())
        counts = (f"{n}" for n in (len(videos), len({r.label for r in videos}), sum(frames)))
        rates = _range([round(r.fps, 2) for r in videos])
        rows.append([split, *counts, f"{hours:.2f}", _range(frames), _most_common(sizes), rates, codecs])
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    for status in ("error", "skipped"):
        kinds = Counter(r.error or r.reason for r in records if r.status == status)
        lines += [f"{status}: {count} {kind}" for kind, count in kinds.most_common()]
    good = [r for r in records if r.status == "ok"]
    found = Counter((name, REMEDIES[name] in r.filters) for r in good for name in r.warnings.split(", ") if name)
    for (name, is_filtered), count in found.most_common():
        lines.append(
            f"{REMEDIES[name]}: {count} {name}" if is_filtered else f"warning: {count} {name}: {WARNINGS[name]}"
        )
    lines.append(summarize_captions(good))
    return "\n".join(line.rstrip() for line in lines)


def summarize_captions(records: Sequence[VideoRecord]) -> str:
    """How many of the videos have captions, and how many captions there are."""
    without = sum(not r.captions for r in records)
    if without == len(records):
        return "captions: none"
    count = sum(len(r.captions) for r in records)
    return f"captions: {count}, of {len(records) - without} videos; {without} videos have none"


def _most_common(sizes: Counter[str]) -> str:
    [(size, _)] = sizes.most_common(1)
    return size if len(sizes) == 1 else f"{size} and {len(sizes) - 1} others"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
