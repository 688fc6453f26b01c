"""Looks up, cancels and deletes the videos of an API key, whichever replica runs them."""

import asyncio
import time

from ardiff.serving.async_store import AsyncStore
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError, video_unavailable
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.records import JobRecord

CANCEL_SECONDS = 10.0
"""Seconds that a cancellation waits for the replica that runs the job."""


class Videos:
    """The records and files of all jobs."""

    def __init__(self, storage: AsyncStore, running: RunningJobs, finisher: JobFinisher, config: ServiceConfig) -> None:
        self._storage, self._running, self._finisher, self._config = storage, running, finisher, config

    async def find(self, owner: str, job_id: str) -> JobRecord:
        """The present record. Raises RequestError 404, or 503 if storage is unavailable."""
        if (job := self._running.get(job_id, owner)) is not None:
            return job.record
        record = await self._storage.call_timed(self._storage.store.read, owner, job_id)
        if record is None:
            raise RequestError(404, "not_found", "There is no such video.")
        return record.now()

    async def newest(self, owner: str, limit: int, before: str | None) -> tuple[list[JobRecord], bool]:
        """The owner's records, newest first, and whether there are more."""
        stored = await self._storage.call_timed(self._storage.store.newest, owner, limit + 1, before)
        running = [self._running.get(record.id) for record in stored]
        records = [job.record if job else record.now() for job, record in zip(running, stored, strict=True)]
        return records[:limit], len(records) > limit

    async def content(self, owner: str, job_id: str) -> tuple[JobRecord, bytes]:
        """A finished video. Raises RequestError: 404; 409 if it is not ready or has failed; 410 if it has expired."""
        record = await self.find(owner, job_id)
        if record.status != "completed":
            raise video_unavailable(record)
        return record, await self._storage.call_timed(self._storage.store.video, record)

    async def cancel_or_delete(self, owner: str, job_id: str) -> JobRecord | None:
        """Cancels a job and returns its record; deletes a job that has ended and returns None."""
        record = await self.find(owner, job_id)
        if record.ended:
            await self._storage.call_timed(self._storage.store.delete, record)
            return None
        if (job := self._running.get(job_id)) is not None:
            job.stop(JobError("cancelled", "Cancelled."))
        elif (claimed := await self._storage.call_timed(self._storage.store.claim, owner, job_id)) is not None:
            return await self._finisher.finish_queued(claimed, "cancelled")  # no replica runs it
        else:
            await self._storage.call_timed(self._storage.store.request_cancel, record)
        return await self._wait_for_end(owner, job_id)

    async def _wait_for_end(self, owner: str, job_id: str) -> JobRecord:
        deadline = time.monotonic() + max(CANCEL_SECONDS, 2 * self._config.poll_seconds)
        while not (record := await self.find(owner, job_id)).ended and time.monotonic() < deadline:
            await asyncio.sleep(0.02 if job_id in self._running else 0.1)
        return record
