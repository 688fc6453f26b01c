"""Publishes what this replica's jobs have done, for the other replicas."""

import asyncio
import contextlib

from ardiff.serving.async_store import AsyncStore
from ardiff.serving.errors import RequestError
from ardiff.serving.jobs import Job, RunningJobs


class ProgressPublisher:
    """Writes heartbeats, records and video segments of the running jobs."""

    def __init__(self, storage: AsyncStore, running: RunningJobs) -> None:
        self._storage, self._running = storage, running

    async def send_heartbeats(self) -> None:
        """Renews all leases at the same time, so that slow storage delays none of them."""
        jobs = list(self._running)
        for job in jobs:
            job.heartbeat = asyncio.ensure_future(self._heartbeat(job))
        await asyncio.gather(*(job.heartbeat for job in jobs if job.heartbeat))

    async def publish(self) -> None:
        """Writes the record and the new segment of every job that has progressed."""
        for job in self._running:
            async with job.write_lock:
                if job.log.ended or job.record.status == "queued" or job.published == job.record:
                    continue
                with contextlib.suppress(RequestError):
                    await self.write_segment(job)
                    record = job.record
                    await self._storage.call(self._storage.store.write, record)
                    job.published = record

    async def write_segment(self, job: Job) -> None:
        """Writes the fragments that are not published yet as the next segment. The caller holds ``write_lock``."""
        fragments = job.log.fragments[job.published_fragments :]
        if not fragments:
            return
        await self._storage.call(self._storage.store.write_segment, job.record, job.segments, b"".join(fragments))
        job.published_fragments += len(fragments)
        job.segments += 1

    async def _heartbeat(self, job: Job) -> None:
        with contextlib.suppress(RequestError):  # the queue's loop reports unavailable storage
            await self._storage.heartbeat(job.record)
