"""Ranks the videos of a sweep: by their deviation from real clips, or by their drift if there are no real clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.metrics.drift import STATISTICS
from ardiff.metrics.store import FeatureStore
from ardiff.sweep.specs import Record, VideoSpec
from ardiff.sweep.statistics import Statistics, deviation, drift, segment_length
from ray_jobs.evaluation.datasets import list_videos, open_videos, real_clips
from ray_jobs.evaluation.drift import measure_statistics
from ray_jobs.evaluation.features import ClipSet, Workers, data_keys, extract
from ray_jobs.generation.config import SweepConfig
from ray_jobs.reports.html import Table, Video
from ray_jobs.reports.sweep_media import play_together

EXTREMES = 6
"""Best and worst videos on the page."""
REAL_CLIPS = 64
"""Real clips that videos are compared with."""


class Ranking:
    """One number per video; smaller is better."""

    def __init__(
        self,
        specs: Sequence[VideoSpec],
        values: dict[str, float],
        name: str,
        caption: str,
        real: dict[int, list[Statistics]],
    ) -> None:
        """``values`` by spec id; ``real`` holds statistics of real clips by their number of frames."""
        self.specs, self.values, self.name, self.caption, self.real = specs, values, name, caption, real
        by_point: dict[str, list[float]] = {}
        for spec in specs:
            by_point.setdefault(spec.point, []).append(values[spec.id])
        self.means = {point: float(np.mean(numbers)) for point, numbers in by_point.items()}
        """Of the videos of each point, and of the real clips as ``real``."""
        if real:
            self.means["real"] = float(np.mean([deviation(clip, clips) for clips in real.values() for clip in clips]))

    @classmethod
    def of(cls, config: SweepConfig, specs: Sequence[VideoSpec], records: dict[str, Record]) -> Ranking:
        """Ranks complete videos by the statistics in their records."""
        if config.real is None:
            values = {spec.id: drift(records[spec.id].statistics) for spec in specs}
            caption = (
                f"Drift: the largest relative change of {', '.join(STATISTICS)} between the first segment of a video "
                "and a later one. A video that stands still has none: give real=... to compare with real clips instead."
            )
            return cls(specs, values, "drift", caption, {})
        lengths = {spec.id: segment_length(spec.sampling.num_frames) for spec in specs}
        real = {length: _real_statistics(config, length) for length in set(lengths.values())}
        values = {spec.id: deviation(records[spec.id].statistics, real[lengths[spec.id]]) for spec in specs}
        caption = (
            f"Deviation: the distance of the segments of a video from {REAL_CLIPS} real clips, in standard deviations "
            f"of the real clips (root mean square over segments), for the one of {', '.join(STATISTICS)} where it is "
            "largest."
        )
        return cls(specs, values, "deviation", caption, real)

    def ordered(self) -> list[VideoSpec]:
        """From best to worst, without videos that have no number."""
        ranked = [spec for spec in self.specs if np.isfinite(self.values[spec.id])]
        return sorted(ranked, key=lambda spec: (self.values[spec.id], spec.id))

    def extreme_videos(self, fps: float) -> list[Video]:
        """The best videos, which play together, and the worst; none if there are too few videos."""
        ranked = self.ordered()
        if len(ranked) < 2 * EXTREMES:
            return []
        videos = []
        for title, chosen in (("Best", ranked[:EXTREMES]), ("Worst", ranked[::-1][:EXTREMES])):
            low, high = sorted((self.values[chosen[0].id], self.values[chosen[-1].id]))
            caption = f"{self.name.capitalize()} {low:.2f} to {high:.2f}; the table below lists them in this order."
            videos.append(play_together(f"{title} by {self.name}", caption, chosen, fps))
        return videos

    def table(self, labels: dict[str, str]) -> Table:
        """The best and the worst videos with their files; ``labels`` by point name."""
        ranked = self.ordered()
        chosen = ranked if len(ranked) < 2 * EXTREMES else [*ranked[:EXTREMES], *ranked[: -EXTREMES - 1 : -1]]
        rows = [
            [
                labels[spec.point],
                spec.subject or "none",
                str(spec.sampling.seed),
                f"{self.values[spec.id]:.2f}",
                spec.uri.rpartition("/")[2],
            ]
            for spec in chosen
        ]
        return Table(
            "Best and worst videos", self.caption, ["point", "class or prompt", "seed", self.name, "file"], rows
        )


def _real_statistics(config: SweepConfig, length: int) -> list[Statistics]:
    """Statistics of real clips of ``length`` frames, cached in the folder of the scores."""
    assert config.real is not None
    scoring = config.scoring
    span = (length - 1) * scoring.stride + 1
    records = open_videos(list_videos(config.real), scoring.split, span, scoring.fps).records
    clips = real_clips(records, REAL_CLIPS, scoring, length)
    key = fingerprint(["statistics", length, scoring.resolution], data_keys(clips))
    store = FeatureStore(storage.join(config.output, "scores", "features", f"statistics-{key}"))
    clip_sets, workers = [ClipSet(clips, store)], Workers.on_cpus(scoring)
    [(values, _)] = extract("real statistics", clip_sets, measure_statistics, length, scoring.resolution, workers)
    return [{name: [float(v[0, i])] for i, name in enumerate(STATISTICS)} for v in values.array()]
