"""Runs the checks of one device, and writes what they measure as JSON and Markdown.

ardiff gpu-check                                     # the first GPU, the paper's sizes; no check begins after 8 minutes
ardiff gpu-check device=cpu compile=false            # the same on a CPU with tiny models
"""

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from ardiff.data import storage
from ardiff.doctor import driver_version
from ardiff.errors import ArdiffError
from ardiff.gpu_check.checks import CHECKS
from ardiff.gpu_check.config import GpuCheckConfig
from ardiff.gpu_check.setup import Row, Setup

__all__ = ["GpuCheckConfig", "run"]


def run(config: GpuCheckConfig) -> None:
    """Runs the checks. Raises ArdiffError at the end if any has failed."""
    setup, start = Setup.of(config), time.monotonic()
    machine = describe(setup)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
    rows: list[Row] = []
    notes: dict[str, str] = {}
    for name in config.checks:
        if time.monotonic() - start > config.seconds:
            notes[name] = f"skipped: {config.seconds:g} s are over"
            print(f"{name}: {notes[name]}")
            store(config.output, machine, rows, notes)
            continue
        began = time.monotonic()
        try:
            measure(name, setup, rows)
        except Exception as error:  # whatever one check meets, the others still say something
            notes[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            print(f"{name}: {notes[name]}", flush=True)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        store(config.output, machine, rows, notes)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    wrong = [f"{row.check}, {row.name}" for row in rows if not row.ok]
    wrong += [name for name, note in notes.items() if note.startswith("failed")]
    print(f"results: {config.output}/gpu-check.md")
    if wrong:
        raise ArdiffError(f"{len(wrong)} values or checks are wrong: {'; '.join(wrong)}. The results say by how much.")


def measure(name: str, setup: Setup, rows: list[Row]) -> None:
    """Adds the rows of a check to ``rows`` and prints them."""
    for row in CHECKS[name](setup):  # type: ignore[index]
        rows.append(row)
        print(f"{'' if row.ok else 'WRONG  '}{row.check:<12} {row.name:<48} {row.value:>12.6g} {row.unit}", flush=True)


def store(output: str, machine: dict[str, Any], rows: list[Row], notes: dict[str, str]) -> None:
    """Writes the results so far."""
    result = {"machine": machine, "rows": [{**asdict(row), "ok": row.ok} for row in rows], "notes": notes}
    storage.write_bytes(storage.join(output, "gpu-check.json"), json.dumps(result, indent=1).encode())
    storage.write_bytes(storage.join(output, "gpu-check.md"), markdown(machine, rows, notes).encode())


def describe(setup: Setup) -> dict[str, Any]:
    """The machine and the versions that matter."""
    is_gpu = setup.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setup.device) if is_gpu else platform.machine(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "driver": driver_version(),
        "size": "tiny" if setup.tiny else "paper",
    }


def markdown(machine: dict[str, Any], rows: Iterable[Row], notes: dict[str, str]) -> str:
    """The results as a table."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items() if value), ""]
    lines += ["| check | measured | value | limit |", "|---|---|---|---|"]
    for row in rows:
        value = f"{row.value:.4g} {row.unit}".strip()
        limit = "" if row.limit is None else f"{row.limit:g}{'' if row.ok else ' **exceeded**'}"
        lines.append(f"| {row.check} | {row.name} | {value} | {limit} |")
    lines += ["", *(f"- {name}: {note}" for name, note in notes.items())]
    return "\n".join(lines).rstrip() + "\n"
