"""Writes the manifest of a data set: probes all videos of a source, or draws a synthetic set or Moving MNIST.

A second run probes only new and changed videos. Beside the manifest it writes ``errors.parquet``, one row per bad
video, and ``sheet.png``, frames of randomly chosen videos.

    ardiff prepare s3://bucket/UCF-101 runs/ucf101/data --layout ucf101
    ardiff prepare --recipe moving-mnist --digits train-images-idx3-ubyte.gz --output runs/moving_mnist/data
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
import ray.data
from rich.markup import escape

from ardiff.cli import main
from ardiff.data import moving_digits, storage, synthetic_set
from ardiff.data.clips import read_clips
from ardiff.data.config import MovingDigitsConfig, SyntheticConfig
from ardiff.data.discovery import (
    describe_suffixes,
    probe_record,
    reuse_probe,
    summarize,
    summarize_captions,
    with_error,
    with_filters,
)
from ardiff.data.encode import contact_sheet
from ardiff.data.error_log import ERRORS, BadSample, ErrorLog, crashed_sample, write_errors
from ardiff.data.filters import FilterMode
from ardiff.data.layouts import LayoutName
from ardiff.data.manifest import Split, VideoRecord, read_manifest, record_of, usable, write_manifest
from ardiff.data.moving_digits import split_digits
from ardiff.data.pictures import crop
from ardiff.data.probe import Count
from ardiff.data.sources import Discovery, discover, find_tables, is_remote_folder
from ardiff.data.video_tables import VideoTable, describe_tables
from ardiff.errors import DataError
from ardiff.randomness import numpy_generator
from ardiff.resolution import Resolution
from ray_jobs.preparation.tables import write_tables
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.crash_guard import MAX_CRASHES, TASK_RETRIES, crash_guard
from ray_jobs.runtime.progress import progress_bar, remote_progress, report_errors
from ray_jobs.runtime.stages import stage

POSITIONALS = ("source", "output")
SHEET_PIXELS = 96
"""Height and width of a square picture on the sheet; other pictures have the same area."""
SAVE_SECONDS = 30.0
"""Seconds between saves of the probes, so that an interrupted run resumes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """The videos of a data set, and the folder of its manifest."""

    source: str | None = None
    """Folder or ``s3://`` prefix of videos and of folders of pictures, of tars such as WebDataset's, or of tables with
    the bytes of videos (.parquet, .arrow, .lance); one such tar or table; or a list of URIs (.txt, .csv, .parquet,
    .lance). Without it the synthetic set is drawn into the output folder."""
    output: str = "runs/data"
    """Folder of the manifest, and of the synthetic videos."""
    layout: LayoutName = "folders"
    """How the videos lie in a folder, which defines their classes and splits. docs/data.md shows each layout."""
    train_list: str | None = None
    """File that lists the training videos, one per line, instead of the splits of the layout. Needs ``test_list``."""
    test_list: str | None = None
    """File that lists the test videos. Videos on neither list are skipped."""
    test_fraction: float = 0.1
    """Share of test videos for the layout ``folders``, unless the source has train and test folders."""
    uri_column: str = "uri"
    """Column with URIs, of lists of videos."""
    video_column: str = ""
    """Column with the bytes of videos, of tables. Empty: the only one that can be."""
    caption_column: str = ""
    """Column with captions, of lists of videos, of ``metadata.csv``, ``.jsonl`` and ``.parquet`` beside the videos, and
    of ``.json`` files in tars. Empty: ``text``, ``caption`` or ``captions``."""
    frame_fps: float = 25.0
    """Frame rate of folders of pictures."""
    count: Count = "decode"
    """How frames are counted. ``decode`` decodes every video, which is exact and finds damage. ``packets`` counts the
    packets of mp4, mov, Matroska and WebM files, which is faster; docs/data.md has the differences."""
    deinterlace: FilterMode = field(default="off", metadata={"omit_default": True})
    """``auto`` deinterlaces interlaced videos whenever they are read. The manifest records it."""
    tone_map: FilterMode = field(default="off", metadata={"omit_default": True})
    """``auto`` maps HDR videos (PQ and HLG) to SDR whenever they are read. The manifest records it."""
    max_bad_fraction: float = 0.5
    """Share of the videos that may be bad. Above it the job fails, after it has written the manifest and the error
    log."""
    sheet_clips: int = 8
    """Rows of the contact sheet; 0 writes none."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Sizes of the synthetic set."""
    recipe: Literal["shapes", "moving-mnist"] = field(default="shapes", metadata={"omit_default": True})
    """What is drawn without ``source``: the synthetic set, or Moving MNIST from the images in ``digits``."""
    digits: str | None = field(default=None, metadata={"omit_default": True})
    """Images of digits for ``recipe=moving-mnist``, local or ``s3://``: an IDX file such as MNIST's
    train-images-idx3-ubyte, or a npy or npz file with one array (digits, height, width); also compressed with gzip."""
    test_digits: str | None = field(default=None, metadata={"omit_default": True})
    """Images of digits for the test videos. Without it, the last tenth of ``digits``, which then is in no training
    video."""
    moving_mnist: MovingDigitsConfig = field(default=MovingDigitsConfig(), metadata={"omit_default": True})
    """Sizes and motion of Moving MNIST."""

    def __post_init__(self) -> None:
        if (self.digits is None) != (self.recipe == "shapes") or (self.test_digits and not self.digits):
            raise ValueError("recipe=moving-mnist and digits go together, and test_digits needs both")
        if self.source is not None and self.digits is not None:
            raise ValueError("give source or digits, not both")
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        if (self.train_list is None) != (self.test_list is None):
            raise ValueError("train_list and test_list go together: give both or none")
        if self.frame_fps <= 0 or self.sheet_clips < 0 or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError("frame_fps must be above 0, sheet_clips 0 or more, max_bad_fraction between 0 and 1")

    @property
    def manifest(self) -> str:
        """URI of the manifest."""
        return storage.join(self.output, "manifest.parquet")

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns of URIs, videos and captions, as :func:`discover` and :func:`find_tables` take them."""
        return self.uri_column, self.video_column, self.caption_column


def run(config: PrepareConfig, key: str = "") -> None:
    """Writes the manifest. Raises DataError if there is no video, or too few can be decoded."""
    discovery = None if config.source is None else find_videos(config, config.source)
    with ray_cluster(), stage("prepare", config.output, key) as record:
        if discovery is None:
            records = _draw(config)
        else:
            records = _probe(config, [*discovery.records, *_write_tables(config, discovery.tables)])
        bad = [r for r in records if r.status == "error"]
        for r in bad[:5]:
            print_line(f"[yellow]bad[/] {r.uri}: {r.reason}")
        write_manifest(config.manifest, records)
        rows = [BadSample(r.uri, -1, r.error, r.reason, r.attempts) for r in bad]
        log = ErrorLog(len(records), config.max_bad_fraction, "video", rows)
        write_errors(storage.join(config.output, ERRORS), log.all_rows)
        usable(records, "train", 1)
        log.check()
        if config.sheet_clips:
            _write_sheet(config, records)
        if discovery is not None:
            print_line(summarize(records))
        good = [r for r in records if r.status == "ok"]
        classes = len({r.label for r in good})
        record.note = f"{len(good)} videos, {sum(r.num_frames for r in good)} frames, {classes} classes, {len(bad)} bad"
        if any(r.captions for r in good):
            record.note += f"; {summarize_captions(good)}"


def find_videos(config: PrepareConfig, source: str) -> Discovery:
    """The videos of ``source``, not probed yet; see :func:`ardiff.data.sources.discover`."""
    lists = None
    if config.train_list is not None and config.test_list is not None:
        lists = config.train_list, config.test_list
    discovery = discover(source, config.output, config.layout, config.test_fraction, lists, *config.columns)
    if discovery.unmatched:
        lines, examples = len(discovery.unmatched), "; ".join(discovery.unmatched[:3])
        print_line(f"[yellow]{lines} lines of the lists[/] match no video of {source}, such as {examples}")
    if discovery.ignored:
        print_line(f"[yellow]not taken:[/] {describe_suffixes(discovery.ignored)}")
    _print_omitted(discovery)
    return discovery


def _print_omitted(discovery: Discovery) -> None:
    for line in discovery.omitted:
        print_line(f"[yellow]not taken:[/] {escape(line)}")
    for line in discovery.omitted_captions:
        print_line(f"[yellow]captions:[/] {escape(line)}")


def describe_plan(config: PrepareConfig) -> str:
    """What ``--dry-run`` prints: the size of the tables whose videos are written. Remote folders are not listed."""
    tables = find_tables(config.source, config.output, *config.columns) if config.source else []
    if tables:
        return describe_tables(tables, config.output)
    if config.source and is_remote_folder(config.source):
        target = storage.join(config.output, "videos")
        return f"{config.source} is not listed: videos stay where they are, those of tables are written to {target}"
    return "nothing is copied: videos stay where they are"


def _write_tables(config: PrepareConfig, tables: list[VideoTable]) -> list[VideoRecord]:
    """Writes the videos of tables as files; their records, not probed yet."""
    if not tables:
        return []
    print_line(escape(describe_tables(tables, config.output)))
    discovery = write_tables(tables, storage.absolute(config.output), config.test_fraction)
    _print_omitted(discovery)
    return discovery.records


def _draw(config: PrepareConfig) -> list[VideoRecord]:
    """Draws the videos of the recipe on Ray."""
    sizes, write = _recipe(config)
    output = storage.absolute(config.output)
    splits: list[tuple[Split, int]] = [("train", sizes.num_train), ("test", sizes.num_test)]
    items = [{"split": split, "index": i} for split, count in splits for i in range(count)]

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        return asdict(write(output, int(row["index"]), row["split"]))

    records = []
    with progress_bar("drawing", len(items), "video") as bar:
        bar.update(0)
        for row in ray.data.from_items(items, override_num_blocks=min(32, len(items))).map(draw).iter_rows():
            records.append(record_of(row))
            bar.update(len(records))
    return records


def _recipe(config: PrepareConfig) -> tuple[SyntheticConfig | MovingDigitsConfig, Callable[..., VideoRecord]]:
    """The sizes of the set, and a function that writes a video of it: ``(root, index, split)`` to its record."""
    match config.recipe:
        case "shapes":
            return config.synthetic, partial(synthetic_set.write_video, config.synthetic)
        case "moving-mnist":
            assert config.digits is not None
            sizes, digits = config.moving_mnist, split_digits(config.moving_mnist, config.digits, config.test_digits)
            shared = {split: ray.put(images) for split, images in digits.items()}

            def write(root: str, index: int, split: Split) -> VideoRecord:
                return moving_digits.write_video(sizes, ray.get(shared[split]), root, index, split)

            return sizes, write
        case _:
            raise ValueError(f"unknown recipe {config.recipe!r}")


def _probe(config: PrepareConfig, unprobed: list[VideoRecord]) -> list[VideoRecord]:
    """Probes the videos on Ray, except those that an earlier run has probed and that have not changed."""
    interim = storage.join(config.output, "probes.parquet")
    known = _known(config.manifest) | _known(interim)
    records = {r.uri: reuse_probe(r, known.get(r.uri)) for r in unprobed}
    pending = [r for r in records.values() if not r.status]
    if reused := sum(not r.status for r in unprobed) - len(pending):
        gone = len(known.keys() - records.keys())
        print_line(f"{len(pending)} videos are new or changed, {reused} are known, {gone} are gone")
    if pending:
        with remote_progress("probing", len(pending), "video") as progress:

            def probe(row: dict[str, Any]) -> dict[str, Any]:
                record = record_of(row)
                with report_errors(progress), crash_guard(progress, record.uri) as crashes:
                    if crashes < MAX_CRASHES:
                        record = probe_record(record, config.frame_fps, config.count)
                    else:
                        record = with_error(record, crashed_sample(record.uri, -1, crashes))
                progress.add.remote(1)
                return asdict(record)

            blocks = min(max(len(pending) // 4, 1), 512)
            dataset = ray.data.from_items([asdict(r) for r in pending], override_num_blocks=blocks)
            saved = time.monotonic()
            for row in dataset.map(probe, max_retries=TASK_RETRIES).iter_rows():
                records[row["uri"]] = record_of(row)
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_manifest(interim, [r for r in records.values() if r.status])
                    saved = time.monotonic()
    storage.delete_file(interim)
    return [
        with_filters(
            replace(r, fps=config.frame_fps) if r.is_folder and r.status == "ok" else r,
            config.deinterlace,
            config.tone_map,
        )
        for r in records.values()
    ]


def _known(manifest: str) -> dict[str, VideoRecord]:
    """The records of an earlier run; none if there is no manifest or this version cannot read it."""
    if not storage.exists(manifest):
        return {}
    try:
        return {r.uri: r for r in read_manifest(manifest)}
    except DataError as error:
        print_line(f"[yellow]all videos are probed again:[/] {error}")
        return {}


def _write_sheet(config: PrepareConfig, records: list[VideoRecord]) -> None:
    """Writes evenly spaced frames of some randomly chosen videos, one row per video."""
    good = [r for r in records if r.status == "ok"]
    chosen = numpy_generator("contact sheet").permutation(len(good))[: config.sheet_clips]
    resolution = _sheet_resolution([good[i] for i in chosen])

    def draw(row: dict[str, Any]) -> list[dict[str, Any]]:
        record = record_of(row)
        frames = np.linspace(0, record.num_frames - 1, 8).round().astype(int).tolist()
        try:
            [clip] = read_clips(record, [frames], 0.0, resolution)
        except DataError:  # deleted since the probe; the manifest is what matters
            return []
        label = f"{record.class_name}/{record.uri.rstrip('/').split('/')[-1]}"[:40]
        return [{"label": label, "clip": crop(clip, resolution)}]

    rows = ray.data.from_items([asdict(good[i]) for i in chosen]).flat_map(draw).take_all()
    if missing := len(chosen) - len(rows):
        print_line(f"[yellow]{missing} videos are missing on the sheet:[/] they can no longer be read")
    if rows:
        sheet = contact_sheet(np.stack([row["clip"] for row in rows]), [row["label"] for row in rows], scale=1)
        storage.write_bytes(storage.join(config.output, "sheet.png"), sheet)


def _sheet_resolution(records: list[VideoRecord]) -> Resolution:
    """The shape of the pictures on the sheet: that of the videos if they agree, else a square; of equal area."""
    shapes = {(record.height, record.width) for record in records}
    aspect = next(width / height for height, width in shapes) if len(shapes) == 1 else 1.0
    return Resolution(max(round(SHEET_PIXELS / aspect**0.5), 1), max(round(SHEET_PIXELS * aspect**0.5), 1))


if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
