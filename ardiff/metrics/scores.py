"""Scores as files and as a table, each with its protocol, its real-vs-real baseline and its interval."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from ardiff.config import build
from ardiff.data import storage
from ardiff.data.tables import to_parquet
from ardiff.errors import ConfigError, DataError
from ardiff.metrics.manifold import SetChecks
from ardiff.metrics.protocol import FROM_FILES, Protocol
from ardiff.metrics.registry import VideoMetric, find_metric


@dataclass(frozen=True, kw_only=True, slots=True)
class SetScore:
    """One metric of one set of videos."""

    set: str
    """Name of the set."""
    metric: str
    score: float
    baseline: float | None
    """The same metric between two sets of real clips; None for paired metrics."""
    baseline_num: int | None
    """Clips on each side of the baseline: as many as the score has, unless there are too few real videos."""
    low: float | None
    """Lower end of the 95 % interval over videos; None without resampling."""
    high: float | None
    infinity: float | None
    """The distance extrapolated to infinitely many videos; of Frechet distances of many videos only."""
    fake: str
    """Path or URI of the generated videos."""
    fake_data: str
    """Fingerprint of the generated clips."""
    protocol: Protocol
    infinity_low: float | None = None
    """Lower end of the 95 % interval of ``infinity``."""
    infinity_high: float | None = None
    checks: SetChecks | None = None
    """Variety, quality and copies; None for paired metrics, features of single frames, and reconstructions."""
    notes: tuple[str, ...] = ()
    """What a reader of the score should know, a sentence each."""


def write_scores(
    folder: str, scores: Sequence[SetScore], versions: dict[str, str], extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Writes ``scores.json`` and ``scores.parquet``, one row per score, and returns the content of ``scores.json``.

    ``extra`` adds entries to ``scores.json``.
    """
    content: dict[str, Any] = {"scores": [asdict(s) for s in scores], "versions": versions, **(extra or {})}
    storage.write_bytes(storage.join(folder, "scores.json"), json.dumps(content, indent=1).encode())
    flat = []
    for score in content["scores"]:
        protocol = {f"protocol_{key}": value for key, value in score["protocol"].items()}
        checks = {f"checks_{field.name}": (score["checks"] or {}).get(field.name) for field in fields(SetChecks)}
        own = {key: value for key, value in score.items() if key not in ("protocol", "checks", "notes")}
        flat.append(own | protocol | checks | {"notes": " ".join(score["notes"]), "versions": json.dumps(versions)})
    storage.write_bytes(storage.join(folder, "scores.parquet"), to_parquet(pa.Table.from_pylist(flat)))
    return content


