"""Generates a grid of videos in one job, scores every cell of it and writes a page about it.

A video depends on its row of the grid only: neither the number of actors, nor packs, nor a restart change a bit of it.
The same command makes what is missing and leaves alone what is complete.

    python -m ray_jobs.sweep configs/quickstart/sweep.yaml --evaluate
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from rich.markup import escape

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.encode import VideoCodec
from ardiff.data.manifest import write_manifest
from ardiff.errors import ArdiffError, ConfigError
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.params import SamplingMode
from ardiff.sweep.grid import Cell, GridConfig, Storing, cells_of, labels_of, rows_of
from ardiff.sweep.models import SweptModel
from ardiff.sweep.packs import record_failure
from ardiff.sweep.rows import Record, VideoRow, find_complete, in_parallel, video_record, write_rows
from ardiff.sweep.summary import CellScore, CellSummary, aligned, failure_table, label, summarise
from ray_jobs import evaluate, evaluate_quick
from ray_jobs.evaluation.config import EvaluateConfig, QuickConfig
from ray_jobs.generation.actors import Workers, make_videos
from ray_jobs.reports.sweep import write_sweep_report
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import record_run, stage

CONFIG_FIRST = True
ScoringT = TypeVar("ScoringT", EvaluateConfig, QuickConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Which videos to make, with what, and how to score them."""

    grid: GridConfig = field(default_factory=GridConfig)
    """Every combination of its values is a video."""
    output: str = "runs/sweep"
    """Folder of the videos, their records and manifest, the scores and the report, local or s3://."""
    mode: SamplingMode = "window"
    """``window``, ``full`` (the same videos, slowly), or ``rolling`` (for models trained with a band mask)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights, and of the arithmetic in the models."""
    keep_latents: bool = False
    """Also store each video's latents, as safetensors."""
    evaluate: Literal["none", "published", "quick"] = "none"
    """Score every cell that has enough videos against ``real``: by a published protocol as ``scores`` says, or by the
    quick evaluation as ``quick`` says."""
    real: str | None = None
    """Real videos: a manifest, a folder or an ``s3://`` prefix."""
    scores: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How ``evaluate=published`` scores cells. The sweep sets its ``real``, ``fake`` and ``output``."""
    quick: QuickConfig = field(default_factory=QuickConfig)
    """How ``evaluate=quick`` scores cells. The sweep sets its ``real``, ``fake`` and ``output``."""
    fps: float = 8.0
    """Frames per second of the files."""
    codec: VideoCodec = "h264"
    """Codec of the files."""
    crf: int = 8
    """Quality of the files; smaller is better."""
    batch_size: int = 16
    """Videos of a cell that an actor makes together; halved where they do not fit."""
    min_actors: int = 1
    """Generating actors to begin with; more are started up to ``max_actors`` as long as there is work and room."""
    max_actors: int = 1
    """Generating actors at most."""
    cpu_threads: int = 1
    """Threads of an actor, which is also the CPUs it asks Ray for."""
    gpus_per_actor: float = 1.0
    """GPUs that an actor reserves, where there are any; fractions let several share one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs where there are some."""
    attempts: int = 2
    """How often a video that fails alone is tried before it is recorded as failed."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Limits and ways of computing of the sampling engine."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.min_actors, self.cpu_threads, self.attempts) < 1:
            raise ValueError("batch_size, min_actors, cpu_threads and attempts must be at least 1")
        if self.max_actors < self.min_actors or not self.gpus_per_actor > 0 or not self.fps > 0:
            raise ValueError("max_actors must be at least min_actors, gpus_per_actor and fps positive")
        if self.evaluate != "none" and self.real is None:
            raise ValueError("evaluate needs real videos: give real=MANIFEST_OR_FOLDER")

    @property
    def scoring(self) -> EvaluateConfig | QuickConfig:
        """How cells are scored."""
        return self.quick if self.evaluate == "quick" else self.scores

    @property
    def storing(self) -> Storing:
        """Where the videos go, and as what."""
        return Storing(output=self.output, fps=self.fps, codec=self.codec, crf=self.crf, latents=self.keep_latents)


