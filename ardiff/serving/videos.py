"""Looks up, cancels and deletes the videos of an API key, whichever replica runs them."""

import asyncio
import time

from ardiff.data.storage import RangeReader
from ardiff.serving.async_store import AsyncStore
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError, video_unavailable
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.records import JobRecord, is_id

CANCEL_SECONDS = 10.0
"""Seconds that a cancellation waits for the replica that runs the job."""


class Videos:
    """The records and files of all jobs."""

    def __init__(self, storage: AsyncStore, running: RunningJobs, finisher: JobFinisher, config: ServiceConfig) -> None:
        self._storage, self._running, self._finisher, self._config = storage, running, finisher, config

    async def find(self, owner: str, job_id: str) -> JobRecord:
        """The published record, so that all replicas show the same progress. Raises RequestError 404 or 503."""
        try:
            self._storage.check_responsive()
            record = await self._storage.call_timed(self._storage.store.read, owner, job_id)
        except RequestError:  # storage is unavailable
            if (job := self._running.get(job_id, owner)) is None:
                raise
            record = job.record
        if record is None:
            raise RequestError(404, "not_found", "There is no such video.")
        return record.now()

    async def page(self, owner: str, limit: int, after: str | None, newest_first: bool) -> tuple[list[JobRecord], bool]:
        """The owner's first records in order of creation, or those that follow ``after``; whether there are more."""
        records = await self._storage.call_timed(self._storage.store.page, owner, limit + 1, after, newest_first)
        return [record.now() for record in records[:limit]], len(records) > limit

    async def content(self, owner: str, job_id: str) -> tuple[JobRecord, RangeReader]:
        """A finished video. Raises RequestError: 404; 409 if it is not ready or has failed; 410 if it is gone."""
        record = await self.find(owner, job_id)
        if record.status != "completed":
            raise video_unavailable(record)
        video = await self._storage.call_timed(self._storage.store.video, record)
        if video is None:
            raise RequestError(410, "missing", "The file of the video is missing: request the video again.")
        return record, video

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """Cancels a job, unless it has ended. Returns its record, which may not be final yet."""
        record = await self.find(owner, job_id)
        if record.ended:
            return record
        if (job := self._running.get(job_id)) is not None:
            job.stop(JobError("cancelled", "Cancelled."))
        elif (claimed := await self._storage.call_timed(self._storage.store.claim, owner, job_id)) is not None:
            return await self._finisher.finish_queued(claimed, "cancelled")  # no replica runs it
        else:
            await self._storage.call_timed(self._storage.store.request_cancel, record)
        return await self._wait_for_end(owner, job_id)

    async def delete(self, owner: str, job_id: str) -> None:
        """Cancels a job that has not ended, and deletes its video. A deleted video may be deleted again.

        Raises:
            RequestError: 404 for a text that is no id; 409 if the job has not ended in time.
        """
        try:
            record = await self.cancel(owner, job_id)
        except RequestError as error:
            if error.status == 404 and is_id(job_id):
                return
            raise
        if not record.ended:
            message = f"The video {job_id} is being cancelled: delete it again later."
            raise RequestError(409, "not_ready", message, retry_after=CANCEL_SECONDS)
        await self._storage.call_timed(self._storage.store.delete, record)

    async def _wait_for_end(self, owner: str, job_id: str) -> JobRecord:
        deadline = time.monotonic() + max(CANCEL_SECONDS, 2 * self._config.poll_seconds)
        while not (record := await self.find(owner, job_id)).ended and time.monotonic() < deadline:
            await asyncio.sleep(0.02 if job_id in self._running else 0.1)
        return record
