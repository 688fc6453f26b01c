"""The results of an ablation as Markdown tables, as files and as a picture.

A unit is one variant trained with one seed. It has one result per ``ar_step``.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ardiff.data import storage
from ardiff.metrics.seeds import CONFIDENCE, Estimate, estimate_mean, ratio_over_seeds

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
"""Markers in a Markdown file. The tables replace the text between them; the text around them stays."""
SHARES = {
    "frame_identity": "Frames that show the asked class",
    "neighbours_alike": "Neighbouring frames that show the same shape",
    "motion": "Videos that pass all motion checks",
}
"""The fields of a :class:`Result` that have a table of shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A row of the tables: the base configuration with some settings changed."""

    name: str
    """Name, also of its folder: letters, digits, ``-`` and ``_``."""
    question: str = ""
    """The question it answers, for example "timestep sampling"."""
    settings: tuple[str, ...] = ()
    """``key=value`` settings of the quickstart that it changes. The first variant, the baseline of the comparison,
    usually has none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name must be letters, digits, - and _, not {self.name!r}: it becomes a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The scores of a unit at one ``ar_step``, or the reason why it has none."""

    variant: str
    seed: int
    ar_step: int
    distance: float | None = None
    """Distance of the quick evaluation to held-out clips; smaller is better."""
    frame_identity: float | None = None
    """Share of the frames that show the asked class; None for data without known shapes, as the next three."""
    neighbours_alike: float | None = None
    """Share of the neighbouring frames that show the same shape."""
    motion: float | None = None
    """Share of the videos that pass all motion checks."""
    recognised: float | None = None
    """Share of the videos whose class wins a vote of their frames."""
    reconstruction: float | None = None
    """Distance of the AR-VAE's reconstructions of held-out clips."""
    psnr: float | None = None
    """PSNR of these reconstructions in dB."""
    real: float | None = None
    """Distance of other held-out clips: the real-vs-real baseline."""
    train_seconds: float | None = None
    """Wall time of the AR-DiT's training."""
    reason: str = ""
    """Why there are no scores."""


def ratio(results: Iterable[Result], variant: str, baseline: str, ar_step: int) -> Estimate | None:
    """The distance of ``variant`` over that of ``baseline``, over the seeds that both have; None if there are none."""
    values, baseline_values = (_by_seed(results, name, ar_step, "distance") for name in (variant, baseline))
    return ratio_over_seeds(values, baseline_values)


def _by_seed(results: Iterable[Result], variant: str, ar_step: int, quantity: str) -> dict[int, float]:
    selected = [r for r in results if r.variant == variant and r.ar_step == ar_step]
    return {r.seed: float(getattr(r, quantity)) for r in selected if getattr(r, quantity) is not None}


# ------------------------------------------------------------------------------------------------------------- tables


