"""Looks up, cancels and deletes the videos of an API key, whichever replica runs them."""

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

from ardiff.data.storage import RangeReader
from ardiff.serving.async_store import Stores
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import RequestLimits, ServiceConfig
from ardiff.serving.errors import JobError, RequestError, UnavailableError, invalid, not_found, video_unavailable
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.records import JobRecord, is_id

ANSWER_SECONDS = 10.0
"""Seconds that a cancellation or a change waits for the replica that runs the job."""
SWEEP_SECONDS = 60.0
"""Most seconds between two removals of expired videos."""
SWEEP_JOBS = 500
"""Jobs whose files are removed at a time."""


class Videos:
    """The records and files of all jobs."""

    def __init__(
        self,
        stores: Stores,
        running: RunningJobs,
        finisher: JobFinisher,
        config: ServiceConfig,
    ) -> None:
        self._jobs, self._files, self._running = stores.jobs, stores.files, running
        self._finisher, self._config = finisher, config

    @property
    def sweep_seconds(self) -> float:
        """Seconds between two removals of expired videos."""
        return min(SWEEP_SECONDS, self._config.keep_seconds)

    async def find(self, owner: str, job_id: str) -> JobRecord:
        """The published record, so that all replicas show the same progress. Raises RequestError 404 or 503."""
        try:
            self._jobs.check_responsive()
            record = await self._jobs.call_timed(self._jobs.store.read, owner, job_id)
        except UnavailableError:
            if (job := self._running.get(job_id, owner)) is None:
                raise
            record = job.record
        if record is None:
            raise not_found()
        return record

    async def page(self, owner: str, limit: int, after: str | None, newest_first: bool) -> tuple[list[JobRecord], bool]:
        """The owner's first records in order of creation, or those that follow ``after``; whether there are more."""
        records = await self._jobs.call_timed(self._jobs.store.page, owner, limit + 1, after, newest_first)
        return records[:limit], len(records) > limit

    async def content(self, owner: str, job_id: str) -> tuple[JobRecord, RangeReader]:
        """A finished video. Raises RequestError: 404; 409 if it is not ready or has failed; 410 if it is gone."""
        record = await self.find(owner, job_id)
        if record.status != "completed":
            raise video_unavailable(record)
        video = await self._files.call_timed(self._files.store.video, record)
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
        else:
            cancel, keep_seconds = self._jobs.store.cancel, self._config.keep_seconds
            if (ended := await self._jobs.call_timed(cancel, owner, job_id, keep_seconds)) is not None:
                await self._finisher.clean_up(ended, "cancelled")  # no replica ran it
                return ended
        return await self._wait_until(owner, job_id, lambda record: record.ended)

    async def change(self, owner: str, job_id: str, values: dict[str, Any]) -> tuple[JobRecord, int]:
        """Has the replica that runs a job change these values. Returns the record, and the index of the change in it,
        which may still be pending.

        Raises:
            RequestError: 404; 409 if the job has ended; 422 if it has too many changes or texts.
        """
        self._jobs.check_responsive()
        check = functools.partial(_check_change, values, self._config.limits)
        record = await self._jobs.call_timed(self._jobs.store.add_change, owner, job_id, values, check)
        if record is None:
            raise not_found()
        if (job := self._running.get(job_id)) is not None:
            job.take_changes(record.changes)
        count = len(record.changes)

        def is_decided(record: JobRecord) -> bool:
            return record.status != "in_progress" or len(record.change_frames) >= count

        return await self._wait_until(owner, job_id, is_decided), count - 1

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
            raise RequestError(409, "not_ready", message, retry_after=ANSWER_SECONDS)
        await self._files.call_timed(self._files.store.delete, record)  # first: no video is left without a record
        await self._jobs.call_timed(self._jobs.store.delete, [record.id])

    async def remove_expired(self) -> None:
        """Removes what has expired, unless another replica has just done so."""
        jobs, files = self._jobs, self._files
        if not await jobs.call(jobs.store.start_sweep, self.sweep_seconds):
            return
        while records := await jobs.call(jobs.store.expired_files, SWEEP_JOBS):
            await files.call(files.store.delete, *records)
            await jobs.call(jobs.store.mark_removed, [record.id for record in records])
        await jobs.call(jobs.store.remove_expired, self._config.keep_seconds)

    async def _wait_until(self, owner: str, job_id: str, happened: Callable[[JobRecord], bool]) -> JobRecord:
        deadline = time.monotonic() + max(ANSWER_SECONDS, 2 * self._config.poll_seconds)
        while not happened(record := await self.find(owner, job_id)) and time.monotonic() < deadline:
            await asyncio.sleep(0.02 if job_id in self._running else 0.1)
        return record


def _check_change(values: dict[str, Any], limits: RequestLimits, record: JobRecord) -> None:
    """Raises RequestError unless the job may have this change, too."""
    if record.ended:
        message = f"The video is {record.status}: only an unfinished one can be changed."
        raise RequestError(409, record.status, message)
    if len(record.changes) >= limits.changes:
        raise invalid(None, f"The video has {len(record.changes)} changes already, and {limits.changes} are allowed.")
    texts = {change["prompt"] for change in (*record.changes, values) if change.get("prompt")}
    if (count := len(texts.union(record.sampling.texts))) > limits.texts:
        raise invalid("prompt", f"The video would have {count} texts: at most {limits.texts} are allowed.")
