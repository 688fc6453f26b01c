"""The page of a sweep: quality against cost, what videos look like, the best and the worst, and how to repeat it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import contact_sheet, encode_video, tile
from ardiff.metrics.drift import STATISTICS
from ardiff.metrics.store import FeatureStore
from ardiff.sweep.rows import Record, VideoRow
from ardiff.sweep.statistics import Statistics, deviation, drift, part_length
from ardiff.sweep.summary import CellScore, CellSummary, failure_table, label
from ray_jobs.evaluation.datasets import list_videos, open_videos, real_clips
from ray_jobs.evaluation.drift import measure_statistics
from ray_jobs.evaluation.features import ClipSet, Workers, data_keys, extract
from ray_jobs.reports.html import Curve, Report, Score, Sheet, Table, Video, render_report
from ray_jobs.runtime.stages import versions

if TYPE_CHECKING:
    from ray_jobs.sweep import SweepConfig

SHOWN_CELLS = 12
"""Cells whose videos the page plays; all are in its tables."""
TILED, EXTREME, SHEET_SEEDS = 8, 6, 1
"""Videos of a cell that play together, best and worst videos, and seeds of a class on its sheet."""
REAL_CLIPS = 64
"""Real clips whose statistics videos are compared with."""
SIDE = 96
"""Pixels that a video is enlarged to at least, or reduced to, where several play together."""


def write_sweep_report(
    config: SweepConfig,
    summaries: Sequence[CellSummary],
    rows: Sequence[VideoRow],
    records: dict[str, Record],
    scores: Sequence[CellScore],
    notes: Sequence[str],
) -> str:
    """Writes ``report.html`` and returns its place. Raises ArdiffError if a video cannot be read."""
    place = storage.join(config.output, "report.html")
    made = [row for row in rows if records[row.id].status == "ok"]
    ranking = Ranking.of(config, made, records)
    cells = [summary.cell for summary in summaries]
    shown = [s.cell for s in summaries if s.made][:SHOWN_CELLS]
    names = {cell.name: label(cell, cells) for cell in cells}
    videos = [_playing(names[c.name], "", _first(made, c.name, TILED), config.fps) for c in shown]
    videos += ranking.extremes(made, names, config.fps)
    report = Report(
        title=f"Sweep of {len(rows)} videos",
        subtitle=_subtitle(config, summaries),
        summary=_summary(summaries, scores, records, names),
        stages=[],
        curves=_ways(summaries, made, records, ranking, names),
        sheets=_sheets(shown, made, names),
        videos=videos,
        scores=[_score(score, names) for score in scores],
        config_yaml=to_yaml(config),
        versions=versions(),
        caveats=_caveats(config, summaries, ranking, notes, failure_table(rows, records), len(shown)),
        tables=[_table(summaries, scores, ranking, names), ranking.table(made, names)] if made else [],
        command=_command(config),
        leading=_curves(summaries, scores, ranking, {records[row.id].device for row in made} == {"cpu"}),
    )
    storage.write_bytes(place, render_report(report).encode())
    return place


class Ranking:
    """One number a video, smaller is better: how unlike real clips it is, or how unsteady where there are none."""

    def __init__(
        self,
        made: Sequence[VideoRow],
        values: dict[str, float],
        title: str,
        meaning: str,
        real: dict[int, list[Statistics]],
    ) -> None:
        self.values, self.title, self.meaning, self.real = values, title, meaning, real
        by_cell: dict[str, list[float]] = {}
        for row in made:
            by_cell.setdefault(row.cell, []).append(values[row.id])
        self.means = {cell: float(np.mean(found)) for cell, found in by_cell.items()}
        """Of each cell's videos, and of the real clips."""
        if real:
            level = [deviation(clip, clips) for clips in real.values() for clip in clips]
            self.means["real"] = float(np.mean(level))

    @classmethod
    def of(cls, config: SweepConfig, made: Sequence[VideoRow], records: dict[str, Record]) -> Ranking:
        """Ranks all videos that were made, by the statistics in their records."""
        if config.real is None:
            values = {row.id: drift(records[row.id].statistics) for row in made}
            meaning = (
                f"Drift: the largest relative change of {', '.join(STATISTICS)} between the first part of a video and "
                "a later one. A video that stands still has none: give real=... to compare with real clips instead."
            )
            return cls(made, values, "drift", meaning, {})
        real = {n: _real_statistics(config, n) for n in {part_length(row.num_frames) for row in made}}
        values = {row.id: deviation(records[row.id].statistics, real[part_length(row.num_frames)]) for row in made}
        meaning = (
            f"Deviation: the distance of a video's parts from {REAL_CLIPS} real clips in standard deviations of "
            f"the latter (root mean square over parts), of {', '.join(STATISTICS)} the one for which it is largest."
        )
        return cls(made, values, "deviation", meaning, real)

    def ordered(self, made: Sequence[VideoRow]) -> list[VideoRow]:
        """From best to worst; what has no number is left out."""
        ranked = [row for row in made if np.isfinite(self.values[row.id])]
        return sorted(ranked, key=lambda row: (self.values[row.id], row.id))

    def extremes(self, made: Sequence[VideoRow], names: dict[str, str], fps: float) -> list[Video]:
        """The best and the worst, playing; of one length each, or they could not play together."""
        ranked = self.ordered(made)
        if len(ranked) < 2 * EXTREME:
            return []
        found = []
        for title, chosen in (("Best", ranked[:EXTREME]), ("Worst", ranked[::-1][:EXTREME])):
            low, high = sorted((self.values[chosen[0].id], self.values[chosen[-1].id]))
            text = f"{self.title} {low:.2f} to {high:.2f}; the table below names them in this order."
            found.append(_playing(f"{title} by {self.title}", text[0].upper() + text[1:], chosen, fps))
        return found

    def table(self, made: Sequence[VideoRow], names: dict[str, str]) -> Table:
        """The best and the worst with their files."""
        ranked = self.ordered(made)
        chosen = ranked if len(ranked) < 2 * EXTREME else [*ranked[:EXTREME], *ranked[: -EXTREME - 1 : -1]]
        lines = [
            [names[r.cell], r.class_name or "none", str(r.seed), f"{self.values[r.id]:.2f}", r.uri.rpartition("/")[2]]
            for r in chosen
        ]
        header = ["cell", "class", "seed", self.title, "file"]
        return Table("Best and worst videos", self.meaning, header, lines)


