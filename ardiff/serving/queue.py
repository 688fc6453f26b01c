"""Takes jobs from the shared queue for this replica, and takes over the jobs of crashed replicas."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ardiff.serving.async_store import AsyncStore
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.metrics import Recorder
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.store import Lease, OpenJob

logger = logging.getLogger(__name__)
ORPHAN_SECONDS = 60.0
"""Seconds after which a job without a record is removed: its marker is written before its record."""


class JobQueue:
    """The shared queue as this replica sees it. ``poll`` is called every ``poll_seconds``, and after ``notify``."""

    def __init__(
        self,
        storage: AsyncStore,
        running: RunningJobs,
        models: Mapping[str, ModelRunner],
        finisher: JobFinisher,
        config: ServiceConfig,
        metrics: Recorder,
        stopping: Callable[[], bool],
    ) -> None:
        """``stopping`` returns whether the replica shuts down: then it takes no more jobs."""
        self._storage, self._running, self._models, self._finisher = storage, running, models, finisher
        self._config, self._metrics, self._stopping = config, metrics, stopping
        self.waiting = 0
        """Queued jobs of all replicas at the last poll, and those accepted here since."""
        self._marked = False
        self._changed = asyncio.Event()
        self.leases_seen: dict[str, tuple[Lease, float]] = {}
        """Each lease of another replica, and when this replica first saw it (monotonic clock)."""
        self._last_check = -math.inf
        self._first_seen: dict[str, float] = {}
        """Queued jobs that this replica left in the queue, and when it did so first (monotonic clock)."""

    @property
    def free_slots(self) -> int:
        """Jobs that could start on this replica now."""
        return sum(runner.free_slots for runner in self._models.values())

    def notify(self) -> None:
        """Requests a poll now."""
        self._changed.set()

    async def changed(self, seconds: float) -> None:
        """Returns after ``notify``, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        self._changed.clear()

    async def mark_storage(self) -> None:
        """Marks the storage folder as the service's. Raises RequestError 503 if storage is unavailable."""
        if not self._marked:
            await self._storage.call_timed(self._storage.store.mark)
            self._marked = True

    async def poll(self) -> None:
        """Stops cancelled and lost jobs, takes over jobs of crashed replicas, and starts as many jobs as fit."""
        await self.mark_storage()
        store = self._storage.store
        open_jobs = await self._storage.call(store.open_jobs)
        leases = await self._storage.call(store.leases)
        await self._stop_cancelled(leases)
        queued = [job_id for job_id in open_jobs if job_id not in leases and job_id not in self._running]
        self.waiting = len(queued)
        self._metrics.record("ardiff_jobs_waiting", self.waiting)
        if self._stopping():
            return
        await self._take_over(open_jobs, leases)
        self._first_seen = {job_id: since for job_id, since in self._first_seen.items() if job_id in queued}
        # A job with which a replica crashed may crash the next one too. One replica at a time runs one of them, alone.
        isolating = any(job.crashed and job_id in leases for job_id, job in open_jobs.items())
        for job_id in queued:
            if self._stopping() or not self.free_slots:
                break
            crashed = open_jobs[job_id].crashed
            if not (crashed and isolating):
                served = await self._take(open_jobs[job_id].owner, job_id)
                isolating = isolating or (crashed and served)

    async def _stop_cancelled(self, leases: dict[str, Lease]) -> None:
        if not self._running:
            return
        cancelled = await self._storage.call(self._storage.store.cancels)
        for job in self._running:
            lease = leases.get(job.record.id)
            if job.record.id in cancelled:
                job.stop(JobError("cancelled", "Cancelled."))
            elif lease is not None and lease.number > job.record.lease:
                job.stop(JobError("lost", "Another replica took the job over."))

    async def _take(self, owner: str, job_id: str) -> bool:
        """Starts a queued job, or leaves it to another replica. Returns False if this one cannot run it at all."""
        store = self._storage.store
        queued = await self._storage.call(store.read, owner, job_id)
        if queued is None:
            if self._waited(job_id) > ORPHAN_SECONDS:
                await self._storage.call(store.forget, owner, job_id)
            return False
        runner = self._models.get(queued.model)
        # During a redeployment only some replicas may have a model.
        unknown_model = runner is None and self._waited(job_id) > self._config.job_seconds
        if not unknown_model and (runner is None or not runner.free_slots):
            return runner is not None
        # An idle replica takes a job that must run alone at once; a busy one, which then takes no others, later.
        if queued.crashes and runner is not None and runner.busy and self._waited(job_id) < self._config.lease_seconds:
            return True
        record = await self._storage.call(store.claim, owner, job_id)
        if record is None:
            return True
        if record.kind == "stream":
            await self._finisher.finish_queued(record, "failed", _crashed("."))
            return True
        if unknown_model:
            failure = JobError("no_model", f"The model '{record.model}' is not served any more.")
            await self._finisher.finish_queued(record, "failed", failure)
            return True
        try:
            given_frames = await self._storage.call(self._storage.store.given_frames, record)
        except ValueError:
            failure = JobError("internal", "The given frames cannot be read.")
            await self._finisher.finish_queued(record, "failed", failure)
            return True
        if self._stopping():
            await self._storage.call(self._storage.store.release, record)
        else:
            self._running.add(self._models[record.model].start(record, given_frames))
        return True

    def _waited(self, job_id: str) -> float:
        """Seconds since this replica first left the job in the queue."""
        now = time.monotonic()
        return now - self._first_seen.setdefault(job_id, now)

    async def _take_over(self, open_jobs: dict[str, OpenJob], leases: dict[str, Lease]) -> None:
        """Takes jobs whose lease has had no heartbeat for ``lease_seconds`` by this replica's clock."""
        now = time.monotonic()
        if now - self._last_check > self._config.lease_seconds / 2:
            self.leases_seen = {}  # storage was unavailable, also for heartbeats: count from now
        self._last_check = now
        others = {job_id: lease for job_id, lease in leases.items() if job_id not in self._running}
        for job_id, lease in others.items():
            if self.leases_seen.get(job_id, (None, 0.0))[0] != lease:
                self.leases_seen[job_id] = (lease, now)
        self.leases_seen = {job_id: seen for job_id, seen in self.leases_seen.items() if job_id in others}
        for job_id, (lease, since) in self.leases_seen.items():
            if now - since > self._config.lease_seconds and job_id in open_jobs:
                await self._requeue_or_fail(open_jobs[job_id].owner, job_id, lease)

    async def _requeue_or_fail(self, owner: str, job_id: str, lease: Lease) -> None:
        """Requeues the job of a crashed replica. Ends it if it is a stream, or after ``max_attempts`` crashes."""
        store = self._storage.store
        record = await self._storage.call(store.read, owner, job_id)
        if record is None:
            return
        if record.ended:  # it crashed after it wrote the final record
            await self._storage.call(store.close, record)
            return
        taken = await self._storage.call(store.take, record, lease.number + 1)
        if taken is None:
            return
        record = replace(taken, crashes=taken.crashes + 1)
        logger.warning("The replica that ran %s has crashed (lease %d).", job_id, lease.number)
        self._metrics.record("ardiff_errors", 1, kind="replica_crashed")
        if record.kind == "stream":
            await self._finisher.finish_queued(record, "failed", _crashed("."))
        elif record.crashes >= self._config.max_attempts:
            await self._finisher.finish_queued(record, "failed", _crashed(f" {record.crashes} times."))
        else:
            await self._storage.call(store.mark_crashed, record)
            await self._storage.call(store.release, record)
            self.notify()


def _crashed(ending: str) -> JobError:
    return JobError("replica_crashed", f"The replica that generated the video crashed{ending} Request it again.")
