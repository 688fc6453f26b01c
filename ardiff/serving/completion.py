"""Ends jobs: writes the video and the final record, or returns the job to the queue."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ardiff.serving.async_store import Stores
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.fragments import as_file
from ardiff.serving.jobs import Job, RunningJobs
from ardiff.serving.metrics import Recorder
from ardiff.serving.progress import ProgressPublisher
from ardiff.serving.records import JobRecord, Status

logger = logging.getLogger(__name__)


class JobFinisher:
    """Ends jobs in the background, while others run."""

    def __init__(
        self,
        stores: Stores,
        running: RunningJobs,
        publisher: ProgressPublisher,
        config: ServiceConfig,
        metrics: Recorder,
    ) -> None:
        self._jobs, self._files, self._running, self._publisher = stores.jobs, stores.files, running, publisher
        self._config, self._metrics = config, metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_finished: Callable[[], None] = lambda: None
        """Called when a running job has ended and its capacity is free."""

    @property
    def busy(self) -> bool:
        """Whether the end of a job is still being written."""
        return bool(self._tasks)

    def finish(self, job: Job, failure: JobError | None, frames_sha256: str | None) -> None:
        """Ends a job that has left the engine."""
        task = asyncio.ensure_future(self._finish(job, failure, frames_sha256))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish_claimed(self, record: JobRecord, failure: JobError) -> None:
        """Ends a job that this replica cannot run, although it holds the lease."""
        final = self._final_record(record, "failed", failure)
        await self._jobs.call(self._jobs.store.finish, final, self._config.keep_seconds)
        await self.clean_up(record, "failed")

    async def clean_up(self, record: JobRecord, status: Status) -> None:
        """Counts an ended job, and deletes its given frames. If that fails, they are deleted when the job expires."""
        self._metrics.record("ardiff_jobs_ended", 1, status=status)
        if record.sampling.given_frames:
            with contextlib.suppress(RequestError):
                await self._files.call(self._files.store.delete_input, record)

    async def _finish(self, job: Job, failure: JobError | None, frames_sha256: str | None) -> None:
        video = None
        if failure is None:
            try:
                video = await asyncio.to_thread(as_file, b"".join(job.log.fragments))
            except Exception as error:  # for example a full disk for temporary files
                logger.error("Job %s failed.", job.record.id, exc_info=error)
                failure = JobError("internal", "Writing the video file failed. The server log has the reason.")
        job.log.end(failure)
        record = self._outcome(job, replace(job.record, frames_sha256=frames_sha256), failure, video)
        stored = failure is None or failure.kind != "lost"
        if stored:
            async with job.write_lock:
                stored = await self._write(job, record, video)
        self._running.remove(record.id)
        if stored and record.ended:
            await self.clean_up(record, record.status)
        if stored and record.status == "completed":
            self._metrics.record("ardiff_job_seconds", time.time() - record.created_at, model=record.model)
        self.on_finished()

    def _outcome(self, job: Job, record: JobRecord, failure: JobError | None, video: bytes | None) -> JobRecord:
        """The final record, or the unchanged one of a job that runs again or elsewhere."""
        if failure is None:
            return self._final_record(replace(record, video_bytes=len(video or b"")), "completed", None)
        match failure.kind:
            case "cancelled":
                return self._final_record(record, "cancelled", None)
            case "released" if record.kind == "stream" and not job.log.fragments:
                return self._final_record(record, "failed", JobError("stopped", str(failure)))
            case "released":
                return replace(record, kind="job")
            case "lost":
                return record
            case _:
                self._metrics.record("ardiff_errors", 1, kind=failure.kind)
                return self._final_record(record, "failed", failure)

    def _final_record(self, record: JobRecord, status: Status, failure: JobError | None) -> JobRecord:
        kind, message = (failure.kind, str(failure)) if failure and status == "failed" else (None, None)
        return replace(record, status=status, error_type=kind, error=message)

    async def _write(self, job: Job, record: JobRecord, video: bytes | None) -> bool:
        """Writes the end of a job. Retries during an outage: until then the job has not ended.

        Returns:
            Whether it is written: another replica may have the lease now, or have ended the job.
        """
        deadline, video_written = time.monotonic() + self._config.keep_seconds, video is None
        while time.monotonic() < deadline:
            try:
                while job.published_fragments < len(job.log.fragments) or job.unpublished:
                    await self._publisher.publish_job(job)  # before the end: readers elsewhere get all segments
                record = replace(record, stream_bytes=job.record.stream_bytes)
                if not record.ended:
                    await self._jobs.call(self._jobs.store.release, record)
                    return True
                if not video_written:
                    await self._files.call(self._files.store.write_video, record, video or b"")
                    video_written = True
                if await self._jobs.call(self._jobs.store.finish, record, self._config.keep_seconds) is not None:
                    return True
                stored = await self._jobs.call(self._jobs.store.read, record.owner, record.id)
                if stored is not None and (stored.lease, stored.status) == (record.lease, record.status):
                    return True  # it was written, although the response was lost
                if video is not None:
                    await self._files.call(self._files.store.delete_video, record)
                return False
            except RequestError:
                await asyncio.sleep(min(2.0, self._config.heartbeat_seconds))
        return False