def describe_plan(config: SweepConfig) -> str:
    """The grid as a table, for ``--dry-run``: reads the configuration of checkpoints on this machine, and starts
    nothing."""
    lines: list[list[str]] = []
    unknown: list[str] = []
    videos, evaluations = 0, 0
    for uri in config.grid.checkpoints:
        model = SweptModel.glance(uri)
        if model is None:
            unknown.append(uri)
            continue
        for cell in cells_of(config.grid, [model], config.mode, config.precision):
            count = len(labels_of(config.grid, model)) * config.grid.seeds
            settings = [str(cell.num_frames), str(cell.num_inference_steps), f"{cell.guidance_scale:g}"]
            if (reason := cell.refusal()) is not None:
                lines.append([uri, str(cell.ar_step), *settings, str(count), "-", "-", f"refused: {reason}"])
                continue
            videos, evaluations = videos + count, evaluations + count * cell.evaluations
            costs = [f"{cell.evaluations:,}", f"{cell.passes:,}", f"{count * cell.evaluations:,}"]
            lines.append([uri, str(cell.ar_step), *settings, str(count), *costs])
    header = ["checkpoint", "ar_step", "frames", "steps", "guidance", "videos", "evaluations of a video"]
    table = aligned([*header, "passes", "evaluations"], lines) if lines else []
    note = f"{videos} videos, {evaluations:,} evaluations of a frame by the model, in {len(lines)} cells."
    cells = len(config.grid.ar_steps) * len(config.grid.num_frames)
    cells *= len(config.grid.num_inference_steps) * len(config.grid.guidance_scales)
    missing = [f"{uri}: no pipeline on this machine to look at; it adds {cells} cells." for uri in unknown]
    return "\n".join([*table, *([note] if lines else []), *missing])


def run(config: SweepConfig, key: str = "") -> None:
    """Makes what is missing, then the manifest, scores and report.

    Raises:
        ArdiffError: A checkpoint, real videos or weights for the scores are missing, the folder holds other files,
            storage failed for good; or some rows could not be made, or not scored, after all others have been.
    """
    models = [SweptModel.load(uri) for uri in config.grid.checkpoints]
    cells = cells_of(config.grid, models, config.mode, config.precision)
    rows = [row for cell in cells for row in rows_of(config.grid, cell, config.storing)]
    refused = _refused(cells, rows)
    if len(refused) == len(rows):
        raise ConfigError(f"No video of the grid can be made: {refused[rows[0].id]}")
    if config.evaluate == "published":
        evaluate.check(_in_sweep(config, config.scores))
    with ray_cluster(config.max_actors * config.cpu_threads), stage("sweep", config.output, key) as record:
        _claim(config)
        record_run(config.output, config)
        records = find_complete(rows, storage.absolute(config.output))
        before = len(records)
        records |= _make(config, rows, refused, records)
        failed = [row for row in rows if records[row.id].status == "failed"]
        write_rows(storage.join(config.output, "manifest.parquet"), rows, records)
        summaries = summarise(cells, rows, records)
        _describe_cells(config, cells, rows, records)
        shown, unscored = config, None
        try:
            scores, notes = _score(config, summaries)
        except Exception as error:
            scores, notes, unscored = [], [f"Nothing is scored: {error}"], error
            shown = replace(config, evaluate="none", real=None)  # whose videos may be what is broken
        report = write_sweep_report(shown, summaries, rows, records, scores, notes)
        made = len(rows) - before - len(failed)
        record.note = f"{made} videos generated, {before} were there, {len(failed)} failed"
        record.results = {"videos": len(rows), "made": made, "report": report}
        _print(summaries, scores, notes)
        print_line(f"[bold]{escape(report)}[/]")
        if failed:
            for line in failure_table(rows, records):
                print_line(f"[red]failed[/] {escape(line)}")
            raise ArdiffError(
                f"{len(failed)} of {len(rows)} videos could not be made; all others are there. The manifest has the "
                "reasons, and the same command tries them again."
            )
        if unscored is not None:
            raise unscored


def _refused(cells: Sequence[Cell], rows: Sequence[VideoRow]) -> dict[str, str]:
    """Rows that their model cannot make, by id, and why."""
    by_name = {cell.name: cell for cell in cells}
    reasons = {row.id: by_name[row.cell].refusal(None if row.label < 0 else row.label) for row in rows}
    return {i: reason for i, reason in reasons.items() if reason is not None}


def _claim(config: SweepConfig) -> None:
    """Marks the folder with the kind of its files, or raises ConfigError if it holds others."""
    mine = json.dumps({"fps": config.fps, "codec": config.codec, "crf": config.crf})
    place = storage.join(config.output, "files.json")
    if storage.exists(place) and (there := storage.read_bytes(place).decode()) != mine:
        raise ConfigError(f"{config.output} holds videos stored with {there}, not {mine}: give another output.")
    storage.write_bytes(place, mine.encode())


