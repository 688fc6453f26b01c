"""Summaries of a sweep by point, as data and as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ardiff.sampling.params import PER_VIDEO, SamplingParams
from ardiff.sweep.grid import SweepPoint
from ardiff.sweep.specs import Record, VideoSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PointScore:
    """A metric of a sweep point, or of another set to compare with."""

    set: str
    """Name of the sweep point or of the other set."""
    metric: str
    value: float
    low: float | None
    """Lower end of the 95 % interval, if there is one."""
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PointSummary:
    """The results of a sweep point."""

    point: SweepPoint
    videos: int
    generated: int
    failed: int
    seconds: float
    """Mean seconds per video, its share of its batch; NaN without a video, as are the next two."""
    cpu_seconds: float
    frames_per_second: float
    """Of one worker."""


def summarise(
    points: Sequence[SweepPoint], specs: Sequence[VideoSpec], records: Mapping[str, Record]
) -> list[PointSummary]:
    """One summary per point, in their order; ``records`` by spec id."""
    return [_summarise_point(point, [s for s in specs if s.point == point.name], records) for point in points]


def _summarise_point(point: SweepPoint, specs: Sequence[VideoSpec], records: Mapping[str, Record]) -> PointSummary:
    point_records = [records[spec.id] for spec in specs if spec.id in records]
    complete = [record for record in point_records if record.status == "ok"]
    seconds = float(np.mean([r.seconds for r in complete])) if complete else float("nan")
    return PointSummary(
        point=point,
        videos=len(specs),
        generated=len(complete),
        failed=len(point_records) - len(complete),
        seconds=seconds,
        cpu_seconds=float(np.mean([r.cpu_seconds for r in complete])) if complete else float("nan"),
        frames_per_second=point.params.num_frames / seconds,
    )


def label(point: SweepPoint, points: Sequence[SweepPoint], *skipped: str) -> str:
    """The parameters in which a point differs from others, and always ``ar_step``; without those ``skipped``."""
    texts = []
    for name in ("ar_step", *(f.name for f in fields(SamplingParams) if f.name not in ("ar_step", *PER_VIDEO))):
        value = getattr(point.params, name)
        if name not in skipped and (name == "ar_step" or len({getattr(p.params, name) for p in points}) > 1):
            texts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    if len({p.model.uri for p in points}) > 1:
        texts.append(point.model.uri)
    return ", ".join(texts)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(cells)).rstrip()
        for row in (header, *rows)
        for cells in [list(zip(row, widths, strict=True))]
    ]


def failure_table(specs: Sequence[VideoSpec], records: Mapping[str, Record], most: int = 10) -> list[str]:
    """A line per kind of failure, the most frequent first; empty without failures."""
    failed = [(s, records[s.id]) for s in specs if s.id in records and records[s.id].status == "failed"]
    kinds = Counter((record.error, record.message) for _, record in failed)
    lines = []
    for (error, message), count in kinds.most_common(most):
        spec, record = next((s, r) for s, r in failed if (r.error, r.message) == (error, message))
        attempts = f"tried {record.attempts} times" if record.attempts else "not tried"
        subject = spec.subject or f"class {spec.sampling.class_label}"  # the class may be one that the model lacks
        video = f"{spec.point}, {subject}, seed {spec.sampling.seed}"
        lines.append(f"{count} x {error}: {message} First: {video}, {attempts}.")
    return lines + ([f"... and {len(kinds) - most} other kinds."] if len(kinds) > most else [])
