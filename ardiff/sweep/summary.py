"""What a sweep came to, cell by cell, as tables and lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ardiff.sweep.grid import Cell
from ardiff.sweep.rows import Record, VideoRow


@dataclass(frozen=True, kw_only=True, slots=True)
class CellScore:
    """A metric of a cell, or of another set that helps to read it."""

    set: str
    """The cell's name, or that of the other set."""
    metric: str
    value: float
    low: float | None
    """Lower end of the 95 % interval, if there is one."""
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CellSummary:
    """What came of a cell's rows."""

    cell: Cell
    videos: int
    made: int
    failed: int
    seconds: float
    """Mean of a video's share of its pack's time; NaN if none was made. So are the next two."""
    cpu_seconds: float
    frames_per_second: float
    """Of one worker: frames over seconds."""


def summarise(cells: Sequence[Cell], rows: Sequence[VideoRow], records: Mapping[str, Record]) -> list[CellSummary]:
    """One summary a cell, in their order; ``records`` by row id."""
    found = []
    for cell in cells:
        mine = [records[row.id] for row in rows if row.cell == cell.name and row.id in records]
        made = [record for record in mine if record.status == "ok"]
        seconds = float(np.mean([r.seconds for r in made])) if made else float("nan")
        found.append(
            CellSummary(
                cell=cell,
                videos=sum(row.cell == cell.name for row in rows),
                made=len(made),
                failed=len(mine) - len(made),
                seconds=seconds,
                cpu_seconds=float(np.mean([r.cpu_seconds for r in made])) if made else float("nan"),
                frames_per_second=cell.num_frames / seconds,
            )
        )
    return found


def label(cell: Cell, cells: Sequence[Cell]) -> str:
    """A cell by the settings in which it differs from others, ``ar_step`` always among them."""
    shown = [f"ar_step {cell.ar_step}"]
    if len({c.num_frames for c in cells}) > 1:
        shown.append(f"{cell.num_frames} frames")
    if len({c.num_inference_steps for c in cells}) > 1:
        shown.append(f"{cell.num_inference_steps} steps")
    if len({c.guidance_scale for c in cells}) > 1:
        shown.append(f"guidance {cell.guidance_scale:g}")
    if len({c.model.uri for c in cells}) > 1:
        shown.append(cell.model.uri)
    return ", ".join(shown)


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table as text, columns aligned to the right but for the first."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(parts)).rstrip()
        for line in (header, *lines)
        for parts in [list(zip(line, widths, strict=True))]
    ]


def failure_table(rows: Sequence[VideoRow], records: Mapping[str, Record], most: int = 10) -> list[str]:
    """What failed and why, kinds of failure together, the most frequent first; no line if nothing did."""
    failed = [(row, records[row.id]) for row in rows if row.id in records and records[row.id].status == "failed"]
    kinds = Counter((r.error, r.message) for _, r in failed)
    lines = []
    for (error, message), count in kinds.most_common(most):
        row, record = next((w, r) for w, r in failed if (r.error, r.message) == (error, message))
        tries = f"tried {record.attempts} times" if record.attempts else "not tried"
        lines.append(f"{count} x {error}: {message} First: {row.cell}, class {row.label}, seed {row.seed}, {tries}.")
    return lines + ([f"... and {len(kinds) - most} other kinds."] if len(kinds) > most else [])
