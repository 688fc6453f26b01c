"""Ablations: variants of one recipe, each trained with several seeds on the same budget, and what their scores carry.

A unit is one variant trained with one seed; it gives one result per ``ar_step``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ardiff.data import storage
from ardiff.metrics.seeds import CONFIDENCE, Estimate, mean_over_seeds, ratio_over_seeds

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
"""Marks in a Markdown file between which the tables stand; what is written around them is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the table: the recipe with some settings changed."""

    name: str
    """What it is called, and its folder: letters, digits, ``-`` and ``_``."""
    question: str = ""
    """What it answers, for example "timestep law"; variants of one question stand together."""
    settings: tuple[str, ...] = ()
    """``key=value`` of the quickstart's configuration in which it differs; the first variant, which the others are
    compared with, usually has none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name must be letters, digits, - and _, not {self.name!r}: it becomes a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a unit scored at one ``ar_step``, or the reason why it has no scores."""

    variant: str
    seed: int
    ar_step: int
    distance: float | None = None
    """Frechet distance to held-out clips, as the protocol ``quick`` defines it; smaller is better."""
    recognised: float | None = None
    """Share of the videos in which the class asked for is recognised; None where the data have no known shapes."""
    motion: float | None = None
    """Share of the videos whose motion is plausible; None as above."""
    reconstruction: float | None = None
    """The distance of held-out clips that went through the AR-VAE."""
    psnr: float | None = None
    """What the AR-VAE reconstructs of held-out clips, in dB."""
    real: float | None = None
    """The distance of held-out clips themselves: the floor."""
    train_seconds: float | None = None
    """Wall time of the AR-DiT's training."""
    reason: str = ""
    """Why there are no scores."""


def ratio(results: Iterable[Result], variant: str, baseline: str, ar_step: int) -> Estimate | None:
    """The distance of ``variant`` over that of ``baseline``, over the seeds that both have. None if there is none."""
    values, baseline_values = (_by_seed(results, name, ar_step, "distance") for name in (variant, baseline))
    return ratio_over_seeds(values, baseline_values)


def _by_seed(results: Iterable[Result], variant: str, ar_step: int, quantity: str) -> dict[int, float]:
    rows = [r for r in results if r.variant == variant and r.ar_step == ar_step]
    return {r.seed: float(getattr(r, quantity)) for r in rows if getattr(r, quantity) is not None}


# ------------------------------------------------------------------------------------------------------------- tables


def tables(variants: Sequence[Variant], results: Sequence[Result], header: Sequence[str]) -> str:
    """All that was measured as Markdown: ``header`` lines, then one table a quantity, then what failed."""
    steps = sorted({r.ar_step for r in results})
    base = variants[0].name
    parts = ["\n".join(f"- {line}" for line in header)]
    parts += [
        f"**Distance to held-out clips** (smaller is better): geometric mean over seeds, [{CONFIDENCE:.0%} interval]. "
        f"{_references(results)}",
        _table(variants, steps, lambda v, s: _cell(results, v, s, "distance", log=True)),
        f"**Distance over that of `{base}`**, pairs of one seed: factor, [{CONFIDENCE:.0%} interval]. In bold where "
        "the interval does not hold 1; of many such cells one in twenty does so by chance.",
        _table(variants[1:], steps, lambda v, s: _factor(ratio(results, v, base, s))),
    ]
    if any(r.recognised is not None for r in results):
        parts += [
            f"**Share recognised as the class asked for**, in percent: mean over seeds, [{CONFIDENCE:.0%} interval].",
            _table(variants, steps, lambda v, s: _cell(results, v, s, "recognised", scale=100.0)),
        ]
    if failed := sorted({(r.variant, r.seed, r.reason) for r in results if r.reason}):
        parts += ["**Not measured:**", "\n".join(f"- `{name}`, seed {seed}: {reason}" for name, seed, reason in failed)]
    return "\n\n".join(parts) + "\n"


def _references(results: Iterable[Result]) -> str:
    found = [r for r in results if r.real is not None and r.reconstruction is not None]
    if not found:
        return ""
    return f"Real clips reach {found[0].real:.1f}, their reconstructions {found[0].reconstruction:.1f}."


