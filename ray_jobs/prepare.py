"""Makes the manifest of a data set: probes all videos of a folder or S3 prefix, or draws the synthetic set.

A video that was probed before and has not changed since is not read again. Beside the manifest lie ``errors.parquet``,
one row per file that cannot be used, and ``sheet.png``, frames of videos chosen at random.

    ardiff prepare s3://bucket/UCF-101 runs/ucf101/data --recipe ucf101
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import ray.data

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.clips import probe_video, read_clips
from ardiff.data.decode import crop_square
from ardiff.data.encode import contact_sheet
from ardiff.data.error_log import ERRORS, BadClip, Quarantine, bad_clip, crashed, write_errors
from ardiff.data.layouts import Recipe, arrange, numbered, says_splits, split_by_lists, videos_of
from ardiff.data.manifest import (
    VIDEO_SUFFIXES,
    Split,
    VideoRecord,
    read_manifest,
    usable,
    write_manifest,
)
from ardiff.data.storage import StoredFile
from ardiff.data.synthetic import SyntheticConfig, write_video
from ardiff.errors import DataError
from ardiff.randomness import numpy_generator
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.crash_guard import MAX_CRASHES, TASK_RETRIES, crash_guard
from ray_jobs.runtime.progress import progress_bar, remote_progress, report_errors
from ray_jobs.runtime.stages import stage

POSITIONALS = ("source", "output")
SAVE_EVERY = 30.0
"""Seconds after which what was probed so far is stored, so that an interrupted run need not begin again."""
TRIED_AGAIN = ("unreadable", "crashed")
"""Kinds of error that the next run may not meet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Where the videos are, and where their manifest goes."""

    source: str | None = None
    """Folder or ``s3://`` prefix of videos and of folders of pictures; without one the synthetic set is drawn into the
    output folder."""
    output: str = "runs/data"
    """Folder of the manifest, and of the synthetic videos."""
    recipe: Recipe = "folders"
    """How the videos lie in the source, which says their classes and splits; docs/data.md shows each layout."""
    train_list: str | None = None
    """File that names the training videos, one a line, in place of what the recipe says; needs ``test_list``."""
    test_list: str | None = None
    """File that names the test videos. Videos on neither list are marked as skipped."""
    test_fraction: float = 0.1
    """Share of videos held out by recipe ``folders``, unless the source has train and test folders."""
    frame_fps: float = 25.0
    """Frames per second of folders of pictures, which do not say it."""
    max_bad_fraction: float = 0.5
    """Share of the videos that may be bad. Beyond it the job fails, after manifest and errors are written."""
    sheet_clips: int = 8
    """Rows of the contact sheet; 0 makes none."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Sizes of the synthetic set."""

    def __post_init__(self) -> None:
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        if (self.train_list is None) != (self.test_list is None):
            raise ValueError("train_list and test_list go together: give both or none")
        if self.frame_fps <= 0 or self.sheet_clips < 0 or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError("frame_fps must be above 0, sheet_clips 0 or more, max_bad_fraction between 0 and 1")

    @property
    def manifest(self) -> str:
        """Where the manifest is written."""
        return storage.join(self.output, "manifest.parquet")


def run(config: PrepareConfig, key: str = "") -> None:
    """Writes the manifest. Raises DataError if there is no video, or too few that can be decoded."""
    found = None if config.source is None else _find(config, config.source)
    with ray_cluster(), stage("prepare", config.output, key) as record:
        records = _draw(config) if found is None else _probe(config, found)
        bad = [r for r in records if r.status == "error"]
        for r in bad[:5]:
            print_line(f"[yellow]bad[/] {r.uri}: {r.reason}")
        write_manifest(config.manifest, records)
        quarantine = Quarantine(len(records), config.max_bad_fraction, "video", map(_bad_row, bad))
        write_errors(storage.join(config.output, ERRORS), quarantine.rows.values())
        usable(records, "train", 1)
        quarantine.check()
        if config.sheet_clips:
            _write_sheet(config, records)
        if found is not None:
            print_line(_summary(records))
        good = [r for r in records if r.status == "ok"]
        classes = len({r.label for r in good})
        record.note = f"{len(good)} videos, {sum(r.num_frames for r in good)} frames, {classes} classes, {len(bad)} bad"


def _draw(config: PrepareConfig) -> list[VideoRecord]:
    synthetic, output = config.synthetic, storage.absolute(config.output)
    splits: list[tuple[Split, int]] = [("train", synthetic.num_train), ("test", synthetic.num_test)]
    todo = [{"split": split, "index": i} for split, count in splits for i in range(count)]

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        return asdict(write_video(synthetic, output, int(row["index"]), row["split"]))

    return _records(ray.data.from_items(todo, override_num_blocks=min(32, len(todo))).map(draw), len(todo), "drawing")


