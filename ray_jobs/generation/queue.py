"""The queue of videos to generate: an actor that deals batches to workers and counts progress; it outlives them."""

import time
from typing import Any

from ray_jobs.runtime.progress_actor import ProgressActor

VIDEO_GAUGES = {
    "ardiff_sweep_videos_done": "Videos that are complete.",
    "ardiff_sweep_videos_in_flight": "Videos in the making.",
    "ardiff_sweep_videos_failed": "Videos that could not be made.",
    "ardiff_sweep_videos_left": "Videos that are neither complete nor have failed.",
    "ardiff_sweep_frames_per_second": "Frames generated a second, since the job began to.",
}
"""Ray's metrics of videos in the making."""


class VideoQueue(ProgressActor):
    """The queue and the progress of the videos of a job. It outlives the workers, so it knows what they had begun."""

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
