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

    async def follow(
        self, owner: str, job_id: str, position: int = 0, begun: int | None = None
    ) -> AsyncIterator[bytes]:
        """Yields a job's video from a position on while it is generated, whichever replica does so.

        Args:
            position: Bytes that the reader has already.
            begun: The video of which it has them, as it began then.

        Raises:
            RequestError: 404; 409 for a job that failed or was cancelled; 410 for an expired one, or if its stream is
                not kept any more; 412 if the video began again.
            JobError: This replica has been stopped.
        """
        while True:
            job = self._running.get(job_id, owner)
            if job is not None and not job.log.ended:
                try:
                    async for data in job.log.follow(position):
                        begun = _check_begun(begun, job.record)
                        position += len(data)
                        yield data
                    _check_begun(begun, job.record)  # also of a reader that is past the end of the new stream
                    return
                except JobError as error:
                    if error.kind != "lost":  # else another replica continues it
                        raise
            record = await self._videos.find(owner, job_id)
            if record.status == "completed" and position == 0:
                _, video = await self._videos.content(owner, job_id)
                with await self._files.call(as_fragments, video) as file:
                    while data := file.read(PIECE_BYTES):
                        yield data
                return
            if record.ended and record.status != "completed":
                raise video_unavailable(record)
            if record.stream_bytes:
                begun = _check_begun(begun, record)
                if data := await self._jobs.call_timed(self._jobs.store.read_stream, record, position):
                    position += len(data)
                    yield data
                    continue
            if record.status == "completed":
                if position < record.stream_bytes:
                    message = "The rest of the stream is not kept any more: GET the content."
                    raise RequestError(410, "gone", message)
                return
            await self._pause(0.2, self._config.poll_seconds, self._config.segment_seconds)

    async def _pause(self, *seconds: float) -> None:
        """Waits before the next look at the database. Raises JobError when this replica's time for draining is over."""
        if self._shutdown.overdue:
            raise JobError("released", "The replica that sent the video was stopped: request it again.")
        await asyncio.sleep(min(seconds))


def _check_begun(begun: int | None, record: JobRecord) -> int:
    """Returns the lease under which the video began. Raises RequestError 412 unless it is that of the reader."""
    if begun not in (None, record.begun):
        raise RequestError(412, "restarted", "The video began again: read it from its beginning.")
    return record.begun