def _table(variants: Sequence[Variant], steps: Sequence[int], cell: Callable[[str, int], str]) -> str:
    lines = [
        "| question | variant | " + " | ".join(f"`ar_step` {s}" for s in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for variant in variants:
        cells = " | ".join(cell(variant.name, s) for s in steps)
        lines.append(f"| {variant.question} | `{variant.name}` | {cells} |")
    return "\n".join(lines)


def _cell(
    results: Sequence[Result], variant: str, ar_step: int, quantity: str, log: bool = False, scale: float = 1.0
) -> str:
    values = list(_by_seed(results, variant, ar_step, quantity).values())
    if not values:
        return "failed" if any(r.variant == variant and r.reason for r in results) else "-"
    found = mean_over_seeds([scale * v for v in values], log)
    digits = 0 if scale != 1.0 else 1
    low, high = (found.low, found.high) if log else (max(found.low, 0.0), min(found.high, scale))  # a share stays one
    interval = "" if found.count == 1 else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{found.mean:.{digits}f}{interval}"


def _factor(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.count == 1:
        return f"{found.mean:.2f}"
    text = f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
    return text if found.low <= 1 <= found.high else f"**{text}**"


def place_tables(document: str, text: str) -> str:
    """``document`` with ``text`` between its marks; behind its end if it has none."""
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
    """A PNG: distance and share recognised of every variant, a dot a seed, a bar for the mean and its interval.

    An interval that leaves the picture is cut at its edge.
    """
    from matplotlib.figure import Figure  # imports slowly

    steps = sorted({r.ar_step for r in results})
    panels = [("distance", "distance to real clips (smaller is better)")]
    if any(r.recognised is not None for r in results):
        panels.append(("recognised", "share recognised"))
    figure = Figure(figsize=(max(7.0, 1.5 * len(variants)), 4.0 * len(panels)), layout="constrained")
    for axes, (quantity, label) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels, strict=True):
        measured = [v for r in results if (v := getattr(r, quantity)) is not None]
        for number, step in enumerate(steps):
            colour = f"C{number}"
            for place, variant in enumerate(variants):
                values = list(_by_seed(results, variant.name, step, quantity).values())
                if not values:
                    continue
                x = place + 0.7 * ((number + 0.5) / len(steps) - 0.5)
                found = mean_over_seeds(values, log=quantity == "distance")
                axes.plot([x] * len(values), values, "o", color=colour, alpha=0.45, markersize=4)
                axes.plot([x], [found.mean], "_", color=colour, markersize=12, markeredgewidth=2.5)
                if found.count > 1:
                    axes.plot([x, x], [found.low, found.high], color=colour, linewidth=1.4)
        if measured and quantity == "distance":
            axes.set_yscale("log")
            axes.set_ylim(min(measured) / 1.6, max(measured) * 1.6)
        elif measured:
            axes.set_ylim(-0.03, 1.03)
        floor = [r.real for r in results if r.real is not None]
        if floor and quantity == "distance":
            axes.set_ylim(bottom=min(min(measured), floor[0]) / 1.2)
            axes.axhline(floor[0], color="grey", linestyle="--", linewidth=1)
            axes.annotate("real clips", (len(variants) - 0.5, floor[0]), ha="right", va="bottom", color="grey")
        axes.set_xlim(-0.5, len(variants) - 0.5)
        axes.set_xticks(range(len(variants)), [v.name.replace("_", "\n") for v in variants], fontsize="small")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        for edge in range(1, len(variants)):
            axes.axvline(edge - 0.5, color="grey", alpha=0.2, linewidth=1)
    keys = [
        figure.axes[0].plot([], [], "_", color=f"C{n}", markersize=12, markeredgewidth=2.5)[0]
        for n in range(len(steps))
    ]
    figure.legend(keys, [f"ar_step {step}" for step in steps], ncols=len(steps), loc="outside lower center")
    seeds = len({r.seed for r in results})
    figure.suptitle(
        f"Dots: seeds (up to {seeds}). Bars: mean over seeds and {CONFIDENCE:.0%} interval", fontsize="small"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
