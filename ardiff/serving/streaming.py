"""Streams videos while they are generated, on this replica or on another."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from ardiff.serving.async_store import Stores
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError, video_unavailable
from ardiff.serving.fragments import as_fragments
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.keys import ApiKeys
from ardiff.serving.records import JobRecord
from ardiff.serving.responses import PIECE_BYTES
from ardiff.serving.shutdown import Shutdown
from ardiff.serving.videos import Videos


class Streams:
    """The streams that clients of this replica read."""

    def __init__(
        self,
        videos: Videos,
        stores: Stores,
        running: RunningJobs,
        keys: ApiKeys,
        config: ServiceConfig,
        shutdown: Shutdown,
    ) -> None:
        self._videos, self._jobs, self._files, self._running = videos, stores.jobs, stores.files, running
        self._keys, self._config, self._shutdown = keys, config, shutdown
        self.num_open: Counter[str] = Counter()
        """Open streams by owner."""

    @contextlib.contextmanager
    def open(self, owner: str) -> Iterator[None]:
        """Counts a stream as open. Raises RequestError 429 if the owner has too many on this replica."""
        if self.num_open[owner] >= self._keys.limits_of(owner).streams:
            raise RequestError(429, "too_many_streams", "Too many open streams: close one.", retry_after=5)
        self.num_open[owner] += 1
        try:
            yield
        finally:
            self.num_open[owner] -= 1

    async def follow(self, owner: str, job_id: str) -> AsyncIterator[bytes]:
        """Yields a job's video from its beginning while it is generated.

        Raises:
            RequestError: 404; 409 for a job that failed or was cancelled; 410 for an expired one.
            JobError: The job ended without a complete video while it was read.
        """
        while True:
            if (job := self._running.get(job_id, owner)) is not None:
                async for data in job.log.follow():
                    yield data
                return
            record = await self._videos.find(owner, job_id)
            if record.status == "completed":
                _, video = await self._videos.content(owner, job_id)
                with await self._files.call(as_fragments, video) as file:
                    while data := file.read(PIECE_BYTES):
                        yield data
                return
            if record.ended:
                raise video_unavailable(record)
            if record.status == "in_progress" and job_id not in self._running:
                break
            await self._pause(0.2, self._config.poll_seconds)
        async for data in self._follow_other_replica(owner, record):
            yield data

    async def _follow_other_replica(self, owner: str, record: JobRecord) -> AsyncIterator[bytes]:
        """Yields the segments that another replica writes to the database."""
        index, completed = 0, False
        while True:
            segment = await self._jobs.call_timed(self._jobs.store.read_segment, record, index)
            if segment is not None:
                index += 1
                yield segment
                continue
            if completed:  # it was so before the read: there is no further segment
                return
            latest = await self._videos.find(owner, record.id)
            if latest.lease != record.lease or latest.status in ("failed", "cancelled", "expired", "queued"):
                raise JobError("incomplete", "The replica that generated the video has stopped: request it again.")
            completed = latest.status == "completed"
            if not completed:
                await self._pause(0.25, self._config.segment_seconds)

    async def _pause(self, *seconds: float) -> None:
        """Waits before the next look at the database. Raises JobError when this replica's time for draining is over."""
        if self._shutdown.overdue:
            raise JobError("released", "The replica that sent the video was stopped: request it again.")
        await asyncio.sleep(min(seconds))
