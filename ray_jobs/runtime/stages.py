"""Stages: a finished stage leaves a record in its folder; a run records its configuration and versions."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ardiff.config import to_yaml
from ardiff.data import s3, storage
from ardiff.data.config import StorageConfig
from ardiff.errors import ArdiffError
from ray_jobs.runtime.console import print_line

STAGE = "stage.json"
COMMIT = "ARDIFF_COMMIT"
"""Variable that names the git commit of code that was sent to a cluster without its history."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What is known of a finished stage; its presence in the stage's folder means that the stage is complete."""

    name: str
    fingerprint: str
    """Names the configuration and the inputs of the stage."""
    seconds: float
    """Wall time, summed over interrupted attempts."""
    peak_mib: float
    """Largest memory of all processes of the job on the driver's machine, in MiB."""
    note: str
    """Counts and figures worth knowing."""
    results: dict[str, Any]
    """What later stages read."""


def read_stage(folder: str) -> StageRecord | None:
    """The record in ``folder``, or None if the stage is not complete."""
    place = storage.join(folder, STAGE)
    return StageRecord(**json.loads(storage.read_bytes(place))) if storage.exists(place) else None


class StageRun:
    """Collects the figures of a running stage."""

    def __init__(self) -> None:
        self.note = ""
        self.results: dict[str, Any] = {}


@contextlib.contextmanager
def stage(name: str, folder: str, key: str) -> Iterator[StageRun]:
    """Runs a stage: measures time and memory, and writes its record when it ends well."""
    attempts = storage.join(folder, "interrupted.json")
    before = float(json.loads(storage.read_bytes(attempts))) if storage.exists(attempts) else 0.0
    run, started = StageRun(), time.monotonic()
    with _MemoryWatch() as memory:
        try:
            yield run
        except ArdiffError:
            raise  # refused or failed, not interrupted
        except BaseException:
            with contextlib.suppress(Exception):  # the reason for the interruption matters more than its record
                storage.write_bytes(attempts, json.dumps(before + time.monotonic() - started).encode())
            raise
    seconds = before + time.monotonic() - started
    record = StageRecord(name, key, round(seconds, 2), round(memory.peak / 2**20, 1), run.note, run.results)
    storage.write_bytes(storage.join(folder, STAGE), json.dumps(asdict(record), indent=1).encode())
    storage.delete_file(attempts)  # they count once
    line = f"[green]✓[/] {name}: {seconds:.1f} s, {record.peak_mib:.0f} MiB. {run.note}"
    print_line(line, stage=name, seconds=record.seconds, peak_mib=record.peak_mib)


class _MemoryWatch:
    """Samples the memory of this process and all it started, shared pages counted once (PSS)."""

    def __enter__(self) -> _MemoryWatch:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _tree_memory())
            if self._stop.wait(5.0):
                return


def _tree_memory() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total


def record_run(folder: str, config: Any) -> None:
    """Writes what a run is made of to its folder before it starts: resolved configuration, versions, git commit."""
    storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
    if (reach := s3.current()) != StorageConfig():
        storage.write_bytes(storage.join(folder, "storage.yaml"), to_yaml(reach).encode())
    storage.write_bytes(storage.join(folder, "versions.json"), json.dumps(versions(), indent=1).encode())


def versions() -> dict[str, str]:
    """Versions of everything that shapes a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ardiff", "torch", "ray", "numpy", "av", "pyarrow", "einops", "safetensors"):
        found[package] = metadata.version(package)
    if COMMIT in os.environ:
        return {**found, "git": os.environ[COMMIT]}
    here = Path(__file__).resolve().parent.parent
    git = None
    with contextlib.suppress(FileNotFoundError):  # not every machine has git
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    return {**found, "git": git.stdout.strip() if git and git.stdout.strip() else "unknown"}