def read_scores(uri: str) -> list[SetScore]:
    """Scores of a folder or of a ``scores.json``. Raises DataError if it has no scores with their protocol."""
    file = uri if uri.endswith(".json") else storage.join(uri, "scores.json")
    if not storage.exists(file):
        raise DataError(f"There are no scores in {uri}: give folders that `ardiff evaluate` wrote.")
    try:
        content = json.loads(storage.read_bytes(file))
        entries = content["scores"]
        return [score_of(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise DataError(
            f"{file} holds no scores with a complete protocol: score the videos again with `ardiff evaluate`."
        ) from error


def score_of(entry: dict[str, Any]) -> SetScore:
    """A score from its entry in ``scores.json``, which is ``asdict(score)``."""
    protocol, notes = build(Protocol, entry["protocol"]), tuple(entry.get("notes", ()))
    checks = None if entry.get("checks") is None else build(SetChecks, entry["checks"])
    return SetScore(**{**entry, "protocol": protocol, "notes": notes, "checks": checks})


def describe_protocol(protocol: Protocol) -> str:
    """The protocol on one line."""
    p = protocol
    network = f"{p.network} {p.weights.removeprefix(f'{p.network}-')[:12]}" if p.network != "none" else p.feature
    rate = f" at {p.fps:g} frames/s" if p.fps else ""
    fit = "" if p.resolution.partition("x")[0] == p.resolution.rpartition("x")[2] and p.fit == "crop" else f" ({p.fit})"
    frames = f"{p.num_frames} frames, stride {p.stride}{rate}, {p.resolution}{fit}"
    if p.name == "paired":
        return f"{network}, {frames}, {p.num_real} pairs"
    if p.resolution == FROM_FILES:
        return f"{p.name}: {p.feature}, ddof {p.ddof}, {p.num_real} real and {p.num_fake} generated videos"
    clips = f"{p.num_real} real ({p.real_split}) and {p.num_fake} generated clips"
    return f"{p.name}: {network}, {frames}, {p.resize}, ddof {p.ddof}, {clips}"


def table(rows: Sequence[tuple[str, SetScore]]) -> str:
    """A table of named scores, the best first within each metric, under their common protocol.

    The shares of videos share one table at the end, with a column per metric.
    """
    lines: list[str] = []
    shares = [(label, score) for label, score in rows if isinstance(find_metric(score.metric), VideoMetric)]
    names = {score.metric for _, score in shares}
    for name in dict.fromkeys(score.metric for _, score in rows if score.metric not in names):
        metric = find_metric(name)
        metric_rows = [(label, score) for label, score in rows if score.metric == name]
        metric_rows.sort(key=lambda item: metric.rank(item[1].score))
        width = max(len(label) for label, _ in metric_rows)
        heading = f"{name}{f' in {metric.unit}' if metric.unit else ''}"
        lines.append(f"{heading} ({describe_protocol(metric_rows[0][1].protocol)})")
        columns = ("score", "95 % interval", "real vs real", "N to infinity")
        lines.append(f"  {'':<{width}} {columns[0]:>11} {columns[1]:>23} {columns[2]:>18} {columns[3]:>34}".rstrip())
        notes: dict[str, list[str]] = {}
        for label, s in metric_rows:
            interval = _interval(s.low, s.high)
            baseline = "" if s.baseline is None else _number(s.baseline)
            if s.baseline is not None and s.baseline_num != s.protocol.num_real:
                baseline += f" (N {s.baseline_num})"
            infinity = "" if s.infinity is None else _number(s.infinity)
            if s.infinity_low is not None:
                infinity += f" ({_interval(s.infinity_low, s.infinity_high)})"
            cells = f"{_number(s.score):>11} {interval:>23} {baseline:>18} {infinity:>34}"
            lines.append(f"  {label:<{width}} {cells}".rstrip())
            if s.checks is not None:
                lines.append(f"  {'':<{width}} {s.checks.describe()}")
            for note in s.notes:
                notes.setdefault(note, []).append(label)
        for note, labels in notes.items():
            of = "" if len(labels) == len(metric_rows) else f"{', '.join(labels)}: "
            lines += textwrap.wrap(f"{of}{note}", 118, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join([*lines, *_share_table(shares)])


def _share_table(shares: Sequence[tuple[str, SetScore]]) -> list[str]:
    """The lines of a table of shares in percent: a row per label, the best first, and a column per metric."""
    if not shares:
        return []
    values = {(label, score.metric): format_score(score.metric, score.score) for label, score in shares}
    names = list(dict.fromkeys(score.metric for _, score in shares))
    best_first = sorted(shares, key=lambda item: item[1].score, reverse=True)
    labels = dict.fromkeys(label for label, score in best_first if score.metric == names[0])
    labels |= dict.fromkeys(label for label, _ in shares)
    width = max(len(label) for label in labels)
    protocol = shares[0][1].protocol
    lines = [f"means over videos ({describe_protocol(protocol)})", f"  {'':<{width}} {'  '.join(names)}"]
    for label in labels:
        cells = "  ".join(f"{values.get((label, name), ''):>{len(name)}}" for name in names)
        lines.append(f"  {label:<{width}} {cells}".rstrip())
    return lines


def format_score(metric: str, value: float) -> str:
    """A score in the unit of its metric: a share in percent, any other as a number."""
    return f"{100 * value:.0f} %" if isinstance(find_metric(metric), VideoMetric) else _number(value)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(low)} .. {_number(high)}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