def _real_statistics(config: SweepConfig, length: int) -> list[Statistics]:
    """Of real clips of ``length`` frames."""
    assert config.real is not None
    scoring = config.scoring
    span = (length - 1) * scoring.stride + 1
    records = open_videos(list_videos(config.real), scoring.split, span, scoring.fps).records
    clips = real_clips(records, REAL_CLIPS, scoring, length)
    key = fingerprint(["statistics", length, scoring.resolution], data_keys(clips))
    store = FeatureStore(storage.join(config.output, "scores", "features", f"statistics-{key}"))
    [(values, _)] = extract(
        "real statistics",
        [ClipSet(clips, store)],
        measure_statistics,
        length,
        scoring.resolution,
        Workers.on_cpus(scoring),
    )
    return [{name: [float(v[0, i])] for i, name in enumerate(STATISTICS)} for v in values.array()]


# What was measured


def _subtitle(config: SweepConfig, summaries: Sequence[CellSummary]) -> str:
    grid = config.grid
    values = {
        "ar_step": grid.ar_steps,
        "frames": grid.num_frames,
        "sampling steps": grid.num_inference_steps,
        "guidance": tuple(f"{g:g}" for g in grid.guidance_scales),
    }
    parts = [f"{name} {', '.join(map(str, found))}" for name, found in values.items()]
    models = len({s.cell.model.uri for s in summaries})
    parts += [f"{models} checkpoints"] if models > 1 else []
    return f"{'; '.join(parts)}; mode {config.mode}"


def _summary(
    summaries: Sequence[CellSummary],
    scores: Sequence[CellScore],
    records: dict[str, Record],
    names: dict[str, str],
) -> list[str]:
    made, failed = sum(s.made for s in summaries), sum(s.failed for s in summaries)
    ok = [r for r in records.values() if r.status == "ok"]
    evaluations, seconds = sum(r.evaluations for r in ok), sum(r.seconds for r in ok)
    lines = [
        f"{made} videos in {len(summaries)} cells" + (f"; {failed} failed." if failed else ", none failed."),
        f"{evaluations:,} evaluations of a frame by the model in {seconds:,.0f} seconds of work; actors: "
        f"{len({r.worker for r in ok})}.",
    ]
    for metric in dict.fromkeys(score.metric for score in scores):
        mine = [s for s in scores if s.metric == metric and s.set in names]
        best = min(mine, key=lambda s: s.value)
        real = next((f"; real clips reach {s.value:.1f}" for s in scores if (s.metric, s.set) == (metric, "real")), "")
        lines.append(f"Best {_name(metric)}: {best.value:.1f}, {names[best.set]}{real}.")
    return lines


def _name(metric: str) -> str:
    return metric if metric in ("distance", "drift", "deviation") else metric.upper()