def tables(variants: Sequence[Variant], results: Sequence[Result], header: Sequence[str]) -> str:
    """The results as Markdown: the ``header`` lines, one table per quantity, and the failures."""
    steps = sorted({r.ar_step for r in results})
    base = variants[0].name
    blocks = ["\n".join(f"- {line}" for line in header)]
    blocks += [
        f"**Distance to held-out clips** (smaller is better): geometric mean over seeds, [{CONFIDENCE:.0%} interval]. "
        f"{_reference_distances(results)}",
        _table(variants, steps, lambda v, s: _mean_text(results, v, s, "distance", log=True)),
        f"**Distance divided by that of `{base}`**, in pairs of the same seed: ratio, [{CONFIDENCE:.0%} interval]. "
        "Bold: the interval excludes 1. By chance, it does so in one of twenty cells.",
        _table(variants[1:], steps, lambda v, s: _ratio_text(ratio(results, v, base, s))),
    ]
    for quantity, title in SHARES.items():
        if any(getattr(r, quantity) is not None for r in results):
            blocks += [
                f"**{title}**, in percent: mean over seeds, [{CONFIDENCE:.0%} interval].",
                _table(variants, steps, functools.partial(_percent_text, results, quantity)),
            ]
    if failed := sorted({(r.variant, r.seed, r.reason) for r in results if r.reason}):
        lines = [f"- `{name}`, seed {seed}: {reason}" for name, seed, reason in failed]
        blocks += ["**Failed:**", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def _percent_text(results: Sequence[Result], quantity: str, variant: str, ar_step: int) -> str:
    return _mean_text(results, variant, ar_step, quantity, scale=100.0)


def _reference_distances(results: Iterable[Result]) -> str:
    complete = [r for r in results if r.real is not None and r.reconstruction is not None]
    if not complete:
        return ""
    return f"Real clips reach {complete[0].real:.1f}, their reconstructions {complete[0].reconstruction:.1f}."


def _table(variants: Sequence[Variant], steps: Sequence[int], text: Callable[[str, int], str]) -> str:
    lines = [
        "| question | variant | " + " | ".join(f"`ar_step` {s}" for s in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for variant in variants:
        texts = " | ".join(text(variant.name, s) for s in steps)
        lines.append(f"| {variant.question} | `{variant.name}` | {texts} |")
    return "\n".join(lines)


def _mean_text(
    results: Sequence[Result], variant: str, ar_step: int, quantity: str, log: bool = False, scale: float = 1.0
) -> str:
    values = list(_by_seed(results, variant, ar_step, quantity).values())
    if not values:
        return "failed" if any(r.variant == variant and r.reason for r in results) else "-"
    estimate = estimate_mean([scale * v for v in values], log)
    digits = 0 if scale != 1.0 else 1
    low, high = estimate.low, estimate.high
    if not log:  # a share is between 0 and 1
        low, high = max(low, 0.0), min(high, scale)
    interval = "" if estimate.count == 1 else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{estimate.mean:.{digits}f}{interval}"


def _ratio_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.count == 1:
        return f"{estimate.mean:.2f}"
    text = f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
    return text if estimate.low <= 1 <= estimate.high else f"**{text}**"


def insert_tables(document: str, text: str) -> str:
    """``document`` with ``text`` between its markers, or at its end if it has no markers."""
    block = f"{BEGIN}\n\n{text}\n{END}"
    if BEGIN in document and END in document:
        return document[: document.index(BEGIN)] + block + document[document.index(END) + len(END) :]
    return f"{document.rstrip()}\n\n{block}\n".lstrip()


# -------------------------------------------------------------------------------------------------------------- files


def write_results(folder: str, variants: Sequence[Variant], results: Sequence[Result], about: dict[str, Any]) -> None:
    """Writes ``results.json`` and ``results.parquet``, one row per unit and ``ar_step``, and ``ablation.png``."""
    rows = [asdict(r) for r in results]
    content = {"about": about, "variants": [asdict(v) for v in variants], "results": rows}
    storage.write_bytes(storage.join(folder, "results.json"), json.dumps(content, indent=1).encode())
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    storage.write_bytes(storage.join(folder, "results.parquet"), buffer.getvalue())
    storage.write_bytes(storage.join(folder, "ablation.png"), draw(variants, results))


def draw(variants: Sequence[Variant], results: Sequence[Result]) -> bytes:
    """A PNG of each variant's distance and frame identity: a dot per seed, a bar for the mean and its interval.

    Intervals that exceed the axes are cut.
    """
    from matplotlib.figure import Figure  # imports slowly

    steps = sorted({r.ar_step for r in results})
    panels = [("distance", "distance to real clips (smaller is better)")]
    if any(r.frame_identity is not None for r in results):
        panels.append(("frame_identity", "frames of the asked class"))
    figure = Figure(figsize=(max(7.0, 1.5 * len(variants)), 4.0 * len(panels)), layout="constrained")
    for axes, (quantity, label) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels, strict=True):
        _draw_estimates(axes, variants, results, steps, quantity)
        _scale_axis(axes, len(variants), results, quantity)
        axes.set_xlim(-0.5, len(variants) - 0.5)
        axes.set_xticks(range(len(variants)), [v.name.replace("_", "\n") for v in variants], fontsize="small")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        for edge in range(1, len(variants)):
            axes.axvline(edge - 0.5, color="grey", alpha=0.2, linewidth=1)
    legend = [
        figure.axes[0].plot([], [], "_", color=f"C{n}", markersize=12, markeredgewidth=2.5)[0]
        for n in range(len(steps))
    ]
    figure.legend(legend, [f"ar_step {step}" for step in steps], ncols=len(steps), loc="outside lower center")
    seeds = len({r.seed for r in results})
    figure.suptitle(
        f"Dots: seeds (up to {seeds}). Bars: mean over seeds and {CONFIDENCE:.0%} interval", fontsize="small"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_estimates(
    axes: Any, variants: Sequence[Variant], results: Sequence[Result], steps: Sequence[int], quantity: str
) -> None:
    for number, step in enumerate(steps):
        colour = f"C{number}"
        for position, variant in enumerate(variants):
            values = list(_by_seed(results, variant.name, step, quantity).values())
            if not values:
                continue
            x = position + 0.7 * ((number + 0.5) / len(steps) - 0.5)
            estimate = estimate_mean(values, log=quantity == "distance")
            axes.plot([x] * len(values), values, "o", color=colour, alpha=0.45, markersize=4)
            axes.plot([x], [estimate.mean], "_", color=colour, markersize=12, markeredgewidth=2.5)
            if estimate.count > 1:
                axes.plot([x, x], [estimate.low, estimate.high], color=colour, linewidth=1.4)


def _scale_axis(axes: Any, num_variants: int, results: Sequence[Result], quantity: str) -> None:
    """Scales the vertical axis, and marks the distance of real clips."""
    values = [value for r in results if (value := getattr(r, quantity)) is not None]
    if not values:
        return
    if quantity != "distance":
        axes.set_ylim(-0.03, 1.03)
        return
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    if real := [r.real for r in results if r.real is not None]:
        axes.set_ylim(bottom=min(min(values), real[0]) / 1.2)
        axes.axhline(real[0], color="grey", linestyle="--", linewidth=1)
        axes.annotate("real clips", (num_variants - 0.5, real[0]), ha="right", va="bottom", color="grey")
