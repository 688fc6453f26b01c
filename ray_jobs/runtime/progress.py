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
from ray_jobs.runtime.cluster import on_this_node
from ray_jobs.runtime.console import console, say
from ray_jobs.runtime.progress_actor import Monitor

MAX_DEATHS = 2
"""Processes that may die of an input, as of a fault in FFmpeg or for lack of memory, before it is not tried again."""
TASK_RETRIES = 50
"""How often a task of Ray Data is begun again when its process has died. Ray's own default is for ever."""


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
        self.drawn = console.is_terminal and not logs.structured()
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
            say(line, completed=completed, total=self.total, unit=self.unit)


@contextlib.contextmanager
def remote_progress(
    description: str, total: int, unit: str, kind: type[Monitor] = Monitor, *arguments: Any
) -> Iterator[Any]:
    """A progress bar that is fed from the cluster.

    Yields the handle of an actor with ``set(completed, note)``, ``add(count)``, ``say(line)`` and ``fail(error)``; of
    another ``kind`` if one is given, made with ``arguments``. A failure that was told to it is raised here when the
    block ends.
    """
    monitor: Any = ray.remote(kind).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(*arguments)
    stop = threading.Event()

    def follow(bar: ProgressBar) -> None:
        asked, last = None, False
        while not last:
            last = stop.wait(0.5) and asked is None
            asked = asked or monitor.read.remote()
            try:
                completed, note, lines = ray.get(asked, timeout=10)
            except ray.exceptions.GetTimeoutError:  # a machine under heavy load: the same answer, later
                last = False
                continue
            except ray.exceptions.RayError:
                return
            asked = None
            for line in lines:
                say(escape(line))  # it may quote an error with brackets
            bar.update(completed, note)

    interruption: Exception | None = None
    with progress_bar(description, total, unit) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield monitor
        except Exception as error:
            interruption = error
        finally:
            stop.set()
            follower.join()
    failure: ArdiffError | None = ray.get(monitor.failure.remote())
    if failure is not None:
        raise failure from interruption
    if interruption is not None:
        raise interruption


@contextlib.contextmanager
def telling(monitor: Any) -> Iterator[None]:
    """Tells a :func:`remote_progress` of an ArdiffError, which would lose its type on its way through Ray Data."""
    try:
        yield
    except ArdiffError as error:
        ray.get(monitor.fail.remote(error))
        raise


@contextlib.contextmanager
def attempting(monitor: Any, what: str) -> Iterator[int]:
    """Around the work on an input that may end this process: yields how many processes it has ended already.

    From ``MAX_DEATHS`` on it must not be tried again. Ray tries a task again as a whole, so its other inputs are safe.
    """
    deaths = min(ray.get(monitor.attempt.remote(what)), MAX_DEATHS)
    yield deaths
    if deaths < MAX_DEATHS:
        monitor.survived.remote(what)