def _make(
    config: SweepConfig, rows: Sequence[VideoRow], refused: dict[str, str], complete: dict[str, Record]
) -> dict[str, Record]:
    """Records of all rows by id."""
    impossible = [row for row in rows if row.id in refused]
    for reason in dict.fromkeys(refused.values()):
        print_line(
            f"[yellow]note[/] {sum(r == reason for r in refused.values())} videos cannot be made: {escape(reason)}"
        )
    failures = in_parallel(lambda row: record_failure(row, "ConfigError", refused[row.id], 0), impossible)
    possible = [row for row in rows if row.id not in refused]
    workers = Workers(
        device=config.device,
        batch_size=config.batch_size,
        min_actors=config.min_actors,
        max_actors=config.max_actors,
        cpu_threads=config.cpu_threads,
        gpus=config.gpus_per_actor,
        engine=config.engine,
        attempts=config.attempts,
    )
    there = {row.record: complete[row.id] for row in possible if row.id in complete}
    made = make_videos(possible, there, workers, "sweep", len(impossible))
    return {r.id: r for r in failures} | {row.id: made[row.record] for row in possible}


def _manifest(config: SweepConfig, cell: Cell) -> str:
    """Where a cell's manifest lies, in the form that `ardiff evaluate` reads."""
    return storage.join(config.output, "cells", cell.name, "manifest.parquet")


def _describe_cells(
    config: SweepConfig, cells: Sequence[Cell], rows: Sequence[VideoRow], records: dict[str, Record]
) -> None:
    """Writes the manifest of every cell that has videos; classes take turns, so that its first N are balanced."""
    for cell in cells:
        mine = [row for row in rows if row.cell == cell.name and records[row.id].status == "ok"]
        mine.sort(key=lambda row: (row.seed, row.label))
        if mine:
            lines = [video_record(row, records[row.id], cell.model.resolution) for row in mine]
            write_manifest(_manifest(config, cell), lines)


def _score(config: SweepConfig, summaries: Sequence[CellSummary]) -> tuple[list[CellScore], list[str]]:
    """Scores of all cells that can be scored, and why others are not."""
    if config.evaluate == "none":
        return [], []
    notes, scorable = [], []
    for summary in summaries:
        cell = summary.cell
        if cell.num_frames < config.scoring.num_frames:
            notes.append(f"{cell.name} is not scored: clips have {config.scoring.num_frames} frames, its videos fewer.")
        elif summary.made < config.scoring.num_clips:
            notes.append(
                f"{cell.name} is not scored: it has {summary.made} videos, and num_clips is {config.scoring.num_clips}."
            )
        else:
            scorable.append(cell)
    if not scorable:
        return [], notes
    fakes = tuple(_manifest(config, cell) for cell in scorable)
    if config.evaluate == "quick":
        content = evaluate_quick.run(replace(_in_sweep(config, config.quick), fake=fakes))
    else:
        content = evaluate.run(replace(_in_sweep(config, config.scores), fake=fakes))
    return _flat(content), notes


def _in_sweep(config: SweepConfig, scoring: ScoringT) -> ScoringT:
    """The scoring of the sweep's cells."""
    assert config.real is not None
    return replace(scoring, real=config.real, output=storage.join(config.output, "scores"))


def _flat(content: dict[str, Any]) -> list[CellScore]:
    """The scores, and their real-vs-real baselines as scores of the set ``real``."""
    found = [
        CellScore(set=s["set"], metric=s["metric"], value=s["score"], low=s["low"], high=s["high"])
        for s in content["scores"]
    ]
    there = {s.metric for s in found if s.set == "real"}
    baselines = {s["metric"]: s["baseline"] for s in content["scores"] if s["baseline"] is not None}
    real = [
        CellScore(set="real", metric=metric, value=value, low=None, high=None)
        for metric, value in baselines.items()
        if metric not in there
    ]
    return found + real


def _print(summaries: Sequence[CellSummary], scores: Sequence[CellScore], notes: Sequence[str]) -> None:
    """A table of the cells on the terminal."""
    cells = [summary.cell for summary in summaries]
    metrics = list(dict.fromkeys(score.metric for score in scores))
    values = {(score.set, score.metric): f"{score.value:.2f}" for score in scores}
    lines = [
        [label(s.cell, cells), str(s.made), str(s.failed), f"{s.seconds:.2f}", f"{s.frames_per_second:.1f}"]
        + [values.get((s.cell.name, metric), "") for metric in metrics]
        for s in summaries
    ]
    for line in aligned(["cell", "videos", "failed", "s/video", "frames/s", *metrics], lines):
        print_line(escape(line))
    for note in notes:
        print_line(f"[yellow]note[/] {escape(note)}")


if __name__ == "__main__":
    raise SystemExit(main(["sweep", *sys.argv[1:]]))
