"""Stages: a complete stage has a record in its folder. A run records its configuration and versions."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ardiff.config import fingerprint, to_yaml
from ardiff.data import s3, storage
from ardiff.data.config import StorageConfig
from ardiff.errors import ArdiffError, ConfigError
from ray_jobs.runtime.console import print_line

STAGE = "stage.json"
COMMIT = "ARDIFF_COMMIT"
"""Environment variable: the git commit of code that was sent to a cluster without its history."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The record of a complete stage. Its presence in the stage's folder marks the stage complete."""

    name: str
    fingerprint: str
    """Of the configuration and the inputs of the stage."""
    seconds: float
    """Wall time, including interrupted attempts."""
    peak_mib: float
    """Peak memory of all processes of the job on the driver's machine, in MiB."""
    note: str
    """Counts and figures for the user."""
    results: dict[str, Any]
    """Values for later stages."""


def read_stage(folder: str) -> StageRecord | None:
    """The record in ``folder``, or None if the stage is not complete."""
    uri = storage.join(folder, STAGE)
    return StageRecord(**json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


class StageRun:
    """Collects note and results of a running stage."""

    def __init__(self) -> None:
        self.note = ""
        self.results: dict[str, Any] = {}


@contextlib.contextmanager
def stage(name: str, folder: str, key: str) -> Iterator[StageRun]:
    """Runs a stage: measures time and memory, and writes the record if the block succeeds."""
    interrupted = storage.join(folder, "interrupted.json")
    before = float(json.loads(storage.read_bytes(interrupted))) if storage.exists(interrupted) else 0.0
    run, started = StageRun(), time.monotonic()
    with _MemoryWatch() as memory:
        try:
            yield run
        except ArdiffError:
            raise  # failed, not interrupted
        except BaseException:
            with contextlib.suppress(Exception):  # keep the original error
                storage.write_bytes(interrupted, json.dumps(before + time.monotonic() - started).encode())
            raise
    seconds = before + time.monotonic() - started
    record = StageRecord(name, key, round(seconds, 2), round(memory.peak / 2**20, 1), run.note, run.results)
    storage.write_bytes(storage.join(folder, STAGE), json.dumps(asdict(record), indent=1).encode())
    storage.delete_file(interrupted)  # its time is in the record now
    line = f"[green]✓[/] {name}: {seconds:.1f} s, {record.peak_mib:.0f} MiB. {run.note}"
    print_line(line, stage=name, seconds=record.seconds, peak_mib=record.peak_mib)


class StageRunner:
    """Runs stages that build on each other and skips complete ones.

    A stage's key is the fingerprint of its configuration and of the stage before it.
    """

    def __init__(self, record: Callable[[], None], previous: Sequence[StageRecord] = ()) -> None:
        """
        Args:
            record: Called before a stage runs, to write configuration and versions.
            previous: Complete stages that the first stage builds on.
        """
        self.record = record
        self.records = list(previous)

    def run(
        self,
        job: Callable[..., Any],
        config: Any,
        is_outdated: Callable[[StageRecord], bool] = lambda record: False,
    ) -> StageRecord:
        """Runs ``job(config, key)``, which writes its stage to ``config.output``, unless that stage is complete.

        A complete stage runs again if ``is_outdated(record)``. Returns the stage's record. Raises ArdiffError.
        """
        key = fingerprint(config, self.records[-1].fingerprint if self.records else "")
        record = _complete_stage(config.output, key)
        if record is not None and not is_outdated(record):
            print_line(f"[green]✓[/] {record.name}: done before. {record.note}")
        else:
            self.record()  # only now: a rejected run must leave the folder unchanged
            job(config, key)
            record = read_stage(config.output)
            assert record is not None
        self.records.append(record)
        return record


def _complete_stage(folder: str, key: str) -> StageRecord | None:
    """The record in ``folder``, or None. Raises ConfigError if it is of a stage with another key."""
    record = read_stage(folder)
    if record is None or record.fingerprint == key:
        return record
    raise ConfigError(
        f"{folder} holds the stage '{record.name}' of another configuration: choose another --output, or delete the "
        "folder to run it again."
    )


class _MemoryWatch:
    """Samples the memory of this process and its children; shared pages count once (PSS)."""

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


def claim_output(folder: str, expected: str) -> None:
    """Writes the fingerprint of a job's settings to its folder. Raises ConfigError if it holds another one's."""
    file = storage.join(folder, "settings.txt")
    if storage.exists(file) and storage.read_bytes(file).decode() != expected:
        raise ConfigError(f"{folder} holds videos of another model or other settings: give another output.")
    storage.write_bytes(file, expected.encode())


def record_run(folder: str, config: Any) -> None:
    """Writes resolved configuration, versions and git commit to the run's folder, before it starts."""
    storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
    if (storage_config := s3.current()) != StorageConfig():
        storage.write_bytes(storage.join(folder, "storage.yaml"), to_yaml(storage_config).encode())
    storage.write_bytes(storage.join(folder, "versions.json"), json.dumps(versions(), indent=1).encode())


def versions() -> dict[str, str]:
    """Versions of Python, platform and packages, and the git commit."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ardiff", "torch", "ray", "numpy", "av", "pyarrow", "einops", "safetensors"):
        result[package] = metadata.version(package)
    if COMMIT in os.environ:
        return {**result, "git": os.environ[COMMIT]}
    here = Path(__file__).resolve().parent.parent
    git = None
    with contextlib.suppress(FileNotFoundError):  # not every machine has git
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    return {**result, "git": git.stdout.strip() if git and git.stdout.strip() else "unknown"}
