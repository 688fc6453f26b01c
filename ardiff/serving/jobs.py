"""The jobs that this replica runs, and the part of each video that is ready."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ardiff.sampling.saved import SavedState, pack_latents
from ardiff.serving.errors import JobError
from ardiff.serving.metrics import Recorder
from ardiff.serving.records import JobRecord
from ardiff.serving.store import Segment


class FragmentLog:
    """The video of a running job so far. It keeps all fragments, so readers may start late or stall."""

    def __init__(self) -> None:
        self.fragments: list[bytes] = []
        self.ended = False
        self._failure: JobError | None = None
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Appends a fragment."""
        self.fragments.append(data)
        self._notify()

    def end(self, failure: JobError | None = None) -> None:
        """Marks the video as complete, or as incomplete with the reason."""
        self.ended, self._failure = True, failure
        self._notify()

    async def follow(self, position: int = 0) -> AsyncIterator[bytes]:
        """Yields the bytes from ``position`` on as they are added. Raises the JobError of an incomplete video."""
        sent = 0
        while True:
            while sent < len(self.fragments):
                unsent, sent = b"".join(self.fragments[sent:]), len(self.fragments)
                data, position = unsent[position:], max(0, position - len(unsent))
                if data:
                    yield data  # a slow reader gets fewer, larger chunks
            if self.ended:
                break
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Job:
    """A job whose lease this replica holds."""

    def __init__(
        self,
        record: JobRecord,
        given_frames: np.ndarray | None,
        wake: asyncio.Event,
        published: Sequence[Segment] = (),
    ) -> None:
        """
        Args:
            given_frames: uint8 ``(k, H, W, 3)``, the first frames of the video.
            wake: Wakes the loop that runs the job, so that it notices a stop.
            published: The video so far, which another replica has begun.
        """
        self.record, self.given_frames, self.begun_elsewhere = record, given_frames, published
        self.log = FragmentLog()
        self.deadline: float | None = None
        """When the job fails, by the monotonic clock; set when it starts."""
        self.stop_reason: JobError | None = None
        """Why the job leaves the engine before its next iteration."""
        self.changes_due = True
        """Whether to try the next requested change; not again at once after a failure."""
        self.write_lock = asyncio.Lock()
        """Held while progress or the end is written."""
        self.published: JobRecord | None = None
        """The record as other replicas see it."""
        self.published_fragments = 0
        self.latents: list[Tensor] = []
        """Those of generated frames, ``(1, n, L, D)``, whose fragments are not published."""
        self.state: SavedState | None = None
        """The state of the sampling after the last fragment with generated frames."""
        self.unpublished: Segment | None = None
        """The segment that is being written."""
        self._wake = wake

    def next_segment(self) -> Segment | None:
        """Takes what is not published yet; None if there is nothing new."""
        data = b"".join(self.log.fragments[self.published_fragments :])
        if not data:
            return None
        latents, self.latents, self.published_fragments = self.latents, [], len(self.log.fragments)
        state = None if self.state is None else self.state.to_bytes()
        return Segment(self.record.stream_bytes, data, pack_latents(latents), state)

    def take_changes(self, changes: list[dict[str, Any]]) -> None:
        """Takes all changes that are requested so far. They are applied before the next iteration."""
        if len(changes) > len(self.record.changes):
            self.record = replace(self.record, changes=changes)
        self.changes_due = True

    def stop(self, reason: JobError) -> None:
        """Stops the job before the next iteration. The first reason counts."""
        self.stop_reason = self.stop_reason or reason
        self._wake.set()


class RunningJobs:
    """All jobs whose lease this replica holds, by identifier."""

    def __init__(self, metrics: Recorder) -> None:
        self._jobs: dict[str, Job] = {}
        self._metrics = metrics

    def add(self, job: Job) -> None:
        """Adds a job that starts here."""
        self._jobs[job.record.id] = job
        self._metrics.record("ardiff_jobs_running", len(self._jobs))

    def remove(self, job_id: str) -> None:
        """Removes a job that has ended here."""
        self._jobs.pop(job_id, None)
        self._metrics.record("ardiff_jobs_running", len(self._jobs))

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """The job, or None if it does not run here or has another owner."""
        job = self._jobs.get(job_id)
        return job if job is not None and owner in (None, job.record.owner) else None

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)
