"""Generates a grid of videos in one job, scores every point of the grid and writes a report.

A video depends only on its spec: the number of actors, the batches and restarts do not change a bit of it. The same
command generates what is missing and leaves complete videos alone.

    python -m ray_jobs.sweep configs/quickstart/sweep.yaml --evaluate quick
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rich.markup import escape

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.manifest import write_manifest as write_video_manifest
from ardiff.errors import ArdiffError, ConfigError
from ardiff.metrics.registry import is_detail
from ardiff.metrics.scores import format_score
from ardiff.sampling.params import validate
from ardiff.sweep.batches import record_failure
from ardiff.sweep.grid import SweepPoint, point_specs, subjects, sweep_points
from ardiff.sweep.manifest import video_record, write_manifest
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import Record, VideoSpec, find_complete, in_parallel
from ardiff.sweep.summary import PointScore, PointSummary, aligned, failure_table, label, summarise
from ray_jobs import evaluate, evaluate_quick
from ray_jobs.evaluation.config import EvaluateConfig, QuickConfig
from ray_jobs.generation.actors import generate_videos
from ray_jobs.generation.config import SweepConfig
from ray_jobs.reports.sweep import write_sweep_report
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import record_run, stage

CONFIG_FIRST = True
ScoringT = TypeVar("ScoringT", EvaluateConfig, QuickConfig)


def describe_plan(config: SweepConfig) -> str:
    """The grid as a table, for ``--dry-run``. Reads the configurations of checkpoints on this machine only."""
    rows: list[list[str]] = []
    missing: list[str] = []
    num_videos, evaluations, points_per_model = 0, 0, len(config.grid.combinations)
    for uri in config.grid.checkpoints:
        model = SweptModel.peek(uri)
        if model is None:
            missing.append(f"{uri}: no pipeline on this machine; it adds {points_per_model} points.")
            continue
        videos = len(subjects(config.grid, model)) * config.grid.seeds
        for point in sweep_points(config.grid, [model], config.precision):
            if point.error is not None:
                rows.append([uri, point.name, str(videos), "-", "-", f"invalid: {point.error}"])
                continue
            num_videos, evaluations = num_videos + videos, evaluations + videos * point.evaluations
            costs = (point.evaluations, point.passes, videos * point.evaluations)
            rows.append([uri, point.name, str(videos), *(f"{cost:,}" for cost in costs)])
    header = ["checkpoint", "point", "videos", "evaluations per video", "passes", "evaluations"]
    table = aligned(header, rows) if rows else []
    total = f"{num_videos} videos, {evaluations:,} evaluations of a frame by the model, in {len(rows)} points."
    return "\n".join([*table, *([total] if rows else []), *missing])


def run(config: SweepConfig, key: str = "") -> None:
    """Generates what is missing, then writes the manifest, scores and report.

    Raises:
        ArdiffError: A checkpoint, real videos or weights of feature networks are missing; the folder holds files of
            another format; storage failed for good; or, after everything else is done, some videos could not be
            generated or scored.
    """
    models = [SweptModel.load(uri) for uri in config.grid.checkpoints]
    points = sweep_points(config.grid, models, config.precision)
    specs = [spec for point in points for spec in point_specs(config.grid, point, config.files)]
    invalid = _invalid_specs(points, specs)
    if len(invalid) == len(specs):
        raise ConfigError(f"No video of the grid can be generated: {invalid[specs[0].id]}")
    if config.evaluate == "published":
        evaluate.check(_in_sweep(config, config.scores))
    with ray_cluster(config.max_actors * config.cpu_threads), stage("sweep", config.output, key) as record:
        _claim_output(config)
        record_run(config.output, config)
        records = find_complete(specs, storage.absolute(config.output))
        num_complete = len(records)
        records |= _generate(config, specs, invalid, records)
        failed = [spec for spec in specs if records[spec.id].status == "failed"]
        write_manifest(storage.join(config.output, "manifest.parquet"), specs, records)
        summaries = summarise(points, specs, records)
        _write_point_manifests(config, points, specs, records)
        report_config, score_error = config, None
        try:
            scores, notes = _score(config, summaries)
        except Exception as error:
            scores, notes, score_error = [], [f"Nothing is scored: {error}"], error
            report_config = replace(config, evaluate="none", real=None)  # the real videos may be the cause
        report = write_sweep_report(report_config, summaries, specs, records, scores, notes)
        generated = len(specs) - num_complete - len(failed)
        record.note = f"{generated} videos generated, {num_complete} were complete, {len(failed)} failed"
        record.results = {"videos": len(specs), "generated": generated, "report": report}
        _print_summary(summaries, scores, notes)
        print_line(f"[bold]{escape(report)}[/]")
        if failed:
            for line in failure_table(specs, records):
                print_line(f"[red]failed[/] {escape(line)}")
            raise ArdiffError(
                f"{len(failed)} of {len(specs)} videos could not be generated; all others are complete. The manifest "
                "has the reasons. The same command tries the failed videos again."
            )
        if score_error is not None:
            raise score_error


def _invalid_specs(points: Sequence[SweepPoint], specs: Sequence[VideoSpec]) -> dict[str, str]:
    """Why the model cannot sample a spec, by id, for those that it cannot."""
    models = {point.name: point.model for point in points}
    errors: dict[str, str] = {}
    for spec in specs:
        try:
            validate(spec.sampling, models[spec.point].info)
        except ValueError as error:
            errors[spec.id] = f"{error}."
    return errors


def _claim_output(config: SweepConfig) -> None:
    """Writes the file format to the folder. Raises ConfigError if the folder holds files of another format."""
    file_format = json.dumps({"fps": config.fps, "codec": config.codec, "crf": config.crf})
    file = storage.join(config.output, "files.json")
    if storage.exists(file) and (stored := storage.read_bytes(file).decode()) != file_format:
        raise ConfigError(f"{config.output} holds videos of format {stored}, not {file_format}: give another output.")
    storage.write_bytes(file, file_format.encode())


def _generate(
    config: SweepConfig, specs: Sequence[VideoSpec], invalid: dict[str, str], complete: dict[str, Record]
) -> dict[str, Record]:
    """Generates the missing specs, and records the invalid ones as failed. Returns the records of all by id."""
    for reason in dict.fromkeys(invalid.values()):
        count = sum(r == reason for r in invalid.values())
        print_line(f"[yellow]note[/] {count} videos cannot be generated: {escape(reason)}")
    invalid_specs = [spec for spec in specs if spec.id in invalid]
    failures = in_parallel(lambda spec: record_failure(spec, "ConfigError", invalid[spec.id], 0), invalid_specs)
    valid = [spec for spec in specs if spec.id not in invalid]
    complete_by_uri = {spec.record: complete[spec.id] for spec in valid if spec.id in complete}
    records = generate_videos(valid, complete_by_uri, config.workers, "sweep", len(invalid_specs))
    return {record.id: record for record in failures} | {spec.id: records[spec.record] for spec in valid}


def _point_manifest(config: SweepConfig, point: SweepPoint) -> str:
    """The manifest of a point's videos, which `ardiff evaluate` reads."""
    return storage.join(config.output, "points", point.name, "manifest.parquet")