def _find(config: PrepareConfig, source: str) -> list[VideoRecord]:
    """The videos below ``source``, with class and split, not probed yet. Raises DataError if there is none."""
    source = storage.absolute(source)
    prefix = len(source.rstrip("/")) + 1
    own = storage.absolute(config.output).rstrip("/") + "/"  # what an earlier run has left there is no part of the set
    files = [f for f in storage.list_objects(source) if own == f"{source.rstrip('/')}/" or not f.uri.startswith(own)]
    videos = videos_of(source, files)
    if not videos:
        raise DataError(
            f"There is no video in {source} ({', '.join(VIDEO_SUFFIXES)} and folders of pictures are looked for)."
        )
    names = [video.uri[prefix:] for video in videos]
    lists = {f.uri[prefix:]: storage.read_bytes(f.uri) for f in files if says_splits(config.recipe, f.uri[prefix:])}
    places = arrange(config.recipe, names, lists, config.test_fraction)
    if config.train_list is not None and config.test_list is not None:
        lines = storage.read_bytes(config.train_list), storage.read_bytes(config.test_list)
        listed, unknown = split_by_lists(names, *lines)
        if unknown:
            some = "; ".join(unknown[:3])
            print_line(f"[yellow]{len(unknown)} lines of the lists[/] name no video of {source}, as {some}")
        places = numbered([p and s and (p[0], s) for p, s in zip(places, listed, strict=True)])
    if config.recipe == "folders" and config.train_list is None and len({p[2] for p in places if p}) == 1:
        places = _hold_out(places)
    return [unprobed(video, place) for video, place in zip(videos, places, strict=True)]


def unprobed(video: StoredFile, place: tuple[str, int, Split] | None) -> VideoRecord:
    """The record of a video of which only the place is known: class name, class index and split."""
    name, label, split = place or ("", 0, "train")
    status, reason = ("", "") if place else ("skipped", "it belongs to no split of this data set")
    return VideoRecord(video.uri, video.size, "", 0, 0, 0.0, 0, label, name, split, status, reason, etag=video.etag)


def _hold_out(places: list[tuple[str, int, Split] | None]) -> list[tuple[str, int, Split] | None]:
    """Makes the last video of a one-sided small set the other side, so that both splits have one."""
    *rest, last = places
    assert last is not None
    name, label, split = last
    other: Split = "test" if split == "train" else "train"
    return [*rest, (name, label, other)]


