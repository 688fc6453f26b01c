"""The error log of a job: an actor that collects bad samples from all tasks and keeps ``errors.parquet`` current."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.data.error_log import ERRORS, BadSample, ErrorLog, Unit, read_errors, too_short, write_errors
from ardiff.data.manifest import VideoRecord
from ardiff.errors import ArdiffError
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.placement import on_this_node


@dataclass(frozen=True, slots=True)
class Reporter:
    """Reports bad samples to the actor. It can be sent to any process of the cluster."""

    actor: Any

    def __call__(self, sample: BadSample) -> None:
        """Returns when the actor has recorded the sample. Raises DataError if too many are bad."""
        error: ArdiffError | None = ray.get(self.actor.add.remote(sample))
        if error is not None:
            raise error


@contextlib.contextmanager
def error_log(
    folder: str,
    total: int,
    max_bad_fraction: float,
    unit: Unit,
    resumed: Collection[str] = (),
    excluded: Sequence[BadSample] = (),
) -> Iterator[Reporter]:
    """Keeps ``errors.parquet`` in ``folder`` current while the block runs.

    Args:
        folder: The job's output folder.
        total: Videos or clips in all.
        max_bad_fraction: Share of them that may be bad.
        unit: What the limit counts.
        resumed: Videos whose rows are kept from an interrupted run. A job that reads all videos again passes none.
        excluded: Rows of videos that are left out, see :func:`ardiff.data.error_log.too_short`.
    """
    uri = storage.absolute(storage.join(folder, ERRORS))
    rows = [row for row in read_errors(uri) if row.uri in resumed] if resumed else []
    log = ErrorLog(total, max_bad_fraction, unit, rows, excluded)
    if excluded:
        file = storage.join(folder, ERRORS)
        print_line(f"{len(excluded)} videos are too short for a clip: listed in {file}, not counted as bad")
        write_errors(uri, log.all_rows)
    actor: Any = ray.remote(_ErrorLogActor).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(uri, log)
    try:
        yield Reporter(actor)
    except BaseException:
        with contextlib.suppress(Exception):  # keep the original error
            _flush(actor, folder, unit, ended=False)
        raise
    _flush(actor, folder, unit, ended=True)


def training_error_log(
    folder: str, clips: ClipConfig, manifest: Sequence[VideoRecord], records: Sequence[VideoRecord], resume: str
) -> contextlib.AbstractContextManager[Reporter]:
    """The error log of a training run on ``records``, the videos of ``manifest`` that are long enough for a clip."""
    used, shortest = {record.uri for record in records}, clips.of_each_length[-1]
    resumed = set() if resume == "none" else used
    short = [row for row in too_short(manifest, "train", shortest.span, shortest.fps) if row.uri not in used]
    return error_log(folder, len(records), clips.max_bad_fraction, "video", resumed, short)


def _flush(actor: Any, folder: str, unit: Unit, ended: bool) -> None:
    count, summary = ray.get(actor.flush.remote(ended))
    if count:
        print_line(f"[yellow]{count} bad {unit}{'s' * (count > 1)}[/] in {storage.join(folder, ERRORS)}: {summary}")


class _ErrorLogActor:
    """The actor behind :func:`error_log`."""

    def __init__(self, uri: str, log: ErrorLog, interval: float = 1.0) -> None:
        """Rows are written at most every ``interval`` seconds, and soon after they arrive: a job may be killed."""
        self.uri, self.log, self.interval = uri, log, interval
        self.written, self.changed = 0.0, False
        self.lock = threading.Lock()
        self.timer: threading.Timer | None = None

    def add(self, sample: BadSample) -> ArdiffError | None:
        """Records a bad sample. Returns the error that stops the job if too many are bad or the write fails."""
        with self.lock:
            self.changed = self.log.add(sample) or self.changed
            try:
                self._write_soon()
                self.log.check()
            except ArdiffError as error:
                return error
        return None

    def flush(self, ended: bool) -> tuple[int, str]:
        """Writes what is not written yet. Returns the number of bad samples and a summary."""
        with self.lock:
            self.changed = self.changed or ended  # a job that succeeds leaves a file, even an empty one
            self._write()
            return self.log.count, self.log.summary()

    def _write_soon(self) -> None:
        wait = self.written + self.interval - time.monotonic()
        if wait <= 0:
            self._write()
        elif self.changed and self.timer is None:
            self.timer = threading.Timer(wait, self._write_late)
            self.timer.daemon = True
            self.timer.start()

    def _write_late(self) -> None:
        with self.lock, contextlib.suppress(ArdiffError):  # the next write reports the error
            self.timer = None
            self._write()

    def _write(self) -> None:
        if self.changed:
            write_errors(self.uri, self.log.all_rows)
            self.written, self.changed = time.monotonic(), False
