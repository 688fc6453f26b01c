"""The actor behind :func:`ray_jobs.runtime.progress.remote_progress`. It imports little: every stage starts one."""

import time
from typing import Any

from ardiff.errors import ArdiffError, TrainingError

ALIKE = 3
"""Attempts that fail in the same way one after the other before there is no further one."""


class Monitor:
    """Collects what the processes of a stage tell of their progress and failures, until the driver asks."""

    def __init__(self) -> None:
        self.completed, self.note = 0, ""
        self.lines: list[str] = []
        self.error: ArdiffError | None = None
        self.accusation = self.failing = ""
        self.blamed, self.repeated, self.alike = "", "", 0
        self.attempts: dict[str, int] = {}

    def set(self, completed: int, note: str = "") -> None:
        self.completed, self.note = completed, note

    def forgive(self) -> None:
        """Training begins again: what the end of the earlier attempt took with it did not die of its input."""
        self.accusation = ""
        self.attempts.clear()

    def accuse(self, who: str, what: str) -> None:
        """A worker of the attempt that is running has failed; the first one counts."""
        if not self.accusation:
            self.accusation, self.failing = f"{who} {what}", what

    def end_attempt(self, lost: str) -> None:
        """An attempt has failed, for the reason ``lost`` if no worker named one. Ends all if it was the same thrice."""
        failing, self.blamed = (self.failing, self.accusation) if self.accusation else ("", "")
        self.alike = self.alike + 1 if failing and failing == self.repeated else 1
        self.repeated, self.accusation = failing, ""
        self.say(f"An attempt failed: {self.blamed or lost}")
        if self.alike == ALIKE and self.error is None:
            self.error = TrainingError(
                f"Training failed {ALIKE} times in the same way, so another attempt is of no use: {self.blamed}. The "
                "last checkpoint is good; with --debug the same command shows the workers' output."
            )

    def blame(self) -> str:
        """Who failed with what, in the last attempt; empty if nobody said."""
        return self.accusation or self.blamed

    def attempt(self, what: str) -> int:
        """A process begins ``what``. Returns how many have begun it before and did not live to end it."""
        self.attempts[what] = self.attempts.get(what, 0) + 1
        return self.attempts[what] - 1

    def survived(self, what: str) -> None:
        self.attempts.pop(what, None)

    def add(self, count: int) -> None:
        self.completed += count

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fail(self, error: ArdiffError) -> None:
        self.error = error

    def failure(self) -> ArdiffError | None:
        return self.error

    def read(self) -> tuple[int, str, list[str]]:
        lines, self.lines = self.lines, []
        return self.completed, self.note, lines


VIDEO_GAUGES = {
    "ardiff_sweep_videos_done": "Videos that are complete.",
    "ardiff_sweep_videos_in_flight": "Videos in the making.",
    "ardiff_sweep_videos_failed": "Videos that could not be made.",
    "ardiff_sweep_videos_left": "Videos that are neither complete nor have failed.",
    "ardiff_sweep_frames_per_second": "Frames generated a second, since the job began to.",
}
"""Ray's metrics of videos in the making."""


class VideoMonitor(Monitor):
    """A monitor of videos in the making, which outlives the workers: it also knows what they had begun."""

    def __init__(self, total: int, done: int, failed: int, packs: list[list[dict[str, Any]]]) -> None:
        """``total`` videos in all, of which ``done`` were complete before, ``failed`` are not tried, and the others are
        the rows in ``packs``."""
        from ray.util.metrics import Gauge

        super().__init__()
        self.total, self.done, self.failed, self.frames = total, done, failed, 0
        self.in_work: dict[int, tuple[int, int]] = {}  # by pack: videos, and frames of all of them that are final
        self.packs, self.dealt = packs, 0
        self.hands: dict[int, list[int]] = {}  # packs dealt to each task
        self.ended: set[int] = set()  # packs
        self.finished: set[str] = set()  # rows, which a pack whose worker dies may finish again
        self.tries: dict[str, list[int]] = {}  # by row: how often begun, and how often alone
        self.started: float | None = None
        self.gauges = {name: Gauge(name, meaning) for name, meaning in VIDEO_GAUGES.items()}

    def deal(self, task: int, turn: int) -> tuple[int, list[dict[str, Any]], bool] | None:
        """The pack that is a task's in its turn, the same again if it is asked for again: its number, its rows, and
        whether it has ended. None when there is none left."""
        hand = self.hands.setdefault(task, [])
        if turn == len(hand) and self.dealt < len(self.packs):
            hand.append(self.dealt)
            self.dealt += 1
        if turn == len(hand):
            return None
        number = hand[turn]
        return number, self.packs[number], number in self.ended

    def tried(self, ids: list[str]) -> dict[str, list[int]]:
        """How often rows have been begun, and how often alone, those that have been."""
        return {i: self.tries[i] for i in ids if i in self.tries}

    def begin(self, pack: int, ids: list[str]) -> None:
        """Rows of a pack are tried. What was known of rows of the pack in work is true no more: their worker died."""
        self.started = self.started or time.monotonic()
        for i in ids:
            total, alone = self.tries.get(i, [0, 0])
            self.tries[i] = [total + 1, alone + (len(ids) == 1)]
        self.in_work[pack] = (len(ids), 0)

    def advance(self, pack: int, frames: int) -> None:
        """Each video in work of a pack has so many final frames."""
        videos, _ = self.in_work.get(pack, (0, 0))
        self.in_work[pack] = (videos, frames)

    def finish(self, pack: int, row: str, ok: bool, frames: int) -> None:
        """A video is stored, or has failed for good."""
        if row in self.finished:
            return
        self.finished.add(row)
        videos, final = self.in_work.get(pack, (0, 0))
        self.in_work[pack] = (max(videos - 1, 0), final)
        self.done, self.failed, self.frames = self.done + ok, self.failed + (not ok), self.frames + frames

    def end(self, pack: int) -> None:
        """No row of a pack is in work any more."""
        self.in_work.pop(pack, None)
        self.ended.add(pack)

    def read(self) -> tuple[int, str, list[str]]:
        in_flight = sum(videos for videos, _ in self.in_work.values())
        frames = self.frames + sum(videos * final for videos, final in self.in_work.values())
        rate = 0.0 if self.started is None else frames / max(time.monotonic() - self.started, 1e-3)
        values = (self.done, in_flight, self.failed, self.total - self.done - self.failed, rate)
        for gauge, value in zip(self.gauges.values(), values, strict=True):
            gauge.set(value)
        note = f"{self.done}/{self.total} videos, {in_flight} in flight, {self.failed} failed"
        return frames, note, super().read()[2]
