"""Publishes what this replica's jobs have done, for the other replicas."""

import contextlib

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

    async def publish_job(self, job: Job) -> None:
        """Writes what is not published yet. The caller holds ``write_lock``."""
        record = job.record
        if not job.unpublished:  # after a failure the same segment is written again: it may have been stored
            job.unpublished = b"".join(job.log.fragments[job.published_fragments :])
            job.published_fragments = len(job.log.fragments)
        await self._jobs.call(self._jobs.store.publish, record, job.segments, job.unpublished)
        job.published = record
        job.segments += bool(job.unpublished)
        job.unpublished = b""
