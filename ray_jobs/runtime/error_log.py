"""The quarantine of a job: an actor that every task tells of bad clips, and that keeps ``errors.parquet`` current."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ardiff.data import storage
from ardiff.data.clips import ClipConfig
from ardiff.data.error_log import ERRORS, BadClip, Quarantine, Unit, read_errors, too_short, write_errors
from ardiff.data.manifest import VideoRecord
from ardiff.errors import ArdiffError
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.placement import on_this_node


@dataclass(frozen=True, slots=True)
class Reporter:
    """Tells the actor of a bad clip, from anywhere in the cluster."""

    keeper: Any

    def __call__(self, bad: BadClip) -> None:
        """Returns when the row is kept. Raises DataError if there are too many by now."""
        error: ArdiffError | None = ray.get(self.keeper.add.remote(bad))
        if error is not None:
            raise error


@contextlib.contextmanager
def quarantine(
    folder: str,
    total: int,
    max_bad_fraction: float,
    unit: Unit,
    tried: Collection[str] = (),
    aside: Sequence[BadClip] = (),
) -> Iterator[Reporter]:
    """Keeps ``errors.parquet`` in ``folder`` for as long as the block lasts.

    Args:
        folder: Of the job.
        total: Videos or clips in all.
        max_bad_fraction: Share of them that may be bad.
        unit: What is counted.
        tried: Videos whose rows an interrupted run has left for this one; a job that tries all of them again has none.
        aside: Rows of videos that are left out, see :func:`ardiff.data.error_log.too_short`.
    """
    place = storage.absolute(storage.join(folder, ERRORS))
    before = [row for row in read_errors(place) if row.uri in tried] if tried else []
    accounts = Quarantine(total, max_bad_fraction, unit, before, aside)
    if aside:
        print_line(
            f"{len(aside)} videos are too short for a clip: rows of {storage.join(folder, ERRORS)}, not counted as bad"
        )
        write_errors(place, accounts.all_rows)
    kept = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=on_this_node())
    keeper: Any = kept.remote(place, accounts)
    try:
        yield Reporter(keeper)
    except BaseException:
        with contextlib.suppress(Exception):  # the reason for the end matters more than its record
            _flush(keeper, folder, unit, ended=False)
        raise
    _flush(keeper, folder, unit, ended=True)


def of_training(
    folder: str, clips: ClipConfig, manifest: Sequence[VideoRecord], records: Sequence[VideoRecord], resume: str
) -> contextlib.AbstractContextManager[Reporter]:
    """The quarantine of a training run on clips of ``records``, the videos of ``manifest`` that are long enough."""
    tried = set() if resume == "none" else {record.uri for record in records}
    short = too_short(manifest, "train", clips.span, clips.fps)
    return quarantine(folder, len(records), clips.max_bad_fraction, "video", tried, short)


def _flush(keeper: Any, folder: str, unit: Unit, ended: bool) -> None:
    count, summary = ray.get(keeper.flush.remote(ended))
    if count:
        print_line(f"[yellow]{count} bad {unit}{'s' * (count > 1)}[/] in {storage.join(folder, ERRORS)}: {summary}")


class _Keeper:
    """The actor behind :func:`quarantine`."""

    def __init__(self, place: str, accounts: Quarantine, pause: float = 1.0) -> None:
        """Rows are written ``pause`` seconds after the last ones, or at once: a job may die at any moment."""
        self.place, self.quarantine, self.pause = place, accounts, pause
        self.written, self.due = 0.0, False
        self.lock = threading.Lock()
        self.later: threading.Timer | None = None

    def add(self, bad: BadClip) -> ArdiffError | None:
        with self.lock:
            self.due = self.quarantine.add(bad) or self.due
            try:
                self._write_soon()
                self.quarantine.check()
            except ArdiffError as error:
                return error
        return None

    def _write_soon(self) -> None:
        wait = self.written + self.pause - time.monotonic()
        if wait <= 0:
            self._write()
        elif self.due and self.later is None:
            self.later = threading.Timer(wait, self._write_late)
            self.later.daemon = True
            self.later.start()

    def _write_late(self) -> None:
        with self.lock, contextlib.suppress(ArdiffError):  # what writes next will say so
            self.later = None
            self._write()

    def _write(self) -> None:
        if self.due:
            write_errors(self.place, self.quarantine.all_rows)
            self.written, self.due = time.monotonic(), False

    def flush(self, ended: bool) -> tuple[int, str]:
        with self.lock:
            self.due = self.due or ended  # a job that ends well leaves a file, if only to say that nothing was bad
            self._write()
            return self.quarantine.count, self.quarantine.summary()