def _write_point_manifests(
    config: SweepConfig, points: Sequence[SweepPoint], specs: Sequence[VideoSpec], records: dict[str, Record]
) -> None:
    """Writes the manifest of every point that has videos; classes and prompts take turns, so that its first N are
    balanced."""
    for point in points:
        complete = [spec for spec in specs if spec.point == point.name and records[spec.id].status == "ok"]
        complete.sort(key=lambda spec: (spec.sampling.seed, spec.sampling.class_label or 0))
        if complete:
            shape = point.model.info.shape_of(point.params)
            rows = [video_record(spec, records[spec.id], shape) for spec in complete]
            write_video_manifest(_point_manifest(config, point), rows)


def _score(config: SweepConfig, summaries: Sequence[PointSummary]) -> tuple[list[PointScore], list[str]]:
    """Scores of all points that can be scored, and why the others cannot."""
    if config.evaluate == "none":
        return [], []
    notes, scorable = [], []
    for summary in summaries:
        point, scoring = summary.point, config.scoring
        if point.params.num_frames < scoring.num_frames:
            notes.append(f"{point.name} is not scored: its videos are shorter than {scoring.num_frames} frames.")
        elif summary.generated < scoring.num_clips:
            notes.append(
                f"{point.name} is not scored: it has {summary.generated} videos, and num_clips is {scoring.num_clips}."
            )
        else:
            scorable.append(point)
    if not scorable:
        return [], notes
    manifests = tuple(_point_manifest(config, point) for point in scorable)
    if config.evaluate == "quick":
        results = evaluate_quick.run(replace(_in_sweep(config, config.quick), fake=manifests))
    else:
        results = evaluate.run(replace(_in_sweep(config, config.scores), fake=manifests))
    return _point_scores(results), notes


def _in_sweep(config: SweepConfig, scoring: ScoringT) -> ScoringT:
    """The scoring of this sweep's points."""
    assert config.real is not None
    return replace(scoring, real=config.real, output=storage.join(config.output, "scores"))


def _point_scores(results: dict[str, Any]) -> list[PointScore]:
    """The scores, with their real-vs-real baselines as scores of the set ``real``."""
    scores = [
        PointScore(set=s["set"], metric=s["metric"], value=s["score"], low=s["low"], high=s["high"])
        for s in results["scores"]
        if not is_detail(s["metric"])
    ]
    have_real = {score.metric for score in scores if score.set == "real"}
    shown = {score.metric for score in scores}
    baselines = {s["metric"]: s["baseline"] for s in results["scores"] if s["baseline"] is not None}
    return scores + [
        PointScore(set="real", metric=metric, value=value, low=None, high=None)
        for metric, value in baselines.items()
        if metric in shown - have_real
    ]


def _print_summary(summaries: Sequence[PointSummary], scores: Sequence[PointScore], notes: Sequence[str]) -> None:
    """Prints a table of the points."""
    points = [summary.point for summary in summaries]
    metrics = list(dict.fromkeys(score.metric for score in scores))
    values = {(score.set, score.metric): format_score(score.metric, score.value) for score in scores}
    rows = [
        [label(s.point, points), str(s.generated), str(s.failed), f"{s.seconds:.2f}", f"{s.frames_per_second:.1f}"]
        + [values.get((s.point.name, metric), "") for metric in metrics]
        for s in summaries
    ]
    for line in aligned(["point", "videos", "failed", "s/video", "frames/s", *metrics], rows):
        print_line(escape(line))
    for note in notes:
        print_line(f"[yellow]note[/] {escape(note)}")


if __name__ == "__main__":
    raise SystemExit(main(["sweep", *sys.argv[1:]]))
