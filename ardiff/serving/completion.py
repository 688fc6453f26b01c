"""Ends jobs: writes the video and the final record, or returns the job to the queue."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from ardiff.serving.async_store import AsyncStore
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.fragments import as_file
from ardiff.serving.jobs import Job, RunningJobs
from ardiff.serving.metrics import Recorder
from ardiff.serving.progress import ProgressPublisher
from ardiff.serving.records import JobRecord, Status

logger = logging.getLogger(__name__)
WITHDRAW_ATTEMPTS = 10


class JobFinisher:
    """Ends jobs in the background, while others run."""

    def __init__(
        self,
        storage: AsyncStore,
        running: RunningJobs,
        publisher: ProgressPublisher,
        config: ServiceConfig,
        metrics: Recorder,
    ) -> None:
        self._storage, self._running, self._publisher = storage, running, publisher
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
        self._start(self._finish(job, failure, frames_sha256))

    def withdraw(self, record: JobRecord) -> None:
        """Removes the files of a rejected request, once storage is available again."""
        self._start(self._withdraw(record))

    async def finish_queued(self, record: JobRecord, status: Status, failure: JobError | None = None) -> JobRecord:
        """Ends a job that no replica runs; the caller holds its lease. Returns the final record."""
        final = self._final_record(record, status, failure)
        await self._storage.call(self._storage.store.finish, final, None)
        self._metrics.record("ardiff_jobs_ended", 1, status=status)
        return final

    def _start(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(action)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, job: Job, failure: JobError | None, frames_sha256: str | None) -> None:
        video = None
        if failure is None:
            try:
                video = await asyncio.to_thread(as_file, b"".join(job.log.fragments))
            except Exception as error:  # for example a full disk for temporary files
                logger.error("Job %s failed.", job.record.id, exc_info=error)
                failure = JobError("internal", "Writing the video file failed. The server log has the reason.")
        job.log.end(failure)
        record = self._outcome(replace(job.record, frames_sha256=frames_sha256), failure, video)
        if failure is None or failure.kind != "lost":
            async with job.write_lock:
                await self._write(job, record, video)
        self._running.remove(record.id)
        if record.ended:
            self._metrics.record("ardiff_jobs_ended", 1, status=record.status)
        if record.status == "completed":
            seconds = (record.ended_at or record.created_at) - record.created_at
            self._metrics.record("ardiff_job_seconds", seconds, model=record.model)
        self.on_finished()
        if job.heartbeat is not None:  # it may write the lease again after its removal
            await job.heartbeat
            with contextlib.suppress(RequestError):
                await self._storage.call(self._storage.store.drop_leases, record)

    def _outcome(self, record: JobRecord, failure: JobError | None, video: bytes | None) -> JobRecord:
        """The final record, or the unchanged one of a job that runs again or elsewhere."""
        if failure is None:
            return self._final_record(replace(record, video_bytes=len(video or b"")), "completed", None)
        match failure.kind:
            case "cancelled":
                return self._final_record(record, "cancelled", None)
            case "released" if record.kind == "stream":
                return self._final_record(record, "failed", JobError("stopped", str(failure)))
            case "released" | "lost":
                return record
            case _:
                self._metrics.record("ardiff_errors", 1, kind=failure.kind)
                return self._final_record(record, "failed", failure)

    def _final_record(self, record: JobRecord, status: Status, failure: JobError | None) -> JobRecord:
        now = time.time()
        kind, message = (failure.kind, str(failure)) if failure and status == "failed" else (None, None)
        return replace(
            record,
            status=status,
            ended_at=now,
            expires_at=now + self._config.keep_seconds,
            error_type=kind,
            error=message,
        )

    async def _write(self, job: Job, record: JobRecord, video: bytes | None) -> None:
        """Writes the end of a job. Retries while storage is unavailable: until then the job has not ended."""
        deadline = time.monotonic() + self._config.keep_seconds
        while time.monotonic() < deadline:
            try:
                if not record.ended:
                    await self._storage.call(self._storage.store.release, record)
                    return
                await self._publisher.write_segment(job)  # before the record: readers elsewhere get all segments
                await self._storage.call(self._storage.store.finish, record, video)
                return
            except RequestError:
                await asyncio.sleep(min(2.0, self._config.heartbeat_seconds))

    async def _withdraw(self, record: JobRecord) -> None:
        for _ in range(WITHDRAW_ATTEMPTS):
            await asyncio.sleep(self._config.storage_seconds)
            with contextlib.suppress(RequestError):
                if (job := self._running.get(record.id)) is not None:
                    job.stop(JobError("cancelled", "The request was rejected."))
                    continue
                await self._storage.call(self._storage.store.delete, record)
                return