def _table(
    summaries: Sequence[CellSummary], scores: Sequence[CellScore], ranking: Ranking, names: dict[str, str]
) -> Table:
    metrics = list(dict.fromkeys(score.metric for score in scores))
    texts = {(s.set, s.metric): _interval(s) for s in scores}
    lines = [
        [
            names[s.cell.name],
            f"{s.made} of {s.videos}",
            f"{s.cell.evaluations:,}",
            f"{s.cell.passes:,}",
            f"{s.seconds:.2f}",
            f"{s.cpu_seconds:.2f}",
            f"{s.frames_per_second:.1f}",
            *[texts.get((s.cell.name, metric), "not scored") for metric in metrics],
            f"{ranking.means.get(s.cell.name, float('nan')):.2f}",
        ]
        for s in summaries
    ]
    caption = (
        "Evaluations of a frame by the model, passes that must follow each other, and seconds are of one video; "
        "seconds are its share of its pack's time, frames a second those of one worker."
    )
    header = ["cell", "videos", "evaluations", "passes", "seconds", "CPU seconds", "frames/s"]
    return Table("Cells", caption, [*header, *map(_name, metrics), ranking.title], lines)


def _interval(score: CellScore) -> str:
    between = f" ({score.low:.1f} to {score.high:.1f})" if score.low is not None and score.high is not None else ""
    return f"{score.value:.1f}{between}"


def _score(score: CellScore, names: dict[str, str]) -> Score:
    note = f"95 % interval {score.low:.1f} to {score.high:.1f}" if score.low is not None else ""
    own = score.set in names
    return Score(names.get(score.set, score.set), score.value, _name(score.metric), note, highlight=own)


# Plots


def _curves(
    summaries: Sequence[CellSummary], scores: Sequence[CellScore], ranking: Ranking, on_cpus: bool
) -> list[Curve]:
    """Quality and cost over ``ar_step``, and one against the other. On CPUs cost is processor time, which others on the
    machine do not change."""
    qualities = {m: {s.set: s.value for s in scores if s.metric == m} for m in dict.fromkeys(s.metric for s in scores)}
    qualities[ranking.title] = ranking.means
    plots = []
    cost = "CPU seconds a video" if on_cpus else "seconds a video"

    def cost_of(s: CellSummary) -> float:
        return s.cpu_seconds if on_cpus else s.seconds

    for metric, values in qualities.items():
        against: dict[str, tuple[list[float], list[float]]] = {}
        along: dict[str, tuple[list[float], list[float]]] = {}
        labels: dict[str, list[str]] = {}
        for name, mine in _series(summaries).items():
            known = [s for s in mine if s.cell.name in values]
            if not known:
                continue
            y = [values[s.cell.name] for s in known]
            against[name] = ([cost_of(s) for s in known], y)
            along[name] = ([float(s.cell.ar_step) for s in known], y)
            labels[name] = [str(s.cell.ar_step) for s in known]
        if not against:
            continue
        level = values.get("real")
        real = {} if level is None else {"real clips": (_ends(along), [level, level])}
        real_cost = {} if level is None else {"real clips": (_ends(against), [level, level])}
        title, log = f"{_name(metric)[0].upper()}{_name(metric)[1:]}", True
        plots.append(Curve(f"{title} against cost", cost, title, against | real_cost, log, labels, COST_CAPTION))
        plots.append(Curve(f"{title} along ar_step", "ar_step", title, along | real, log, labels, "Smaller is better."))
    along = {
        name: ([float(s.cell.ar_step) for s in mine], [cost_of(s) for s in mine])
        for name, mine in _series(summaries).items()
    }
    marks = {name: [f"{cost_of(s):.2f}" for s in mine] for name, mine in _series(summaries).items()}
    plots.append(Curve("Cost along ar_step", "ar_step", cost, along, False, marks))
    return plots


COST_CAPTION = "The paper's Table 2 as a picture: a point is a cell and carries its ar_step. Down and left is better."


def _ends(series: dict[str, tuple[list[float], list[float]]]) -> list[float]:
    x = [value for values, _ in series.values() for value in values]
    return [min(x), max(x)]


def _series(summaries: Sequence[CellSummary]) -> dict[str, list[CellSummary]]:
    """Cells that differ in ``ar_step`` only, ordered by it, named by what sets them apart from others."""
    cells = [s.cell for s in summaries]
    found: dict[str, list[CellSummary]] = {}
    for s in sorted((s for s in summaries if s.made), key=lambda s: s.cell.ar_step):
        rest = label(s.cell, cells).partition(", ")[2]
        found.setdefault(rest or "generated", []).append(s)
    return found


