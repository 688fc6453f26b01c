"""The actor behind :func:`ray_jobs.common.remote_progress`. It imports next to nothing: every stage starts one."""

import time

from ardiff.errors import ArdiffError


class Monitor:
    """Collects what the processes of a stage tell of their progress and failures, until the driver asks."""

    def __init__(self) -> None:
        self.completed, self.note = 0, ""
        self.lines: list[str] = []
        self.error: ArdiffError | None = None
        self.accusation = ""

    def set(self, completed: int, note: str = "") -> None:
        self.completed, self.note = completed, note

    def forgive(self) -> None:
        self.accusation = ""

    def accuse(self, reason: str) -> None:
        self.accusation = self.accusation or reason

    def blame(self) -> str:
        return self.accusation

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


class VideoMonitor(Monitor):
    """A monitor of videos in the making, which outlives the workers: it also knows what they had begun."""

    def __init__(self, total: int, done: int) -> None:
        """``total`` videos in all, of which ``done`` were complete before."""
        from ray.util.metrics import Gauge

        super().__init__()
        self.total, self.done, self.failed, self.frames = total, done, 0, 0
        self.in_work: dict[int, tuple[int, int]] = {}  # by pack: videos, and frames of all of them that are final
        self.tries: dict[str, list[int]] = {}  # by row: how often begun, and how often alone
        self.started: float | None = None
        names = ("done", "in_flight", "failed", "left")
        self.gauges = {
            n: Gauge(f"ardiff_sweep_videos_{n}", f"Videos of a sweep: {n.replace('_', ' ')}.") for n in names
        }
        self.rate = Gauge("ardiff_sweep_frames_per_second", "Frames that a sweep has made a second, since it began.")

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

    def finish(self, pack: int, ok: bool, frames: int) -> None:
        """A video is stored, or has failed for good."""
        videos, final = self.in_work.get(pack, (0, 0))
        self.in_work[pack] = (max(videos - 1, 0), final)
        self.done, self.failed, self.frames = self.done + ok, self.failed + (not ok), self.frames + frames

    def end(self, pack: int) -> None:
        """No row of a pack is in work any more."""
        self.in_work.pop(pack, None)

    def read(self) -> tuple[int, str, list[str]]:
        in_flight = sum(videos for videos, _ in self.in_work.values())
        frames = self.frames + sum(videos * final for videos, final in self.in_work.values())
        left = self.total - self.done - self.failed
        for name, value in (("done", self.done), ("in_flight", in_flight), ("failed", self.failed), ("left", left)):
            self.gauges[name].set(value)
        if self.started is not None:
            self.rate.set(frames / max(time.monotonic() - self.started, 1e-3))
        note = f"{self.done}/{self.total} videos, {in_flight} in flight, {self.failed} failed"
        return frames, note, super().read()[2]
