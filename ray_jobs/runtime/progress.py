"""Progress of a stage: a bar on the terminal, updated by the driver or by processes of the cluster."""

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
    """A progress bar with rate and remaining time; without a terminal, a line every ten seconds."""
    bar = ProgressBar(description, total, unit)
    with bar.display:
        yield bar


class ProgressBar:
    """The progress bar of a stage."""

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
        self.interactive = console.is_terminal and not logs.is_json()
        self.display = Progress(*columns, console=console, disable=not self.interactive)
        self.task = self.display.add_task(description, total=total, rate="", note="")

    def update(self, completed: int, note: str = "") -> None:
        """Shows the absolute count ``completed`` and a short note such as the current loss."""
        now = time.monotonic()
        if self.started is None:
            self.started = (now, completed)
        elapsed, done = now - self.started[0], completed - self.started[1]
        rate = f"{done / elapsed:.1f} {self.unit}/s" if elapsed > 0 and done else ""
        note = note or ("starting" if not done and completed < self.total else "")
        self.display.update(self.task, completed=completed, rate=rate, note=note)
        finished = completed == self.total
        due = not self.finished if finished else now - self.printed > 10
        if due and not self.interactive:
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
        pending, last = None, False
        while not last:
            last = stop.wait(0.5) and pending is None
            pending = pending or progress.read.remote()
            try:
                completed, note, lines = ray.get(pending, timeout=10)
            except ray.exceptions.GetTimeoutError:  # under heavy load: wait for the same answer
                last = False
                continue
            except ray.exceptions.RayError:
                return
            pending = None
            for line in lines:
                print_line(escape(line))  # it may contain brackets
            bar.update(completed, note)

    block_error: Exception | None = None
    with progress_bar(description, total, unit) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield progress
        except Exception as error:
            block_error = error
        finally:
            stop.set()
            follower.join()
    failure: ArdiffError | None = ray.get(progress.failure.remote())
    if failure is not None:
        raise failure from block_error
    if block_error is not None:
        raise block_error


@contextlib.contextmanager
def report_errors(progress: Any) -> Iterator[None]:
    """Reports an ArdiffError to the progress actor, since Ray Data would lose the type of the exception."""
    try:
        yield
    except ArdiffError as error:
        ray.get(progress.fail.remote(error))
        raise
