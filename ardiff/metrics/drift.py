"""How long videos change along their way: distances and simple statistics of every 16 frames.

Shapes: F frames, H W pixels, S segments.
"""

import io
from dataclasses import dataclass

import numpy as np

from ardiff.report import Curve, Report, Sheet, render_report

SEGMENT = 16
"""Frames of a segment."""
STATISTICS = {
    "brightness": "mean grey level",
    "contrast": "deviation of grey levels in a frame",
    "saturation": "mean spread of a pixel's channels",
    "sharpness": "mean difference of neighbouring pixels",
    "motion": "mean difference of successive frames",
}
"""What is measured of a clip, all in grey levels of 0 to 255."""


def clip_statistics(clip: np.ndarray) -> np.ndarray:
    """The ``STATISTICS`` of one clip, uint8 ``(F, H, W, 3)`` to float32 ``(5,)``. Raises ValueError."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 2:
        raise ValueError(f"expected a uint8 clip (F, H, W, 3) with F >= 2, got {clip.dtype} {clip.shape}")
    frames = clip.astype(np.float32)
    grey = frames.mean(axis=-1)  # (F, H, W)
    sharpness = (np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean()) / 2
    values = [
        grey.mean(),
        grey.std(axis=(1, 2)).mean(),
        (frames.max(axis=-1) - frames.min(axis=-1)).mean(),
        sharpness,
        np.abs(np.diff(frames, axis=0)).mean(),
    ]
    return np.array(values, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """One set's way."""

    name: str
    fvd: list[float]
    """Distance of each segment to real clips, ``(S,)``."""
    statistics: dict[str, list[float]]
    """Mean of each of the ``STATISTICS`` per segment, ``(S,)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """All sets, and what real clips show."""

    sets: list[Drift]
    real_fvd: float | None
    """Distance between two sets of real clips."""
    real_statistics: dict[str, float]
    num_clips: int
    protocol: str
    """The protocol of the distances, on one line."""


def curves(report: DriftReport) -> list[Curve]:
    """A plot of the distance and one of each statistic along time, real clips as a level line."""
    segments = len(report.sets[0].fvd)
    middles = [SEGMENT * (s + 0.5) for s in range(segments)]
    level = None if report.real_fvd is None else [report.real_fvd] * segments
    real = {} if level is None else {"real, another set": (middles, level)}
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
    figure.suptitle(f"Drift, {report.num_clips} videos a set; {report.protocol}", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(report: DriftReport, config_yaml: str, versions: dict[str, str]) -> str:
    """A self-contained HTML page with the plots."""
    return render_report(
        Report(
            title="Drift over long videos",
            subtitle=f"Every {SEGMENT} frames of {report.num_clips} videos a set",
            summary=[f"{d.name}: FVD {d.fvd[0]:.1f} at the start, {d.fvd[-1]:.1f} at the end." for d in report.sets],
            stages=[],
            curves=curves(report),
            sheets=[Sheet("All in one picture", report.protocol, draw(report))],
            videos=[],
            scores=[],
            config_yaml=config_yaml,
            versions=versions,
            caveats=["Every segment is compared with the same real clips, so what changes is the video."],
        )
    )
