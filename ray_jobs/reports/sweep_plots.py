"""Plots of a sweep's report: quality and cost over ``ar_step``, and statistics over the length of a video."""

from collections.abc import Callable, Sequence

import numpy as np

from ardiff.metrics.drift import STATISTICS
from ardiff.metrics.registry import VideoMetric, find_metric, set_specs
from ardiff.sweep.specs import Record, VideoSpec
from ardiff.sweep.statistics import segment_length
from ardiff.sweep.summary import PointScore, PointSummary, label
from ray_jobs.reports.html import Curve
from ray_jobs.reports.sweep_ranking import Ranking

COST_CAPTION = "Table 2 of the paper as a plot: points are labelled with their ar_step."
MAX_SERIES = 6
"""Points that get a curve in the plots of statistics."""

Series = dict[str, tuple[list[float], list[float]]]
"""x and y values by name."""


def metric_title(metric: str) -> str:
    """A metric's name at the start of a title."""
    if metric in ("drift", "deviation"):  # rankings of videos, no metrics
        return metric.capitalize()
    registered = find_metric(metric)
    return metric.upper() if set_specs(registered) and registered.ideal is None else metric.capitalize()


def quality_curves(
    summaries: Sequence[PointSummary], scores: Sequence[PointScore], ranking: Ranking, cpu_only: bool
) -> list[Curve]:
    """Quality against cost, quality over ``ar_step``, and cost over ``ar_step``.

    Cost is processor time if all videos were generated on CPUs, since other jobs on the machine do not change it.
    """
    cost_axis = "CPU seconds per video" if cpu_only else "seconds per video"

    def cost(s: PointSummary) -> float:
        return s.cpu_seconds if cpu_only else s.seconds

    def step(s: PointSummary) -> float:
        return float(s.point.params.resolved_ar_step)

    qualities: dict[str, dict[str, float]] = {}
    for score in scores:
        qualities.setdefault(score.metric, {})[score.set] = score.value
    qualities[ranking.name] = ranking.means
    groups = _series(summaries)
    curves = []
    for metric, values in qualities.items():
        scored = {name: [s for s in group if s.point.name in values] for name, group in groups.items()}
        scored = {name: group for name, group in scored.items() if group}
        if not scored:
            continue
        labels = {name: [f"{step(s):g}" for s in group] for name, group in scored.items()}

        def series(x: Callable[[PointSummary], float], scored=scored, values=values) -> Series:  # type: ignore[no-untyped-def]
            lines = {n: ([x(s) for s in group], [values[s.point.name] for s in group]) for n, group in scored.items()}
            return lines | _level(lines, values.get("real"))

        title = metric_title(metric)
        is_share = metric != ranking.name and isinstance(find_metric(metric), VideoMetric)
        advice, log_y = "lower is better" if metric == ranking.name else find_metric(metric).advice, not is_share
        caption = f"{COST_CAPTION} Further left is cheaper; {advice}."
        curves.append(Curve(f"{title} against cost", cost_axis, title, series(cost), log_y, labels, caption))
        caption = f"{advice.capitalize()}."
        curves.append(Curve(f"{title} over ar_step", "ar_step", title, series(step), log_y, labels, caption))
    costs = {name: ([step(s) for s in group], [cost(s) for s in group]) for name, group in groups.items()}
    labels = {name: [f"{cost(s):.2f}" for s in group] for name, group in groups.items()}
    curves.append(Curve("Cost over ar_step", "ar_step", cost_axis, costs, False, labels))
    return curves


def _level(lines: Series, value: float | None) -> Series:
    """A horizontal line for real clips, as wide as the other lines."""
    if value is None:
        return {}
    x = [number for numbers, _ in lines.values() for number in numbers]
    return {"real clips": ([min(x), max(x)], [value, value])}


def _series(summaries: Sequence[PointSummary]) -> dict[str, list[PointSummary]]:
    """Points that differ in ``ar_step`` only, in its order, by the label of their other parameters."""
    points = [s.point for s in summaries]
    groups: dict[str, list[PointSummary]] = {}
    complete = [s for s in summaries if s.generated]
    for s in sorted(complete, key=lambda s: s.point.params.resolved_ar_step):
        groups.setdefault(label(s.point, points, "ar_step") or "generated", []).append(s)
    return groups


def statistics_curves(
    summaries: Sequence[PointSummary],
    specs: Sequence[VideoSpec],
    records: dict[str, Record],
    ranking: Ranking,
    labels: dict[str, str],
) -> list[Curve]:
    """Each statistic over the segments of the longest videos, as means over a point."""
    longest = max((s.point.params.num_frames for s in summaries if s.generated), default=0)
    names = [s.point.name for s in summaries if s.generated and s.point.params.num_frames == longest]
    length = segment_length(longest) if longest else 1
    curves = []
    for statistic, caption in STATISTICS.items():
        series: Series = {}
        for name in names[:MAX_SERIES]:
            values = [records[spec.id].statistics.get(statistic, []) for spec in specs if spec.point == name]
            means = np.mean([v for v in values if v], axis=0).tolist() if any(values) else []
            series[labels[name]] = ([length * (i + 0.5) for i in range(len(means))], means)
        if length in ranking.real:
            level = float(np.mean([clip[statistic] for clip in ranking.real[length]]))
            series["real clips"] = ([0.0, float(longest)], [level, level])
        if any(x for x, _ in series.values()):
            title = f"{statistic.capitalize()} over {longest} frames"
            curves.append(Curve(title, "frame", caption, series, False))
    return curves
