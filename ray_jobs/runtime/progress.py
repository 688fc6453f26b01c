"""Progress of a stage: a bar on the terminal, fed by the driver or from the cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ardiff import logs
from ardiff.errors import ArdiffError
from ray_jobs.runtime.console import console, print_line
from ray_jobs.runtime.placement import on_this_node
from ray_jobs.runtime.progress_actor import ProgressActor


@contextlib.contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[ProgressBar]:
    """A bar with rate and remaining time; a line every ten seconds where there is no terminal."""
    bar = ProgressBar(description, total, unit)
    with bar.display:
        yield bar


class ProgressBar:
    """Shows how far a stage is. ``update`` takes absolute counts, so it can be fed from anywhere, in any order."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.started: tuple[float, int] | None = None
        self.printed, self.finished = time.monotonic(), False
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.drawn = console.is_terminal and not logs.is_json()
        self.display = Progress(*columns, console=console, disable=not self.drawn)
        self.task = self.display.add_task(description, total=total, rate="", note="")

    def update(self, completed: int, note: str = "") -> None:
        """Shows that ``completed`` of the total are done, and a short note such as the current loss."""
        now = time.monotonic()
        if self.started is None:
            self.started = (now, completed)
        elapsed, done = now - self.started[0], completed - self.started[1]
        rate = f"{done / elapsed:.1f} {self.unit}/s" if elapsed > 0 and done else ""
        note = note or ("starting" if not done and completed < self.total else "")
        self.display.update(self.task, completed=completed, rate=rate, note=note)
        finished = completed == self.total
        due = not self.finished if finished else now - self.printed > 10
        if due and not self.drawn:
            self.printed, self.finished = now, finished
            left = (
                f", {(self.total - completed) * elapsed / done:.0f} s left" if done and completed < self.total else ""
            )
            line = f"{self.description}: {completed}/{self.total} {self.unit}s {rate}{left} {note}".rstrip()
            print_line(line, completed=completed, total=self.total, unit=self.unit)


@contextlib.contextmanager
def remote_progress(
    description: str, total: int, unit: str, kind: type[ProgressActor] = ProgressActor, *arguments: Any
) -> Iterator[Any]:
    """A progress bar that processes of the cluster update.

    Yields the handle of a :class:`ProgressActor`, or of a subclass ``kind``, constructed with ``arguments``. An error
    that was reported to it by ``fail`` is raised when the block ends.
    """
    progress: Any = ray.remote(kind).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(*arguments)
    stop = threading.Event()

    def follow(bar: ProgressBar) -> None:
        asked, last = None, False
        while not last:
            last = stop.wait(0.5) and asked is None
            asked = asked or progress.read.remote()
            try:
                completed, note, lines = ray.get(asked, timeout=10)
            except ray.exceptions.GetTimeoutError:  # a machine under heavy load: the same answer, later
                last = False
                continue
            except ray.exceptions.RayError:
                return
            asked = None
            for line in lines:
                print_line(escape(line))  # it may quote an error with brackets
            bar.update(completed, note)

    interruption: Exception | None = None
    with progress_bar(description, total, unit) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield progress
        except Exception as error:
            interruption = error
        finally:
            stop.set()
            follower.join()
    failure: ArdiffError | None = ray.get(progress.failure.remote())
    if failure is not None:
        raise failure from interruption
    if interruption is not None:
        raise interruption


@contextlib.contextmanager
def report_errors(progress: Any) -> Iterator[None]:
    """Reports an ArdiffError to the progress actor, since Ray Data would lose the type of the exception."""
    try:
        yield
    except ArdiffError as error:
        ray.get(progress.fail.remote(error))
        raise
