"""A replica's part in the service: takes jobs from the shared queue, runs them, and keeps their records true.

Any replica answers for any job. Which replica works on a job is decided by leases (see :mod:`ardiff.serving.records`);
a job whose replica gives no sign of life goes back to the queue, or fails with the reason.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ardiff.errors import ArdiffError, ConfigError, DataError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.serving.config import ServiceConfig
from ardiff.serving.fragments import as_file, as_fragments
from ardiff.serving.keys import KeyEntry, KeyLimits, RateLimiter, read_keys
from ardiff.serving.metrics import Recorder
from ardiff.serving.records import JobRecord, JobStore, Lease, Status, new_id
from ardiff.serving.requests import Described, RequestError, VideoRequest, invalid, iterations, settle
from ardiff.serving.runner import Job, JobError, ModelRunner
from ardiff.serving.uploads import decode_upload

logger = logging.getLogger(__name__)
GIVING_BACK = 10.0
"""Seconds, after the time for draining, in which jobs that are not done are given back to the queue."""
DECODERS, WAITING_FOR_DECODERS = 2, 8
"""Uploads that are decoded at once, and those that may wait for it with their bytes in memory."""
ResultT = TypeVar("ResultT")


class VideoService:
    """Jobs of this replica, and the view of all others. Start it inside a running event loop."""

    def __init__(
        self,
        pipelines: Mapping[str, ARDiffusionPipeline],
        config: ServiceConfig,
        metrics: Recorder,
        replica: str,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            stopping: Whether this replica has been told to stop: asked before each look at the queue. Whoever hosts the
                replica may wait for its connections first, and call ``stop`` only then.
        """
        if not pipelines:
            raise ConfigError("There is no model to serve: give checkpoint=PLACE, or models.NAME=PLACE.")
        for name, pipeline in pipelines.items():
            if reason := pipeline.info.mode_error("window", 1):
                raise ConfigError(f"The model {name} cannot be served: {reason}.")
        self.config, self.metrics, self.replica = config, metrics, replica
        self.keys: dict[str, KeyEntry] = read_keys(config.keys) if config.keys else {}
        self.store = JobStore(config.storage)
        self.runners = {
            name: ModelRunner(name, pipeline, config, metrics, self._ended) for name, pipeline in pipelines.items()
        }
        self.models = {name: Described(name, r.pipeline, r.check) for name, r in self.runners.items()}
        self.jobs: dict[str, Job] = {}
        self.waiting = 0
        self.storage_up = True
        self.draining: asyncio.Task[None] | None = None
        """What finishes the jobs in work and gives the others back, once the replica takes no more."""
        self._drain_ends = math.inf
        self._stopping = stopping
        self._marked = False
        self._quiet = False
        """Whether a job whose replica has died waits until nothing else runs here."""
        self._rates = RateLimiter()
        self._open_streams: Counter[str] = Counter()
        self._seen: dict[str, tuple[Lease, float]] = {}
        self._looked = -math.inf
        self._decoders, self._decoding = asyncio.Semaphore(DECODERS), 0
        self._look = asyncio.Event()
        self._admission = asyncio.Lock()
        self._asked = 0
        """Calls of storage without an answer yet."""
        self._storage = ThreadPoolExecutor(8, "storage")
        self._beats = ThreadPoolExecutor(len(pipelines) * config.engine.max_requests, "beats")
        self._tasks: list[asyncio.Task[None]] = []
        self._endings: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts the loops, after the folder is marked as the service's, if storage is there."""
        with contextlib.suppress(RequestError):  # then the first look at the queue that succeeds marks it
            await self._mark()
        loops = [runner.run() for runner in self.runners.values()]
        loops += [
            self._every(self.config.poll_seconds, self._heed),  # also while the next waits for storage
            self._every(self.config.poll_seconds, self._poll, self._look),
            self._every(self.config.heartbeat_seconds, self._beat),
            self._every(self.config.segment_seconds, self._write_progress),
            self._every(min(60.0, self.config.keep_seconds), self._sweep),
            self._every(self.config.keys_seconds, self._read_keys),
        ]
        self._tasks = [asyncio.ensure_future(loop) for loop in loops]

    def drain(self) -> None:
        """Takes no more jobs, finishes those in work if time allows, gives the others back to the queue."""
        if self.draining is None:
            self._drain_ends = time.monotonic() + self.config.drain_seconds
            self.draining = asyncio.ensure_future(self._drain())

    async def stop(self) -> None:
        """Drains, and then ends all that runs here."""
        self.drain()
        assert self.draining is not None
        await self.draining
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runner in self.runners.values():
            runner.close()
        self._storage.shutdown(wait=False)
        self._beats.shutdown(wait=False)

    async def _drain(self) -> None:
        logger.info("Draining: %d jobs in work, for %g s at most.", len(self.jobs), self.config.drain_seconds)
        while (self.jobs or self._endings) and time.monotonic() < self._drain_ends:
            await asyncio.sleep(0.05)
        for job in list(self.jobs.values()):
            self._runner(job).stop(job, JobError("released", "The replica that generated the video was stopped."))
        grace = time.monotonic() + GIVING_BACK
        while (self.jobs or self._endings) and time.monotonic() < grace:
            await asyncio.sleep(0.05)

    async def _heed(self) -> None:
        if self._stopping():
            self.drain()

    @property
    def healthy(self) -> bool:
        """Whether all loops run; a loop ends only by a fault of the program."""
        return not any(task.done() for task in self._tasks)

    @property
    def load(self) -> int:
        """Jobs of this replica, in work or about to be."""
        return len(self.jobs)

    def limits_of(self, owner: str) -> KeyLimits:
        """What a key may have: limits of its own, or else the service's."""
        entry, config = self.keys.get(owner), self.config
        return KeyLimits(
            (entry and entry.requests_per_minute) or config.requests_per_minute,
            (entry and entry.jobs) or config.jobs_per_key,
            (entry and entry.streams) or config.streams_per_key,
        )

    @contextlib.contextmanager
    def reading(self, owner: str) -> Iterator[None]:
        """Counts an open stream. Raises RequestError 429 if the owner has too many at this replica."""
        if self._open_streams[owner] >= self.limits_of(owner).streams:
            raise RequestError(429, "too_many_streams", "Too many open streams: close one.", retry_after=5)
        self._open_streams[owner] += 1
        try:
            yield
        finally:
            self._open_streams[owner] -= 1

    async def create(
        self, owner: str, asked: VideoRequest, upload: bytes | None, streaming: bool
    ) -> tuple[JobRecord, Job | None]:
        """Accepts a job: checks everything, then puts it into the queue, or starts it here if it is ``streaming``.

        Raises:
            RequestError: 4xx or 503, and nothing was accepted.
        """
        if self.draining:
            raise self._busy("This replica is stopping: try again.", 1)
        if wait := self._rates.wait(owner, self.limits_of(owner).requests_per_minute):
            raise RequestError(429, "rate_limit", "Too many requests in a minute: wait.", retry_after=wait)
        model = self._model(asked.model)
        settings = settle(asked, model, self.config, 0)  # cheap, so before the upload is looked at
        given = None
        if upload is not None:
            await self._check_room(owner, model.name if streaming else None)  # before the work as well
            given = await self._decode(upload, model)
            settings = {**settle(asked, model, self.config, len(given)), "seed": settings["seed"]}
        record = JobRecord(
            id=new_id(),
            owner=owner,
            kind="stream" if streaming else "job",
            settings=settings,
            num_frames=settings["num_frames"],
            iterations=iterations(settings),
            created_at=time.time(),
            lease=int(streaming),
        )
        async with self._admission:  # so that the count holds until the job is in the queue
            await self._check_room(owner, model.name if streaming else None)
            try:
                await self.storage(self.store.create, record, given)
            except RequestError:
                self._background(self._withdraw(record))
                raise
            job = self._begin(record, given) if streaming else None
            self.waiting += not streaming
        self._look.set()
        return record, job

    async def find(self, owner: str, job_id: str) -> JobRecord:
        """The record as it is now. Raises RequestError 404, or 503 when storage is away."""
        job = self.jobs.get(job_id)
        if job is not None and job.record.owner == owner:
            return job.record
        record = await self.storage(self.store.read, owner, job_id)
        if record is None:
            raise RequestError(404, "not_found", "There is no such video.")
        return record.now()

    async def list_jobs(self, owner: str, limit: int, before: str | None) -> tuple[list[JobRecord], bool]:
        """The owner's jobs, newest first, and whether there are more."""
        records = await self.storage(self.store.newest, owner, limit + 1, before)
        fresh = [self.jobs[r.id].record if r.id in self.jobs else r.now() for r in records]
        return fresh[:limit], len(fresh) > limit

    async def cancel_or_delete(self, owner: str, job_id: str) -> JobRecord | None:
        """Cancels a job that has not ended and returns its record, or deletes one that has and returns None."""
        record = await self.find(owner, job_id)
        if record.ended:
            await self.storage(self.store.delete, record)
            return None
        reason = JobError("cancelled", "Cancelled.")
        job = self.jobs.get(job_id)
        if job is None:
            claimed = await self.storage(self.store.claim, owner, job_id)
            if claimed is not None:  # nobody works on it
                return await self._finish_unstarted(claimed, "cancelled", None)
            await self.storage(self.store.request_cancel, record)
            return await self._await_end(owner, job_id)
        self._runner(job).stop(job, reason)
        return await self._await_end(owner, job_id)

    def stop_stream(self, job: Job) -> None:
        """The client of a streamed job has gone."""
        self._runner(job).stop(job, JobError("cancelled", "The client closed the connection."))

    async def follow(self, owner: str, job_id: str) -> AsyncIterator[bytes]:
        """The video of a job from its beginning, as it is made, wherever it is made.

        Raises:
            RequestError: 404; 409 for a job that failed or was cancelled, 410 for an expired one.
            JobError: The job ended without a whole video while it was read.
        """
        while True:
            if (job := self.jobs.get(job_id)) is not None and job.record.owner == owner:
                async for part in job.log.follow():
                    yield part
                return
            record = await self.find(owner, job_id)
            if record.status == "completed":
                yield await asyncio.to_thread(as_fragments, await self.storage(self.store.video, record))
                return
            if record.ended:
                raise not_available(record)
            if record.status == "in_progress" and job_id not in self.jobs:
                break
            self._check_time()
            await asyncio.sleep(min(0.2, self.config.poll_seconds))
        index = 0
        while True:  # another replica works on it
            if (segment := await self._segment(record, index)) is not None:
                index += 1
                yield segment
                continue
            latest = await self.find(owner, job_id)
            if latest.lease != record.lease or latest.status in ("failed", "cancelled", "expired", "queued"):
                raise JobError("incomplete", "The replica that generated the video has stopped: ask again.")
            if latest.status == "completed":
                if (segment := await self._segment(record, index)) is None:
                    return
                index += 1
                yield segment
                continue
            self._check_time()
            await asyncio.sleep(min(0.25, self.config.segment_seconds))

    def _check_time(self) -> None:
        """Raises JobError when this replica's time for draining is over, for a reader of what another generates."""
        if time.monotonic() > self._drain_ends:
            raise JobError("released", "The replica that sent the video was stopped: ask again.")

    async def _segment(self, record: JobRecord, index: int) -> bytes | None:
        return await self.storage(self.store.read_segment, record, index)

    async def video(self, owner: str, job_id: str) -> tuple[JobRecord, bytes]:
        """A finished video. Raises RequestError: 404, 409 if it is not ready or never will be, 410 if expired."""
        record = await self.find(owner, job_id)
        if record.status != "completed":
            raise not_available(record)
        return record, await self.storage(self.store.video, record)

    async def patient(self, operation: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Runs a method of the store in a thread, however long that takes. Raises RequestError when storage is away."""
        return await self._ask(self._storage, operation, *arguments)

    async def _ask(self, threads: ThreadPoolExecutor, operation: Callable[..., ResultT], *arguments: Any) -> ResultT:
        self._asked += 1
        try:
            result = await asyncio.get_running_loop().run_in_executor(threads, operation, *arguments)
        except DataError as error:
            raise self._away(error) from error
        finally:
            self._asked -= 1
        self._storage_is(True)
        return result

    async def storage(self, operation: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Like ``patient``, for clients, who do not wait for ever."""
        try:
            return await asyncio.wait_for(self.patient(operation, *arguments), self.config.storage_seconds)
        except TimeoutError as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> RequestError:
        self._storage_is(False)
        logger.warning("Storage: %s", error or "no answer")
        return self._unavailable()

    def _unavailable(self) -> RequestError:
        message = "The storage of jobs cannot be reached: try again."
        return RequestError(503, "storage_unavailable", message, retry_after=5)

    def _storage_is(self, up: bool) -> None:
        self.storage_up = up
        self.metrics.record("ardiff_storage_up", float(up))

    def _model(self, name: str | None) -> Described:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise invalid("model", f"There is no model '{name[:64]}': {', '.join(self.models)}.")
        return self.models[name]

    def _runner(self, job: Job) -> ModelRunner:
        return self.runners[job.record.settings["model"]]

    def _busy(self, message: str, retry_after: float) -> RequestError:
        return RequestError(503, "overloaded", message, retry_after=retry_after)

    async def _decode(self, upload: bytes, model: Described) -> np.ndarray:
        limits = self.config.limits
        if self._decoding >= DECODERS + WAITING_FOR_DECODERS:
            raise self._busy("Too many uploads are being looked at: try again.", 2)
        self._decoding += 1
        try:
            async with self._decoders:
                return await decode_upload(
                    upload,
                    model.pipeline.vae.config.resolution,
                    limits.upload_frames,
                    limits.upload_pixels,
                    limits.upload_seconds,
                    limits.upload_memory_bytes,
                )
        except DataError as error:
            raise invalid("input_reference", str(error)) from error
        finally:
            self._decoding -= 1

    async def _check_room(self, owner: str, stream_of: str | None) -> None:
        """Raises RequestError if the queue is full, the owner has too many jobs, or a stream cannot start at once.

        The last free place is for a job that waits: streams, which do not wait, could keep it from its turn for ever.
        While storage is away and others wait for its answer, nobody else is kept waiting.
        """
        if self._asked and not self.storage_up:
            raise self._unavailable()
        open_jobs = await self.storage(self.store.open_jobs)
        leases = await self.storage(self.store.leases)
        if sum(1 for other in open_jobs.values() if other == owner) >= self.limits_of(owner).jobs:
            raise RequestError(429, "too_many_jobs", "Too many unfinished videos: wait for one.", retry_after=5)
        self.waiting = sum(1 for job_id in open_jobs if job_id not in leases)
        waiting_here = sum(1 for job in self.jobs.values() if job.record.status == "queued")
        room = sum(runner.room for runner in self.runners.values())
        if self.waiting + waiting_here >= self.config.max_waiting + room:
            raise self._busy(f"{self.waiting} videos wait already: try again later.", 5)
        if stream_of is not None and (self._quiet or self.runners[stream_of].room <= bool(self.waiting)):
            raise self._busy("No place is free now: try again, or ask for a job, which waits for one.", 2)

    def _begin(self, record: JobRecord, given: np.ndarray | None) -> Job:
        job = Job(record, given)
        self.jobs[record.id] = job
        self._runner(job).start(job)
        self.metrics.record("ardiff_jobs_running", len(self.jobs))
        return job

    async def _mark(self) -> None:
        if not self._marked:
            await self.storage(self.store.mark)
            self._marked = True

    async def _poll(self) -> None:
        """Looks at the shared queue: takes what there is room for, hears cancellations, takes over from the dead."""
        await self._mark()
        open_jobs = await self.patient(self.store.open_jobs)
        leases = await self.patient(self.store.leases)
        for job_id in await self.patient(self.store.cancels) if self.jobs else ():
            if (job := self.jobs.get(job_id)) is not None:
                self._runner(job).stop(job, JobError("cancelled", "Cancelled."))
        for job_id, job in list(self.jobs.items()):
            if job_id in leases and leases[job_id].number > job.record.lease:
                self._runner(job).stop(job, JobError("lost", "Another replica took the job over."))
        waiting = [job_id for job_id in open_jobs if job_id not in leases and job_id not in self.jobs]
        self.waiting = len(waiting)
        self.metrics.record("ardiff_jobs_waiting", self.waiting)
        await self._heed()
        if self.draining:
            return
        await self._take_over(open_jobs, leases)
        quiet = False
        for job_id in waiting:
            if self.draining or not any(runner.room for runner in self.runners.values()):
                break
            if quiet := not await self._claim(open_jobs[job_id], job_id):
                break
        self._quiet = quiet

    async def _claim(self, owner: str, job_id: str) -> bool:
        """Takes a waiting job if it can be taken. False if it has to wait until nothing else runs, and others for it.

        That is so of a job whose replica died: it may be what killed it, and then nobody else is to die with it.
        """
        waiting = await self.patient(self.store.read, owner, job_id)
        gone = False
        if waiting is not None:
            runner = self.runners.get(waiting.settings["model"])
            # While models are changed, only some replicas may have one.
            gone = runner is None and time.time() - waiting.created_at > self.config.job_seconds
            if not gone and (runner is None or not runner.room):
                return True
            if waiting.deaths and runner is not None and runner.busy:
                return False
        record = await self.patient(self.store.claim, owner, job_id)
        if record is None:
            return True
        if record.kind == "stream":
            await self._finish_unstarted(record, "failed", JobError("replica_died", "The replica died: ask again."))
            return True
        if gone:
            failure = JobError("no_model", f"The model '{record.settings['model']}' is not served any more.")
            await self._finish_unstarted(record, "failed", failure)
            return True
        try:
            given = await self.patient(self.store.given_frames, record)
        except ValueError:
            await self._finish_unstarted(record, "failed", JobError("internal", "The given frames were lost."))
            return True
        if self.draining:
            await self.patient(self.store.release, record)
        else:
            self._begin(record, given)
        return True

    async def _take_over(self, open_jobs: dict[str, str], leases: dict[str, Lease]) -> None:
        """Jobs whose lease has shown no sign of life for a while, by this replica's own clock."""
        now = time.monotonic()
        if now - self._looked > self.config.lease_seconds / 2:
            self._seen = {}  # storage was away, and signs of life with it: count from here on
        self._looked = now
        foreign = {job_id: lease for job_id, lease in leases.items() if job_id not in self.jobs}
        for job_id, lease in foreign.items():
            if self._seen.get(job_id, (None, 0.0))[0] != lease:
                self._seen[job_id] = (lease, now)
        self._seen = {job_id: seen for job_id, seen in self._seen.items() if job_id in foreign}
        for job_id, (lease, since) in self._seen.items():
            if now - since > self.config.lease_seconds and job_id in open_jobs:
                await self._bury(open_jobs[job_id], job_id, lease)

    async def _bury(self, owner: str, job_id: str, lease: Lease) -> None:
        record = await self.patient(self.store.read, owner, job_id)
        if record is None:
            return
        if record.ended:  # died between the record and the rest
            await self.patient(self.store.close, record)
            return
        taken = await self.patient(self.store.take, record, lease.number + 1)
        if taken is None:
            return
        dead = replace(taken, deaths=taken.deaths + 1)
        logger.warning("The replica that worked on %s has died (lease %d).", job_id, lease.number)
        self.metrics.record("ardiff_errors", 1, kind="replica_died")
        if dead.kind == "stream" or dead.deaths >= self.config.max_attempts:
            again = "" if dead.kind == "stream" else f", for the {dead.deaths}. time"
            message = f"The replica that generated the video died{again}: ask again."
            await self._finish_unstarted(dead, "failed", JobError("replica_died", message))
        else:
            await self.patient(self.store.release, dead)
            self._look.set()

    async def _finish_unstarted(self, record: JobRecord, status: Status, failure: JobError | None) -> JobRecord:
        ended = self._ending(record, status, failure)
        await self.patient(self.store.finish, ended, None)
        self.metrics.record("ardiff_jobs_ended", 1, status=status)
        return ended

    def _ending(self, record: JobRecord, status: Status, failure: JobError | None) -> JobRecord:
        now = time.time()
        kind, message = (failure.kind, str(failure)) if failure and status == "failed" else (None, None)
        return replace(
            record,
            status=status,
            ended_at=now,
            expires_at=now + self.config.keep_seconds,
            error_type=kind,
            error=message,
        )

    def _ended(self, job: Job, failure: JobError | None, digest: str | None) -> None:
        """A job has left its runner; what follows goes on while others run."""
        self._background(self._conclude(job, failure, digest))

    def _background(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(action)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _withdraw(self, record: JobRecord) -> None:
        """Removes what a refused request has left in storage that was away, once it is back."""
        for _ in range(10):
            await asyncio.sleep(self.config.storage_seconds)
            with contextlib.suppress(RequestError):
                if (job := self.jobs.get(record.id)) is not None:
                    self._runner(job).stop(job, JobError("cancelled", "The request was refused."))
                    continue
                await self.patient(self.store.delete, record)
                return

    async def _conclude(self, job: Job, failure: JobError | None, digest: str | None) -> None:
        """Writes a job's end, again and again while storage is away: it has not ended before that is known."""
        record, video = replace(job.record, frames_sha256=digest), b""
        if failure is None:
            try:
                video = await asyncio.to_thread(as_file, b"".join(job.log.parts))
            except Exception as error:  # such as a full disk for temporary files
                logger.error("Job %s failed.", record.id, exc_info=error)
                failure = JobError("internal", "The video could not be made a file; the operator's log says why.")
        if failure is None:
            record = self._ending(replace(record, video_bytes=len(video)), "completed", None)
            job.log.end()
        else:
            job.log.end(failure)
            if failure.kind == "cancelled":
                record = self._ending(record, "cancelled", None)
            elif failure.kind == "released" and record.kind == "stream":
                record = self._ending(record, "failed", JobError("stopped", str(failure)))
            elif failure.kind not in ("released", "lost"):
                record = self._ending(record, "failed", failure)
                self.metrics.record("ardiff_errors", 1, kind=failure.kind)
        if failure is None or failure.kind != "lost":
            async with job.writing:
                await self._write_end(job, record, video or None)
        self.jobs.pop(record.id, None)
        self.metrics.record("ardiff_jobs_running", len(self.jobs))
        if record.ended:
            self.metrics.record("ardiff_jobs_ended", 1, status=record.status)
        if record.status == "completed":
            seconds = (record.ended_at or record.created_at) - record.created_at
            self.metrics.record("ardiff_job_seconds", seconds, model=record.settings["model"])
        self._look.set()
        if job.beat is not None:  # the last one may have written a lease that nobody holds any more
            await job.beat
            with contextlib.suppress(RequestError):
                await self.patient(self.store.drop_leases, record)

    async def _write_end(self, job: Job, record: JobRecord, video: bytes | None) -> None:
        give_up = time.monotonic() + self.config.keep_seconds
        while time.monotonic() < give_up:
            try:
                if not record.ended:
                    await self.patient(self.store.release, record)
                    return
                if job.told_parts < len(job.log.parts):
                    await self._write_segment(job)  # before the record, so that readers elsewhere get all of it
                await self.patient(self.store.finish, record, video)
                return
            except RequestError:
                await asyncio.sleep(min(2.0, self.config.heartbeat_seconds))

    async def _await_end(self, owner: str, job_id: str, patience: float = 10.0) -> JobRecord:
        deadline = time.monotonic() + max(patience, 2 * self.config.poll_seconds)
        while not (record := await self.find(owner, job_id)).ended and time.monotonic() < deadline:
            await asyncio.sleep(0.02 if job_id in self.jobs else 0.1)
        return record

    async def _beat(self) -> None:
        """Signs of life for all jobs at once, so that none is late because storage is slow."""
        jobs = list(self.jobs.values())
        for job in jobs:
            job.beat = asyncio.ensure_future(self._beat_for(job))
        await asyncio.gather(*(job.beat for job in jobs if job.beat))

    async def _beat_for(self, job: Job) -> None:
        with contextlib.suppress(RequestError):  # told by the poll
            await self._ask(self._beats, self.store.beat, job.record)

    async def _write_progress(self) -> None:
        """Tells other replicas how far the jobs here are, and gives them the new parts of the videos."""
        for job in list(self.jobs.values()):
            async with job.writing:
                if job.log.ended or job.record.status == "queued" or job.told == job.record:
                    continue
                with contextlib.suppress(RequestError):
                    if job.told_parts < len(job.log.parts):
                        await self._write_segment(job)
                    record = job.record
                    await self.patient(self.store.write, record)
                    job.told = record

    async def _write_segment(self, job: Job) -> None:
        parts = job.log.parts[job.told_parts :]
        await self.patient(self.store.write_segment, job.record, job.segments, b"".join(parts))
        job.told_parts += len(parts)
        job.segments += 1

    async def _sweep(self) -> None:
        await self.patient(self.store.sweep, self.config.keep_seconds)

    async def _read_keys(self) -> None:
        if self.config.keys:
            try:
                self.keys = await asyncio.to_thread(read_keys, self.config.keys, may_be_empty=True)
            except ArdiffError as error:
                logger.error("The file of keys is not read again: %s", error)

    async def _every(self, seconds: float, action: Callable[[], Any], event: asyncio.Event | None = None) -> None:
        """Runs ``action`` again and again, at once when the event is set; storage that is away does not end it."""
        while True:
            try:
                await action()
            except RequestError:
                await asyncio.sleep(seconds)
            if event is None:
                await asyncio.sleep(seconds)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), seconds)
            event.clear()


def not_available(record: JobRecord) -> RequestError:
    """Why there is no video, or not yet."""
    match record.status:
        case "expired":
            return RequestError(410, "expired", "The video has expired.")
        case "failed":
            return RequestError(409, record.error_type or "failed", record.error or "The video failed.")
        case "cancelled":
            return RequestError(409, "cancelled", "The video was cancelled.")
        case _:
            return RequestError(409, "not_ready", f"The video is {record.status}: ask again later.", retry_after=1)
