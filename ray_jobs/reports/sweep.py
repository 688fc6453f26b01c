"""The report of a sweep: quality against cost, videos of each point, the best and the worst, and how to repeat it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ardiff.config import to_yaml
from ardiff.data import storage
from ardiff.metrics.registry import VideoMetric, find_metric
from ardiff.metrics.scores import format_score
from ardiff.sweep.specs import Record, VideoSpec
from ardiff.sweep.summary import PointScore, PointSummary, failure_table, label
from ray_jobs.generation.config import SweepConfig
from ray_jobs.reports.html import Report, Score, Table, render_report
from ray_jobs.reports.sweep_media import point_videos, subject_sheets
from ray_jobs.reports.sweep_plots import metric_title, quality_curves, statistics_curves
from ray_jobs.reports.sweep_ranking import Ranking
from ray_jobs.runtime.stages import versions

MAX_POINTS = 12
"""Points whose videos the page plays; its tables list all."""
UNBIASED_CLIPS = 2048
"""Distances of fewer clips are biased upwards."""


def write_sweep_report(
    config: SweepConfig,
    summaries: Sequence[PointSummary],
    specs: Sequence[VideoSpec],
    records: dict[str, Record],
    scores: Sequence[PointScore],
    notes: Sequence[str],
) -> str:
    """Writes ``report.html`` and returns its URI. Raises ArdiffError if a video cannot be read."""
    uri = storage.join(config.output, "report.html")
    complete = [spec for spec in specs if records[spec.id].status == "ok"]
    ranking = Ranking.of(config, complete, records)
    points = [summary.point for summary in summaries]
    labels = {point.name: label(point, points) for point in points}
    shown = {s.point.name: labels[s.point.name] for s in [s for s in summaries if s.generated][:MAX_POINTS]}
    cpu_only = {records[spec.id].device for spec in complete} == {"cpu"}
    failures = failure_table(specs, records)
    report = Report(
        title=f"Sweep of {len(specs)} videos",
        subtitle=_subtitle(config, summaries),
        summary=_summary(summaries, scores, records, labels),
        stages=[],
        curves=statistics_curves(summaries, complete, records, ranking, labels),
        sheets=subject_sheets(complete, shown),
        videos=point_videos(complete, shown, config.fps) + ranking.extreme_videos(config.fps),
        scores=[_score(s, labels) for s in scores if not isinstance(find_metric(s.metric), VideoMetric)],
        config_yaml=to_yaml(config),
        versions=versions(),
        caveats=[*_score_caveats(config), ranking.caption, *notes, *failures, *_shown_caveat(shown, summaries)],
        tables=[_point_table(summaries, scores, ranking, labels), ranking.table(labels)] if complete else [],
        command=_command(config),
        leading=quality_curves(summaries, scores, ranking, cpu_only),
    )
    storage.write_bytes(uri, render_report(report).encode())
    return uri


def _subtitle(config: SweepConfig, summaries: Sequence[PointSummary]) -> str:
    """The axes of the grid, and its other parameters that differ from the defaults."""
    axes = [f"{name} {', '.join(map(str, values))}" for name, values in config.grid.axes.items()]
    fixed = {name: value for name, value in config.grid.sampling.changed().items() if name not in config.grid.axes}
    models = len({summary.point.model.uri for summary in summaries})
    texts = [*axes, *(f"{name} {value}" for name, value in fixed.items())]
    counts = [(models, "checkpoints"), (len(config.grid.prompts), "prompts")]
    return "; ".join([*texts, *(f"{count} {kind}" for count, kind in counts if count > 1)])


def _summary(
    summaries: Sequence[PointSummary],
    scores: Sequence[PointScore],
    records: dict[str, Record],
    labels: dict[str, str],
) -> list[str]:
    generated, failed = sum(s.generated for s in summaries), sum(s.failed for s in summaries)
    complete = [record for record in records.values() if record.status == "ok"]
    evaluations, seconds = sum(r.evaluations for r in complete), sum(r.seconds for r in complete)
    lines = [
        f"{generated} videos at {len(summaries)} points" + (f"; {failed} failed." if failed else ", none failed."),
        f"{evaluations:,} evaluations of a frame by the model in {seconds:,.0f} seconds of work; actors: "
        f"{len({r.worker for r in complete})}.",
    ]
    for metric in dict.fromkeys(score.metric for score in scores):
        rank = find_metric(metric).rank
        of_points = [s for s in scores if s.metric == metric and s.set in labels]
        if not of_points:  # such as the PSNR of reconstructions
            continue
        best = min(of_points, key=lambda s: rank(s.value))
        real = [format_score(metric, s.value) for s in scores if (s.metric, s.set) == (metric, "real")]
        reached = f"; real clips reach {real[0]}" if real else ""
        value = format_score(metric, best.value)
        lines.append(f"Best {metric_title(metric)}: {value}, {labels[best.set]}{reached}.")
    return lines


def _point_table(
    summaries: Sequence[PointSummary], scores: Sequence[PointScore], ranking: Ranking, labels: dict[str, str]
) -> Table:
    metrics = list(dict.fromkeys(score.metric for score in scores))
    texts = {(s.set, s.metric): _with_interval(s) for s in scores}
    rows = [
        [
            labels[s.point.name],
            f"{s.generated} of {s.videos}",
            f"{s.point.evaluations:,}" if s.point.error is None else "-",
            f"{s.point.passes:,}" if s.point.error is None else "-",
            f"{s.seconds:.2f}",
            f"{s.cpu_seconds:.2f}",
            f"{s.frames_per_second:.1f}",
            *[texts.get((s.point.name, metric), "not scored") for metric in metrics],
            f"{ranking.means.get(s.point.name, float('nan')):.2f}",
        ]
        for s in summaries
    ]
    caption = (
        "Per video: evaluations of a frame by the model, passes that must follow each other, and its share of the "
        "seconds of its batch. Frames per second are those of one worker."
    )
    header = ["point", "videos", "evaluations", "passes", "seconds", "CPU seconds", "frames/s"]
    return Table("Sweep points", caption, [*header, *map(metric_title, metrics), ranking.name], rows)


def _with_interval(score: PointScore) -> str:
    return f"{format_score(score.metric, score.value)}{_interval(score, ' ({} to {})')}"


def _interval(score: PointScore, text: str) -> str:
    """The ends of the interval in ``text``; nothing without an interval."""
    if score.low is None or score.high is None:
        return ""
    return text.format(format_score(score.metric, score.low), format_score(score.metric, score.high))


def _score(score: PointScore, labels: dict[str, str]) -> Score:
    note = _interval(score, "95 % interval {} to {}")
    is_point = score.set in labels
    return Score(labels.get(score.set, score.set), score.value, metric_title(score.metric), note, highlight=is_point)


def _score_caveats(config: SweepConfig) -> list[str]:
    if config.evaluate == "none":
        return []
    scoring = config.scoring
    protocol = "quick" if config.evaluate == "quick" else config.scores.protocol
    lines = [
        f"Scores: protocol {protocol}, the first {scoring.num_frames} frames of {scoring.num_clips} videos per "
        f"point against as many real clips of {config.real} ({scoring.split}); scores/ has everything they depend on."
    ]
    if scoring.num_clips < UNBIASED_CLIPS:
        lines.append(f"Distances of {scoring.num_clips} clips are biased upwards: compare points of this page only.")
    return lines


def _shown_caveat(shown: dict[str, str], summaries: Sequence[PointSummary]) -> list[str]:
    if len(shown) == len(summaries):
        return []
    return [f"Videos and sheets are of the first {len(shown)} of {len(summaries)} points."]


def _command(config: SweepConfig) -> str:
    """The command line of this job, or one that does the same if the job was not started by a command."""
    if Path(sys.argv[0]).name in ("ardiff", "sweep.py") and "sweep" in (*sys.argv, Path(sys.argv[0]).stem):
        arguments = sys.argv[2:] if sys.argv[1:2] == ["sweep"] else sys.argv[1:]
        return shlex.join(["ardiff", "sweep", *arguments])
    return f"ardiff sweep --config {storage.join(config.output, 'config.yaml')}"
