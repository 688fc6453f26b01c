"""Drift of long videos as plots, in one PNG and on an HTML page."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

from ardiff.data import storage
from ardiff.metrics.drift import SEGMENT, STATISTICS, DriftReport
from ray_jobs.reports.html import Curve, Report, Sheet, render_report
from ray_jobs.runtime.stages import versions


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
    for name, meaning in STATISTICS.items():
        series = {d.name: (middles, d.statistics[name]) for d in report.sets}
        series["real"] = (middles, [report.real_statistics[name]] * segments)
        plots.append(Curve(name.capitalize(), "frame", meaning, series, log_y=False))
    return plots


def draw(report: DriftReport) -> bytes:
    """All plots as one PNG."""
    from matplotlib.figure import Figure  # imports slowly

    plots = curves(report)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, plot in zip(figure.subplots(2, 3).flat, plots, strict=True):
        for name, (x, y) in plot.series.items():
            style = {"color": "grey", "linestyle": "--"} if name.startswith("real") else {"marker": "o"}
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
            summary=[f"{d.name}: FVD {d.fvd[0]:.1f} at the start, {d.fvd[-1]:.1f} at the end." for d in report.sets],
            stages=[],
            curves=curves(report),
            sheets=[Sheet("All in one picture", report.protocol, draw(report))],
            videos=[],
            scores=[],
            config_yaml=config_yaml,
            versions=versions,
            caveats=["Every segment is compared with the same real clips, so a change is one of the videos."],
        )
    )
