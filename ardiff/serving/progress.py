"""Publishes what this replica's jobs have done, for the other replicas."""

import contextlib
from dataclasses import replace

from ardiff.serving.async_store import Stores
from ardiff.serving.errors import RequestError
from ardiff.serving.jobs import Job, RunningJobs


class ProgressPublisher:
    """Writes heartbeats, records and video segments of the running jobs."""

    def __init__(self, stores: Stores, running: RunningJobs) -> None:
        self._jobs, self._heartbeats, self._running = stores.jobs, stores.heartbeats, running

    async def send_heartbeats(self) -> None:
        """Renews all leases."""
        if records := [job.record for job in self._running]:
            await self._heartbeats.call(self._heartbeats.store.heartbeat, records)

    async def publish(self) -> None:
        """Writes the record and the new segment of every job that has progressed."""
        for job in self._running:
            async with job.write_lock:
                if not (job.log.ended or job.deadline is None or job.published == job.record):
                    with contextlib.suppress(RequestError):
                        await self.publish_job(job)

    async def publish_now(self, job: Job) -> bool:
        """Writes the record and what else is not published yet. Returns False without the lease.

        Raises:
            UnavailableError: The record may be written or not. The next time that it is published decides.
        """
        async with job.write_lock:
            return await self.publish_job(job)

    async def publish_job(self, job: Job) -> bool:
        """Like ``publish_now``, for a caller who holds ``write_lock``."""
        if job.unpublished is None:  # after a failure the same segment is written again: it may have been stored
            job.unpublished = job.next_segment()
        segment, record = job.unpublished, job.record
        if segment is not None:
            record = replace(record, stream_bytes=segment.start + len(segment.data))
        held = await self._jobs.call(self._jobs.store.publish, record, segment)
        job.record = replace(job.record, stream_bytes=record.stream_bytes)
        job.published, job.unpublished = record, None
        return held
