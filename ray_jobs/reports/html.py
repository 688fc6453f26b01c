"""A run's report as a single HTML file. Tables, curves, images and videos are embedded; nothing is loaded from
outside."""

import base64
import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

PLOT_WIDTH, PLOT_HEIGHT = 440.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 10.0, 40.0
"""Margins of a plot, in the units of its SVG."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the run."""

    name: str
    seconds: float
    peak_mib: float
    """Peak memory in MiB."""
    status: str
    """``done``, ``failed`` or any other text."""
    note: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot of one or more series."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[list[float], list[float]]]
    """(x, y) by name, of equal length. Points that are not finite, or not positive on a log axis, are skipped."""
    log_y: bool
    labels: dict[str, list[str]] = field(default_factory=dict)
    """By series, a text beside each point. Labelled points are marked."""
    caption: str = ""

    def __post_init__(self) -> None:
        for name, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"series {name!r} of curve {self.title!r} has {len(x)} x but {len(y)} y values")
            if len(self.labels.get(name, x)) != len(x):
                raise ValueError(f"series {name!r} of curve {self.title!r} has {len(x)} points but other labels")


@dataclass(frozen=True, slots=True)
class Sheet:
    """An image, as PNG bytes."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Video:
    """A video (``video/mp4``) or an animated image (``image/webp``), as the bytes of the file."""

    title: str
    caption: str
    data: bytes
    mime: str

    def __post_init__(self) -> None:
        if self.mime.split("/")[0] not in ("video", "image"):
            raise ValueError(f"a video's mime type is video/... or image/..., not {self.mime!r}")


@dataclass(frozen=True, slots=True)
class Score:
    """A score. There is one table per unit, sorted by value."""

    name: str
    value: float
    unit: str
    note: str
    highlight: bool = False
    """Marks the score of a model, as opposed to a control."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading. All columns except the first are numbers."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"every row of table {self.title!r} must have {len(self.header)} cells")


@dataclass(frozen=True, slots=True)
class Report:
    """Content of the page. Sections without content are omitted."""

    title: str
    subtitle: str
    summary: list[str]
    stages: list[Stage]
    curves: list[Curve]
    sheets: list[Sheet]
    videos: list[Video]
    scores: list[Score]
    config_yaml: str
    versions: dict[str, str]
    caveats: list[str]
    tables: list[Table] = field(default_factory=list)
    command: str = ""
    """Command that repeats the run."""
    leading: list[Curve] = field(default_factory=list)
    """Plots before all other sections."""


def write_report(path: Path, report: Report) -> None:
    """Writes ``report`` as one HTML file. Creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(report), encoding="utf-8")


def render_report(report: Report) -> str:
    """The page as HTML text. All content is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, tick=_tick_label, duration=_duration, memory=_memory, data_uri=_data_uri)
    template = environment.from_string(files("ray_jobs.reports").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        plots=[_plot(curve) for curve in report.curves],
        leading=[_plot(curve) for curve in report.leading],
        score_tables=_score_tables(report.scores),
        total_seconds=sum(stage.seconds for stage in report.stages),
        peak_mib=max((stage.peak_mib for stage in report.stages), default=0.0),
    )


# ---------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, slots=True)
class _ScoreRow:
    score: Score
    percent: float | None
    """Length of the bar; None for a value that a log scale cannot show."""


@dataclass(frozen=True, slots=True)
class _ScoreTable:
    unit: str
    low: float
    decades: int
    rows: list[_ScoreRow]

    @property
    def high(self) -> float:
        return self.low * 10.0**self.decades


def _score_tables(scores: list[Score]) -> list[_ScoreTable]:
    """One table per unit, in order of appearance, with a log scale of whole decades."""
    tables = []
    for unit in dict.fromkeys(score.unit for score in scores):
        rows = sorted((score for score in scores if score.unit == unit), key=lambda score: score.value)
        logs = [math.log10(score.value) for score in rows if _on_log_scale(score.value)]
        low = math.floor(min(logs, default=0.0))
        decades = max(math.ceil(max(logs, default=1.0)) - low, 1)
        percents = [
            100.0 * (math.log10(score.value) - low) / decades if _on_log_scale(score.value) else None for score in rows
        ]
        tables.append(
            _ScoreTable(unit, 10.0**low, decades, [_ScoreRow(s, p) for s, p in zip(rows, percents, strict=True)])
        )
    return tables


def _on_log_scale(value: float) -> bool:
    return math.isfinite(value) and value > 0


# ----------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    path: str
    """SVG path data."""
    last: float
    points: list[tuple[float, float, str]]
    """Coordinates and texts of marked points."""


@dataclass(frozen=True, slots=True)
class _Plot:
    curve: Curve
    lines: list[_Line]
    x_ticks: list[tuple[float, str]]
    """Coordinate and label."""
    y_ticks: list[tuple[float, str]]
    size: tuple[float, float] = (PLOT_WIDTH, PLOT_HEIGHT)
    box: tuple[float, float, float, float] = (LEFT, TOP, PLOT_WIDTH - RIGHT, PLOT_HEIGHT - BOTTOM)
    """Left, top, right, bottom of the plotting area."""


def _plot(curve: Curve) -> _Plot:
    series = {
        name: [
            (x, y, text)
            for x, y, text in zip(*values, curve.labels.get(name, [""] * len(values[0])), strict=True)
            if math.isfinite(x) and (_on_log_scale(y) if curve.log_y else math.isfinite(y))
        ]
        for name, values in curve.series.items()
    }
    points = [point for values in series.values() for point in values]
    if not points:
        return _Plot(curve, [], [], [])
    x_axis = _Axis([x for x, _, _ in points], LEFT, PLOT_WIDTH - RIGHT, log=False)
    y_axis = _Axis([y for _, y, _ in points], PLOT_HEIGHT - BOTTOM, TOP, log=curve.log_y)
    lines = []
    for name, values in series.items():
        if not values:
            continue
        coordinates = [(x_axis.to_svg(x), y_axis.to_svg(y), text) for x, y, text in values]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in coordinates)
        lines.append(_Line(name, path, values[-1][1], coordinates if name in curve.labels else []))
    return _Plot(curve, lines, x_axis.ticks(), y_axis.ticks())


class _Axis:
    """Maps values to SVG coordinates between ``start`` and ``end``, with a margin around the extremes."""

    def __init__(self, values: list[float], start: float, end: float, log: bool) -> None:
        self.start, self.end, self.log = start, end, log
        low, high = self._scaled(min(values)), self._scaled(max(values))
        margin = 0.04 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin

    def to_svg(self, value: float) -> float:
        return self.start + (self._scaled(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values along the axis: powers of ten, 1-2-5 steps of them, or evenly spaced values."""
        return [(self.to_svg(value), _tick_label(value)) for value in self._tick_values()]

    def _tick_values(self) -> list[float]:
        if self.log:
            for factors in ((1,), (1, 2, 5)):
                exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
                values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
                values = [value for value in values if self.low <= math.log10(value) <= self.high]
                if len(values) >= 3:
                    return values[:: math.ceil(len(values) / 7)]
            low, high = 10.0**self.low, 10.0**self.high
        else:
            low, high = self.low, self.high
        rough = (high - low) / 5.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1.0, 2.0, 5.0, 10.0) if factor * unit >= rough)
        return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


# -------------------------------------------------------------------------------------------------------- formatting


def _tick_label(value: float) -> str:
    for least, size, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{suffix}"
    return f"{value:.6g}"


def _number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.995 else f"{value:.{1 if abs(value) >= 9.95 else 2}f}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _memory(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
