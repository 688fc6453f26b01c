"""The queue of a generation job: an actor that deals batches to workers and counts progress."""

import time
from typing import Any

from ray_jobs.runtime.progress_actor import ProgressActor

VIDEO_GAUGES = {
    "ardiff_sweep_videos_done": "Videos that are complete.",
    "ardiff_sweep_videos_in_flight": "Videos that are being generated.",
    "ardiff_sweep_videos_failed": "Videos that could not be generated.",
    "ardiff_sweep_videos_left": "Videos that are neither complete nor failed.",
    "ardiff_sweep_frames_per_second": "Frames per second since the job started to generate.",
}
"""Ray metrics of a generation job."""


class VideoQueue(ProgressActor):
    """Deals batches, and counts videos, frames and attempts. It outlives the workers, so it knows what they started.

    A batch is a list of specs as dicts. It is identified by its index, a spec by the URI of its record.
    """

    def __init__(self, total: int, done: int, failed: int, batches: list[list[dict[str, Any]]]) -> None:
        """``total`` videos, of which ``done`` are complete and ``failed`` are not tried; ``batches`` are the others."""
        from ray.util.metrics import Gauge

        super().__init__()
        self.total, self.done, self.failed, self.frames = total, done, failed, 0
        self.running: dict[int, tuple[int, int]] = {}  # by batch: its videos, and the final frames of each
        self.batches, self.num_dealt = batches, 0
        self.dealt: dict[int, list[int]] = {}  # batches of each task, in order
        self.ended: set[int] = set()  # batches
        self.finished: set[str] = set()  # specs; a batch whose worker crashes may finish one again
        self.attempts: dict[str, tuple[int, int]] = {}  # by spec: attempts, and attempts alone in a batch
        self.started: float | None = None
        self.gauges = {name: Gauge(name, meaning) for name, meaning in VIDEO_GAUGES.items()}

    def deal(self, task: int, turn: int) -> tuple[int, list[dict[str, Any]], bool] | None:
        """The batch of a task in its turn: index, specs, and whether it has ended. None if no batch is left.

        A task that is repeated after a crash is dealt the same batches in the same order.
        """
        own = self.dealt.setdefault(task, [])
        if turn == len(own) and self.num_dealt < len(self.batches):
            own.append(self.num_dealt)
            self.num_dealt += 1
        if turn == len(own):
            return None
        batch = own[turn]
        return batch, self.batches[batch], batch in self.ended

    def get_attempts(self, specs: list[str]) -> dict[str, tuple[int, int]]:
        """Attempts so far, and attempts alone, of those specs that have any."""
        return {spec: self.attempts[spec] for spec in specs if spec in self.attempts}

    def begin(self, batch: int, specs: list[str]) -> None:
        """An attempt at specs of a batch starts. Replaces an earlier attempt at the batch, whose worker crashed."""
        self.started = self.started or time.monotonic()
        for spec in specs:
            total, alone = self.attempts.get(spec, (0, 0))
            self.attempts[spec] = (total + 1, alone + (len(specs) == 1))
        self.running[batch] = (len(specs), 0)

    def advance(self, batch: int, frames: int) -> None:
        """Each running video of a batch has ``frames`` final frames."""
        videos, _ = self.running.get(batch, (0, 0))
        self.running[batch] = (videos, frames)

    def finish(self, batch: int, spec: str, ok: bool, frames: int) -> None:
        """A video of ``frames`` frames is stored, or has failed for good."""
        if spec in self.finished:
            return
        self.finished.add(spec)
        videos, final = self.running.get(batch, (0, 0))
        self.running[batch] = (max(videos - 1, 0), final)
        self.done, self.failed, self.frames = self.done + ok, self.failed + (not ok), self.frames + frames

    def end(self, batch: int) -> None:
        """All specs of a batch are finished."""
        self.running.pop(batch, None)
        self.ended.add(batch)

    def read(self) -> tuple[int, str, list[str]]:
        """Final frames, a note of the counts, and the lines logged since the last call. Sets Ray's gauges."""
        in_flight = sum(videos for videos, _ in self.running.values())
        frames = self.frames + sum(videos * final for videos, final in self.running.values())
        rate = 0.0 if self.started is None else frames / max(time.monotonic() - self.started, 1e-3)
        values = (self.done, in_flight, self.failed, self.total - self.done - self.failed, rate)
        for gauge, value in zip(self.gauges.values(), values, strict=True):
            gauge.set(value)
        note = f"{self.done}/{self.total} videos, {in_flight} in flight, {self.failed} failed"
        return frames, note, super().read()[2]