def _probe(config: PrepareConfig, found: list[VideoRecord]) -> list[VideoRecord]:
    """The records with what is known of the videos: from an earlier run if they have not changed, else by a probe."""
    interim = storage.join(config.output, "probes.parquet")
    known = _known(config.manifest) | _known(interim)
    records = {r.uri: _reused(r, known.get(r.uri)) for r in found}
    todo = [r for r in records.values() if not r.status]
    if len(todo) < len(found):
        gone = len(known.keys() - records.keys())
        print_line(f"{len(todo)} videos are new or changed, {len(found) - len(todo)} are known, {gone} are gone")
    if todo:
        with remote_progress("probing", len(todo), "video") as progress:

            def probe_row(row: dict[str, Any]) -> dict[str, Any]:
                record = VideoRecord(**row)
                with report_errors(progress), crash_guard(progress, record.uri) as crashes:
                    if crashes < MAX_CRASHES:
                        record = probed(record, config.frame_fps)  # an error only if storage is away
                    else:
                        record = _with_error(record, crashed(record.uri, -1, crashes))
                progress.add.remote(1)
                return asdict(record)

            blocks = min(max(len(todo) // 4, 1), 512)
            listed = ray.data.from_items([asdict(r) for r in todo], override_num_blocks=blocks)
            rows = listed.map(probe_row, max_retries=TASK_RETRIES)
            saved = time.monotonic()
            for row in rows.iter_rows():
                records[row["uri"]] = VideoRecord(**row)
                if time.monotonic() - saved > SAVE_EVERY:
                    write_manifest(interim, [r for r in records.values() if r.status])
                    saved = time.monotonic()
    storage.delete_file(interim)
    return [replace(r, fps=config.frame_fps) if r.is_folder and r.status == "ok" else r for r in records.values()]


def _known(manifest: str) -> dict[str, VideoRecord]:
    """The records of an earlier run, if there are any that this version can read."""
    if not storage.exists(manifest):
        return {}
    try:
        return {r.uri: r for r in read_manifest(manifest)}
    except DataError as error:
        print_line(f"[yellow]all videos are probed again:[/] {error}")
        return {}


def _reused(record: VideoRecord, known: VideoRecord | None) -> VideoRecord:
    """The record with what an earlier run found out, unless the video has changed or could not be read then."""
    if known is None or record.status or known.status not in ("ok", "error") or known.error in TRIED_AGAIN:
        return record
    if (known.size, known.etag) != (record.size, record.etag):
        return record
    return replace(known, label=record.label, class_name=record.class_name, split=record.split)


def probed(record: VideoRecord, frame_fps: float) -> VideoRecord:
    """The record with what a probe says of the video. Raises StorageError if storage is away."""
    try:
        found = probe_video(StoredFile(record.uri, record.size, record.etag))
    except DataError as error:
        return _with_error(record, bad_clip(record.uri, -1, error))
    return replace(
        record,
        codec=found.codec,
        width=found.width,
        height=found.height,
        fps=frame_fps if record.is_folder else found.fps,
        num_frames=found.num_frames,
        rotation=found.rotation,
        pts_start=found.timing.start,
        pts_step=found.timing.step,
        status="ok",
    )


def _with_error(record: VideoRecord, bad: BadClip) -> VideoRecord:
    return replace(record, status="error", reason=bad.message, error=bad.error, attempts=bad.attempts)


def _bad_row(record: VideoRecord) -> BadClip:
    return BadClip(record.uri, -1, record.error, record.reason, record.attempts)


def _write_sheet(config: PrepareConfig, records: list[VideoRecord]) -> None:
    """Frames along some videos chosen at random, one row each."""
    good = [r for r in records if r.status == "ok"]
    chosen = numpy_generator("contact sheet").permutation(len(good))[: config.sheet_clips]

    def draw(row: dict[str, Any]) -> list[dict[str, Any]]:
        record = VideoRecord(**row)
        moments = np.linspace(0, record.num_frames - 1, 8).round().astype(int).tolist()
        try:
            [clip] = read_clips(record, [moments], 0.0, 96)
        except DataError:  # gone since it was probed: the manifest is what counts
            return []
        label = f"{record.class_name}/{record.uri.rstrip('/').split('/')[-1]}"[:40]
        return [{"label": label, "clip": crop_square(clip, 96)}]

    rows = ray.data.from_items([asdict(good[i]) for i in chosen]).flat_map(draw).take_all()
    if len(rows) < len(chosen):
        print_line(
            f"[yellow]{len(chosen) - len(rows)} videos are missing on the sheet:[/] they cannot be read any more"
        )
    if rows:
        sheet = contact_sheet(np.stack([row["clip"] for row in rows]), [row["label"] for row in rows], scale=1)
        storage.write_bytes(storage.join(config.output, "sheet.png"), sheet)


def _summary(records: list[VideoRecord]) -> str:
    """A table of what the set consists of, by split; and of what is wrong with the rest."""
    rows = [["", "videos", "classes", "frames", "hours", "frames/video", "size", "frames/s", "codecs"]]
    for split in ("train", "test"):
        mine = [r for r in records if r.status == "ok" and r.split == split]
        if not mine:
            continue
        frames = [r.num_frames for r in mine]
        hours = sum(r.num_frames / r.fps for r in mine if r.fps) / 3600
        sizes = Counter(f"{r.width}x{r.height}" for r in mine)
        codecs = ", ".join(name for name, _ in Counter(r.codec for r in mine).most_common())
        counts = (f"{n}" for n in (len(mine), len({r.label for r in mine}), sum(frames)))
        rates = _range(sorted({round(r.fps, 2) for r in mine}))
        rows.append([split, *counts, f"{hours:.2f}", _range(sorted(set(frames))), _most_common(sizes), rates, codecs])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for status in ("error", "skipped"):
        kinds = Counter(r.error or r.reason for r in records if r.status == status)
        lines += [f"{status}: {count} {kind}" for kind, count in kinds.most_common()]
    return "\n".join(line.rstrip() for line in lines)


def _most_common(sizes: Counter[str]) -> str:
    [(size, _)] = sizes.most_common(1)
    return size if len(sizes) == 1 else f"{size} and {len(sizes) - 1} others"


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _records(dataset: ray.data.Dataset, total: int, what: str) -> list[VideoRecord]:
    records = []
    with progress_bar(what, total, "video") as bar:
        bar.update(0)
        for row in dataset.iter_rows():
            records.append(VideoRecord(**row))
            bar.update(len(records))
    return records


if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