def _ways(
    summaries: Sequence[CellSummary],
    made: Sequence[VideoRow],
    records: dict[str, Record],
    ranking: Ranking,
    names: dict[str, str],
) -> list[Curve]:
    """How the longest videos change on their way: each statistic of every part, means over a cell."""
    longest = max((s.cell.num_frames for s in summaries if s.made), default=0)
    chosen = [s.cell for s in summaries if s.made and s.cell.num_frames == longest][:6]
    length = part_length(longest) if longest else 1
    plots = []
    for name, meaning in STATISTICS.items():
        series: dict[str, tuple[list[float], list[float]]] = {}
        for cell in chosen:
            values = [records[r.id].statistics.get(name, []) for r in made if r.cell == cell.name]
            means = np.mean([v for v in values if v], axis=0).tolist() if any(values) else []
            series[names[cell.name]] = ([length * (i + 0.5) for i in range(len(means))], means)
        if length in ranking.real:
            level = float(np.mean([clip[name] for clip in ranking.real[length]]))
            series["real clips"] = ([0.0, float(longest)], [level, level])
        if any(x for x, _ in series.values()):
            plots.append(Curve(f"{name.capitalize()} along {longest} frames", "frame", meaning, series, False))
    return plots


# Pictures


def _frames(row: VideoRow) -> np.ndarray:
    """uint8 ``(F, H, W, 3)``, reduced where it is large."""
    video = decode_clip(storage.read_bytes(row.uri), 0, row.num_frames)
    shrink = max(video.shape[1] // (2 * SIDE), 1)
    return video[:, ::shrink, ::shrink]


def _first(made: Sequence[VideoRow], cell: str, count: int) -> list[VideoRow]:
    """The first videos of a cell, classes in turn."""
    return sorted((r for r in made if r.cell == cell), key=lambda r: (r.seed, r.label))[:count]


def _playing(title: str, caption: str, rows: Sequence[VideoRow], fps: float) -> Video:
    clips = [_frames(row) for row in rows]
    longest = max(len(clip) for clip in clips)
    side = max(clip.shape[1] for clip in clips)
    # Shorter ones begin again, so that videos of different lengths can play together.
    together = np.stack([_enlarge(clip, side)[np.arange(longest) % len(clip)] for clip in clips])
    tiled = tile(together, columns=min(4, len(clips)), scale=max(SIDE // side, 1))
    return Video(title, caption, encode_video(tiled, fps, crf=23), "video/mp4")


def _enlarge(clip: np.ndarray, side: int) -> np.ndarray:
    """To ``side`` pixels, by nearest neighbours."""
    index = np.arange(side) * clip.shape[1] // side
    return clip[:, index][:, :, index]


def _sheets(cells: Sequence[object], made: Sequence[VideoRow], names: dict[str, str]) -> list[Sheet]:
    """For each class the same seed in every cell, a row a cell."""
    sheets = []
    order = {name: i for i, name in enumerate(names)}
    shown = {cell.name for cell in cells}  # type: ignore[attr-defined]
    for number in sorted({row.label for row in made}):
        mine = [row for row in made if row.label == number and row.cell in shown]
        for seed in sorted({row.seed for row in mine})[:SHEET_SEEDS]:
            chosen = sorted((r for r in mine if r.seed == seed), key=lambda r: order[r.cell])
            if not chosen:
                continue
            clips = [_frames(row) for row in chosen]
            side, columns = max(c.shape[1] for c in clips), min(16, max(len(c) for c in clips))
            picked = [_enlarge(c[np.linspace(0, len(c) - 1, columns).round().astype(int)], side) for c in clips]
            png = contact_sheet(np.stack(picked), [names[row.cell] for row in chosen], scale=max(SIDE // 2 // side, 1))
            title = f"{chosen[0].class_name or 'Without a class'}, seed {seed}"
            sheets.append(Sheet(title, "The same noise in every cell, a row each; time runs to the right.", png))
    return sheets


# Words


def _caveats(
    config: SweepConfig,
    summaries: Sequence[CellSummary],
    ranking: Ranking,
    notes: Sequence[str],
    failures: Sequence[str],
    shown: int,
) -> list[str]:
    lines = []
    if config.evaluate != "none":
        scoring = config.scoring
        protocol = "quick" if config.evaluate == "quick" else config.scores.protocol
        lines.append(
            f"Scores: protocol {protocol}, the first {scoring.num_frames} frames of {scoring.num_clips} videos a cell "
            f"against as many real clips of {config.real} ({scoring.split}); scores/ has the full protocol."
        )
        if scoring.num_clips < 2048:
            lines.append(f"Distances of {scoring.num_clips} clips are biased upwards: compare cells of this page only.")
    lines += [ranking.meaning, *notes, *failures]
    if shown < len(summaries):
        lines.append(f"Videos and sheets are of the first {shown} of {len(summaries)} cells.")
    return lines


def _command(config: SweepConfig) -> str:
    """The call that was made, or what does the same where the job was not started by one."""
    if Path(sys.argv[0]).name in ("ardiff", "sweep.py") and "sweep" in (*sys.argv, Path(sys.argv[0]).stem):
        arguments = sys.argv[2:] if sys.argv[1:2] == ["sweep"] else sys.argv[1:]
        return shlex.join(["ardiff", "sweep", *arguments])
    return f"ardiff sweep --config {storage.join(config.output, 'config.yaml')}"
