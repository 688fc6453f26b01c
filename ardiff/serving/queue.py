"""Takes jobs from the shared queue for this replica, and takes over the jobs of crashed replicas."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ardiff.serving.async_store import Stores
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.metrics import Recorder
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.records import JobRecord
from ardiff.serving.store import Lease, OpenJobs, Segment

logger = logging.getLogger(__name__)


class JobQueue:
    """The shared queue as this replica sees it. ``poll`` is called every ``poll_seconds``, and after ``notify``."""

    def __init__(
        self,
        stores: Stores,
        running: RunningJobs,
        models: Mapping[str, ModelRunner],
        finisher: JobFinisher,
        config: ServiceConfig,
        metrics: Recorder,
        stopping: Callable[[], bool],
    ) -> None:
        """``stopping`` returns whether the replica shuts down: then it takes no more jobs."""
        self._jobs, self._files, self._running, self._models = stores.jobs, stores.files, running, models
        self._finisher, self._config, self._metrics, self._stopping = finisher, config, metrics, stopping
        self.waiting = 0
        """Queued jobs of all replicas at the last poll, and those accepted here since."""
        self._prepared = False
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
            # Python 3.11's wait_for ignores a cancellation at the moment of the change.
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def prepare(self) -> None:
        """Prepares database and storage for this release. Raises UnavailableError if it is to be called again."""
        if not self._prepared:
            await self._jobs.call_timed(self._jobs.store.database.prepare)
            await self._files.call_timed(self._files.store.mark)
            self._prepared = True

    async def poll(self) -> None:
        """Follows requests for running jobs, takes over jobs of crashed replicas, and starts as many jobs as fit."""
        await self.prepare()
        await self._check_running()
        groups = await self._jobs.call(self._jobs.store.open_jobs)
        queued = [group for group in groups if group.status == "queued"]
        self.waiting = sum(group.count for group in queued)
        self._metrics.record("ardiff_jobs_waiting", self.waiting)
        if self._stopping():
            return
        await self._take_over()
        oldest = {group.oldest for group in queued}
        self._first_seen = {job_id: since for job_id, since in self._first_seen.items() if job_id in oldest}
        isolating = len(queued) < len(groups)
        for group in queued:
            if self._stopping():
                break
            if not (group.suspect and isolating):
                await asyncio.gather(*map(self._start, await self._claim(group)))

    async def _check_running(self) -> None:
        """Stops cancelled and lost jobs, and passes requested changes on to the others."""
        if not (running := list(self._running)):
            return
        states = await self._jobs.call(self._jobs.store.held_states, [job.record.id for job in running])
        for job in running:
            state = states.get(job.record.id)
            if state is None or state.lease != job.record.lease:
                job.stop(JobError("lost", "Another replica took the job over."))
            elif state.cancelled:
                job.stop(JobError("cancelled", "Cancelled."))
            elif state.num_changes > len(job.record.change_frames):
                record = await self._jobs.call(self._jobs.store.read, job.record.owner, job.record.id)
                job.take_changes([] if record is None else record.changes)

    async def _claim(self, group: OpenJobs) -> list[JobRecord]:
        """Takes jobs of a group, or leaves them to other replicas."""
        store, runner = self._jobs.store, self._models.get(group.model)
        if runner is None:  # during a redeployment only some replicas may have a model
            if self._waited(group.oldest) <= self._config.job_seconds:
                return []
            if group.suspect:
                return await self._jobs.call(store.claim_job, group.oldest)
            return await self._jobs.call(store.claim, group.model, group.count)
        if not runner.free_slots:
            return []
        if not group.suspect:
            return await self._jobs.call(store.claim, group.model, runner.free_slots)
        # A job with which a replica crashed may crash the next one too. One replica at a time runs one of them, alone:
        # an idle one takes it at once; a busy one, which then takes no others, later.
        if runner.busy and self._waited(group.oldest) < self._config.lease_seconds:
            return []
        return await self._jobs.call(store.claim_suspect, group.oldest)

    async def _start(self, record: JobRecord) -> None:
        """Starts a job whose lease this replica holds now, or ends it if that is not possible."""
        runner = self._models.get(record.model)
        if runner is None:
            failure = JobError("no_model", f"The model '{record.model}' is not served any more.")
            await self._finisher.finish_claimed(record, failure)
            return
        given_frames, published = None, list[Segment]()
        try:
            if record.begun:
                published = await self._jobs.call(self._jobs.store.continue_stream, record)
            if record.sampling.given_frames:
                given_frames = await self._files.call(self._files.store.read_input, record)
        except (ValueError, EOFError):
            await self._finisher.finish_claimed(record, JobError("internal", "The given frames cannot be read."))
            return
        except RequestError:
            await self._jobs.call(self._jobs.store.release, record)
            raise
        if self._stopping():
            await self._jobs.call(self._jobs.store.release, record)
        else:
            self._running.add(runner.start(record, given_frames, published))

    def _waited(self, job_id: str) -> float:
        """Seconds since this replica first left the job in the queue."""
        now = time.monotonic()
        return now - self._first_seen.setdefault(job_id, now)

    async def _take_over(self) -> None:
        """Takes jobs whose lease has had no heartbeat for ``lease_seconds`` by this replica's clock."""
        now, patience = time.monotonic(), self._config.lease_seconds
        if now - self._last_check < patience / 8:
            return
        leases = await self._jobs.call(self._jobs.store.leases)
        if now - self._last_check > patience / 2:
            self.leases_seen = {}  # the database was unavailable, also for heartbeats: count from now
        self._last_check = now
        seen, self.leases_seen = self.leases_seen, {}
        for job_id, lease in leases.items():
            if job_id in self._running:
                continue
            known, since = seen.get(job_id, (None, now))
            self.leases_seen[job_id] = (lease, since if known == lease else now)
            if known == lease and now - since > patience:
                for record in await self._jobs.call(self._jobs.store.take_over, job_id, lease):
                    await self._requeue_or_fail(record)

    async def _requeue_or_fail(self, taken: JobRecord) -> None:
        """Requeues the job of a crashed replica. Ends it after ``max_attempts`` crashes, or if it is a stream of which
        nothing is published."""
        record = replace(taken, crashes=taken.crashes + 1)
        logger.warning("The replica that ran %s has crashed (lease %d).", record.id, record.lease - 1)
        self._metrics.record("ardiff_errors", 1, kind="replica_crashed")
        if record.kind == "stream" and not record.stream_bytes:
            await self._finisher.finish_claimed(record, _crashed("."))
        elif record.crashes >= self._config.max_attempts:
            await self._finisher.finish_claimed(record, _crashed(f" {record.crashes} times."))
        else:
            await self._jobs.call(self._jobs.store.release, replace(record, kind="job"))
            self.notify()


def _crashed(ending: str) -> JobError:
    return JobError("replica_crashed", f"The replica that generated the video crashed{ending} Request it again.")
