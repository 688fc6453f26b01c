"""The quarantine of a job: an actor that every task tells of bad clips, and that keeps ``errors.parquet`` current."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from ardiff.data import storage
from ardiff.data.quarantine import ERRORS, BadClip, Quarantine, Unit, read_errors, write_errors
from ardiff.errors import ArdiffError
from ray_jobs.common import on_this_node, say


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
    folder: str, total: int, max_bad_fraction: float, unit: Unit, afresh: bool = False
) -> Iterator[Reporter]:
    """Keeps ``errors.parquet`` in ``folder`` for as long as the block lasts.

    It begins with the rows that an interrupted run has left, unless ``afresh``, for jobs that try all of them again.
    """
    place = storage.absolute(storage.join(folder, ERRORS))
    kept = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=on_this_node())
    keeper: Any = kept.remote(place, total, max_bad_fraction, unit, afresh)
    ended = False
    try:
        yield Reporter(keeper)
        ended = True
    finally:
        count, summary = ray.get(keeper.flush.remote(ended))
        if count:
            say(f"[yellow]{count} bad {unit}{'s' * (count > 1)}[/] in {storage.join(folder, ERRORS)}: {summary}")


class _Keeper:
    """The actor behind :func:`quarantine`."""

    def __init__(self, place: str, total: int, max_bad_fraction: float, unit: Unit, afresh: bool) -> None:
        self.place, self.written, self.due = place, 0.0, False
        self.quarantine = Quarantine(total, max_bad_fraction, unit, [] if afresh else read_errors(place))

    def add(self, bad: BadClip) -> ArdiffError | None:
        self.due = self.quarantine.add(bad) or self.due
        try:
            if time.monotonic() - self.written > 1.0:  # a job may die at any moment
                self.write()
            self.quarantine.check()
        except ArdiffError as error:
            return error
        return None

    def write(self) -> None:
        if self.due:
            write_errors(self.place, self.quarantine.rows.values())
            self.written, self.due = time.monotonic(), False

    def flush(self, ended: bool) -> tuple[int, str]:
        self.due = self.due or ended  # a job that ends well leaves a file, if only to say that nothing was bad
        self.write()
        return self.quarantine.count, self.quarantine.summary()
