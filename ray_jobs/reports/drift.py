"""Drift of long videos as plots, in one PNG and on an HTML page."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from typing import Any

from ardiff.data import storage
from ardiff.metrics.drift import SEGMENT, SHAPE_STATISTICS, STATISTICS, Drift, DriftReport
from ray_jobs.reports.html import Curve, Report, Sheet, Table, render_report
from ray_jobs.runtime.stages import versions

COLUMNS = 4
"""Plots beside each other."""


def write_drift(report: DriftReport, output: str, config_yaml: str) -> None:
    """Writes ``drift.json``, ``drift.png`` and ``drift.html`` to the folder ``output``."""
    storage.write_bytes(storage.join(output, "drift.json"), json.dumps(asdict(report), indent=1).encode())
    storage.write_bytes(storage.join(output, "drift.png"), draw(report))
    storage.write_bytes(storage.join(output, "drift.html"), page(report, config_yaml, versions()).encode())


def curves(report: DriftReport) -> list[Curve]:
    """A plot of FVD and of each statistic over time. Real clips are a horizontal line."""
    segments = len(report.sets[0].fvd)
    middles = [SEGMENT * (s + 0.5) for s in range(segments)]
    real = {} if report.real_fvd is None else {"real vs real": (middles, [report.real_fvd] * segments)}
    plots = [Curve("FVD", "frame", "FVD", {d.name: (middles, d.fvd) for d in report.sets} | real, log_y=False)]
    meanings = STATISTICS | SHAPE_STATISTICS
    for name in report.real_statistics:
        series = {d.name: (middles, d.statistics[name]) for d in report.sets}
        series["real"] = (middles, [report.real_statistics[name]] * segments)
        plots.append(Curve(name.capitalize(), "frame", meanings[name], series, log_y=False))
    colour = {d.name: (middles, d.colour) for d in report.sets}
    return [*plots, Curve("Colour", "frame", "distance from the first segment", colour, log_y=False)]


def draw(report: DriftReport) -> bytes:
    """All plots as one PNG."""
    from matplotlib.figure import Figure  # imports slowly

    plots = curves(report)
    rows = math.ceil(len(plots) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.25 * rows), layout="constrained")
    for number, plot in enumerate(plots):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        for name, (x, y) in plot.series.items():
            style: dict[str, Any] = {"color": "grey", "linestyle": "--"} if name.startswith("real") else {"marker": "o"}
            axes.plot(x, y, label=name, **style)
        axes.set_title(plot.title)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label, fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"Drift, {report.num_clips} videos per set; {report.protocol}", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(report: DriftReport, config_yaml: str, versions: dict[str, str]) -> str:
    """A self-contained HTML page with the plots."""
    return render_report(
        Report(
            title="Drift over long videos",
            subtitle=f"Every {SEGMENT} frames of {report.num_clips} videos per set",
            summary=[_summary(drift) for drift in report.sets],
            stages=[],
            curves=curves(report),
            sheets=[Sheet("All in one picture", report.protocol, draw(report))],
            videos=[],
            scores=[],
            tables=[_errors(report)],
            config_yaml=config_yaml,
            versions=versions,
            caveats=["Every segment is compared with the same real clips, so a change is one of the videos."],
        )
    )


def _errors(report: DriftReport) -> Table:
    """The drift errors of all sets and of real clips."""
    sets = {drift.name: drift.error for drift in report.sets} | {"real": report.real_error}
    return Table(
        "Drift error",
        "Video Drift Error of each statistic, the mean over videos and its 95 % interval: the sum over segments of the "
        "relative change from the first one, early ones with more weight. Compare videos of one length.",
        ["set", *STATISTICS],
        [[name, *(str(error[statistic]) for statistic in STATISTICS)] for name, error in sets.items()],
    )


def _summary(drift: Drift) -> str:
    text = f"{drift.name}: FVD {drift.fvd[0]:.1f} at the start, {drift.fvd[-1]:.1f} at the end"
    if identity := drift.statistics.get("frame identity"):
        text += f"; frames of the asked class {100 * identity[0]:.0f} % and {100 * identity[-1]:.0f} %"
    return f"{text}; colour moves by {drift.colour[-1]:.1f} grey levels."
