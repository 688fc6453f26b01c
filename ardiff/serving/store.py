"""Jobs in shared storage. Any replica can serve any job, and no job is lost when one crashes.

::

    service.json                marks the folder as the service's
    jobs/<owner>/<id>.json      the record; after its creation only the lease holder writes it
    inputs/<owner>/<id>.npy     given frames
    open/<id>.<owner>           exists until the job has ended; a job without a lease is queued
    open/<id>.<owner>.crashed   exists besides, once a replica has crashed with the job
    leases/<id>.<n>             which replica runs the job, rewritten as a heartbeat; created only if it does not exist,
                                so one of several replicas gets it; of two leases the higher n counts
    cancels/<id>                requests that the lease holder stops
    segments/<id>.<n>/<k>       the video of lease n so far, in segments; they outlive the job for a minute
    videos/<owner>/<id>.<type>  the result
    clock                       written to learn the time by the store's clock
    idempotency/<owner>/<hash>  the job that was requested with an idempotency key, and a hash of its request

Identifiers begin with the time of creation, so they sort like the queue. Identifiers and owner names are checked before
they become part of a path. No other text of a client ever does.
"""

import io
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.serving.exclusive import changed_at, create_bytes
from ardiff.serving.records import JobRecord, is_id

logger = logging.getLogger(__name__)
_MARKER = "service.json"
_LEFTOVER_SECONDS = 60.0
"""Age at which segments, leases and cancellations of ended jobs are removed."""
_CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Lease:
    """A replica's claim on a job: its number, and when the last heartbeat was written (ns, the store's clock)."""

    number: int
    heartbeat: int


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job that has not ended: the name of its owner, and whether a replica has crashed with it."""

    owner: str
    crashed: bool


class JobStore:
    """Reads and writes the files that the module docstring lists. Methods raise DataError if storage is unavailable."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)

    def mark(self) -> None:
        """Marks the folder. An unmarked one is an error: an unmounted disk, for example, leaves an empty folder."""
        create_bytes(self._path(_MARKER), b"{}")

    def _check_mark(self) -> None:
        if not storage.exists(self._path(_MARKER)):
            raise DataError(f"{self.root} is not the folder that the service started with: {_MARKER} is missing.")

    def reserve(self, owner: str, key_hash: str, job_id: str, request_hash: str) -> tuple[str, str]:
        """Takes an idempotency key for a job. Returns job and hash of the first request with this key."""
        path = self._path("idempotency", owner, key_hash)
        if create_bytes(path, json.dumps([job_id, request_hash]).encode()):
            return job_id, request_hash
        first_id, first_hash = json.loads(storage.read_bytes(path))
        return first_id, first_hash

    def unreserve(self, owner: str, key_hash: str) -> None:
        """Frees an idempotency key."""
        storage.delete_file(self._path("idempotency", owner, key_hash))

    def create(self, record: JobRecord, given: np.ndarray | None) -> None:
        """Queues a job with its given frames, uint8 ``(k, H, W, 3)``, if any.

        With ``record.lease`` 1 the caller holds its lease from the start, so no other replica takes it.
        """
        if given is not None:
            buffer = io.BytesIO()
            np.save(buffer, given, allow_pickle=False)
            storage.write_bytes(self._input(record), buffer.getvalue())
        if record.lease:
            self.heartbeat(record)
        storage.write_bytes(self._path("open", f"{record.id}.{record.owner}"), b"")
        self.write(record)

    def write(self, record: JobRecord) -> None:
        """Writes the record."""
        storage.write_bytes(self._record(record.owner, record.id), json.dumps(asdict(record)).encode())

    def read(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None if this owner has no such job."""
        if not is_id(job_id):
            return None
        path = self._record(owner, job_id)
        if not storage.exists(path):
            self._check_mark()
            return None
        try:
            return JobRecord(**json.loads(storage.read_bytes(path)))
        except (ValueError, TypeError) as error:
            logger.error("%s is not a job record: %s", path, error)
            return None

    def page(self, owner: str, count: int, after: str | None = None, newest_first: bool = True) -> list[JobRecord]:
        """The owner's first records in order of creation; with ``after``, those that follow this job."""
        names = (name.removesuffix(".json") for name in changed_at(self._path("jobs", owner)))
        ids = sorted(filter(is_id, names), reverse=newest_first)
        if not ids:
            self._check_mark()
        if after is not None:
            ids = [job_id for job_id in ids if (job_id < after if newest_first else job_id > after)]
        records = (self.read(owner, job_id) for job_id in ids[:count])
        return [record for record in records if record is not None]

    def given_frames(self, record: JobRecord) -> np.ndarray | None:
        """The given frames, uint8 ``(k, H, W, 3)``, or None."""
        path = self._input(record)
        return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) if storage.exists(path) else None

    def open_jobs(self) -> dict[str, OpenJob]:
        """Every job that has not ended by its identifier, oldest first."""
        names = sorted(changed_at(self._path("open")))
        if not names:
            self._check_mark()
        parts = [name.split(".") for name in names]
        crashed = {job_id for job_id, _, *marks in parts if marks}
        return {job_id: OpenJob(owner, job_id in crashed) for job_id, owner, *_ in parts}

    def leases(self) -> dict[str, Lease]:
        """The newest lease of every job that a replica runs."""
        newest: dict[str, Lease] = {}
        for name, heartbeat in changed_at(self._path("leases")).items():
            job_id, _, number = name.partition(".")
            if job_id not in newest or int(number) > newest[job_id].number:
                newest[job_id] = Lease(int(number), heartbeat)
        return newest

    def claim(self, owner: str, job_id: str) -> JobRecord | None:
        """Takes a queued job. Returns its record under a new lease, or None if it is taken or has ended."""
        record = self.read(owner, job_id)
        if record is None:
            return None
        # The record names the last lease. Reading it before the lease file notices a lease that began in between.
        if record.lease and storage.exists(self._lease(job_id, record.lease)):
            return None
        return self.take(record, record.lease + 1, status="in_progress", started_at=time.time())

    def take(self, record: JobRecord, number: int, **changes: Any) -> JobRecord | None:
        """Takes lease ``number`` of a job. Returns the changed record under it, or None if another replica has it."""
        if not create_bytes(self._lease(record.id, number), b""):
            return None
        # Another replica may have run and ended the job since the record was read.
        latest = self.read(record.owner, record.id)
        if latest is None or latest.ended or latest.lease >= number:
            if latest is not None and latest.ended:
                self.close(latest)
            storage.delete_file(self._lease(record.id, number))
            return None
        claimed = replace(latest, lease=number, **changes)
        self.write(claimed)
        return claimed

    def heartbeat(self, record: JobRecord) -> None:
        """Renews the lease; called by its holder."""
        storage.write_bytes(self._lease(record.id, record.lease), b"")

    def release(self, record: JobRecord) -> None:
        """Returns the job to the queue; called by the lease holder."""
        self.write(replace(record, status="queued", frames_done=0, iterations_done=0, started_at=None))
        self.drop_leases(record)

    def mark_crashed(self, record: JobRecord) -> None:
        """Marks a job with which a replica has crashed."""
        storage.write_bytes(self._path("open", f"{record.id}.{record.owner}.{_CRASHED}"), b"")

    def forget(self, owner: str, job_id: str) -> None:
        """Removes a job without a record from the queue. Its marker is written before its record."""
        storage.delete_file(self._path("open", f"{job_id}.{owner}.{_CRASHED}"))
        storage.delete_file(self._path("open", f"{job_id}.{owner}"))

    def request_cancel(self, record: JobRecord) -> None:
        """Requests that the lease holder stops the job."""
        storage.write_bytes(self._path("cancels", record.id), b"")

    def cancels(self) -> set[str]:
        """Jobs that are to be cancelled."""
        return set(changed_at(self._path("cancels")))

    def finish(self, record: JobRecord, video: bytes | None) -> None:
        """Writes the video, then the record of the ended job, then removes the job from the queue."""
        if video is not None:
            storage.write_bytes(self._video(record), video)
        self.write(record)
        self.close(record)

    def close(self, record: JobRecord) -> None:
        """Removes the files that an ended job does not need: leases, given frames, cancellation, marker."""
        self.drop_leases(record)
        storage.delete_file(self._input(record))
        storage.delete_file(self._path("cancels", record.id))
        self.forget(record.owner, record.id)

    def write_segment(self, record: JobRecord, index: int, data: bytes) -> None:
        """Writes the next segment of a running job's video."""
        storage.write_bytes(self._segment(record, index), data)

    def read_segment(self, record: JobRecord, index: int) -> bytes | None:
        """A segment of a running job's video, or None if it is not written yet."""
        path = self._segment(record, index)
        return storage.read_bytes(path) if storage.exists(path) else None

    def video(self, record: JobRecord) -> storage.RangeReader | None:
        """The finished video, of which ranges are read, or None if its file is missing."""
        file = storage.find_file(self._video(record))
        if file.problem:
            self._check_mark()
            return None
        return storage.RangeReader(file.uri, file.size)

    def delete(self, record: JobRecord) -> None:
        """Removes an ended job: the video first, so that no video is left without a record."""
        storage.delete_file(self._video(record))
        self.close(record)
        if record.idempotency is not None:
            self.unreserve(record.owner, record.idempotency)
        storage.delete_file(self._record(record.owner, record.id))

    def remove_expired(self, keep_seconds: float) -> None:
        """Removes videos that were written ``keep_seconds`` ago, their records after twice this time, and leftovers.

        All times are the store's: clocks of replicas may differ. A job's record and video are written last when it
        ends.
        """
        now = self._now()
        self._remove_leftovers(now)
        for owner, name in self._written_before("videos", now - keep_seconds):
            storage.delete_file(self._path("videos", owner, name))
        for owner, name in self._written_before("jobs", now - 2 * keep_seconds):
            record = self.read(owner, name.removesuffix(".json"))
            if record is not None and record.ended:
                self.delete(record)
        for owner, name in self._written_before("idempotency", now - 2 * keep_seconds):  # of requests without a job
            storage.delete_file(self._path("idempotency", owner, name))

    def _now(self) -> float:
        """Seconds since 1970 by the store's clock."""
        storage.write_bytes(self._path("clock", "now"), b"")
        return changed_at(self._path("clock"))["now"] / 1e9

    def _remove_leftovers(self, now: float) -> None:
        """Removes segments, leases and cancellations of jobs that have ended."""
        open_jobs = self.open_jobs()
        oldest = (now - _LEFTOVER_SECONDS) * 1e9
        written: dict[str, int] = {}
        for name, changed in changed_at(self._path("segments")).items():
            folder = name.partition("/")[0]
            written[folder] = max(written.get(folder, 0), changed)
        for folder, changed in written.items():
            if folder.partition(".")[0] not in open_jobs and changed < oldest:
                storage.delete_folder(self._path("segments", folder))
        for kind in ("leases", "cancels"):
            for name, changed in changed_at(self._path(kind)).items():
                if name.partition(".")[0] not in open_jobs and changed < oldest:
                    storage.delete_file(self._path(kind, name))

    def _written_before(self, folder: str, when: float) -> list[tuple[str, str]]:
        """Owner and name of each file in a folder that was last written at most ``when``, by the store's clock."""
        names = (name for name, changed in changed_at(self._path(folder)).items() if changed <= when * 1e9)
        return [(owner, file) for owner, _, file in (name.partition("/") for name in names)]

    def drop_leases(self, record: JobRecord) -> None:
        """Removes the record's lease and older ones, oldest first: while any is left, no replica takes the job."""
        for name in sorted(changed_at(self._path("leases"))):
            job_id, _, number = name.partition(".")
            if job_id == record.id and int(number) <= record.lease:
                storage.delete_file(self._path("leases", name))

    def _path(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def _record(self, owner: str, job_id: str) -> str:
        return self._path("jobs", owner, f"{job_id}.json")

    def _input(self, record: JobRecord) -> str:
        return self._path("inputs", record.owner, f"{record.id}.npy")

    def _video(self, record: JobRecord) -> str:
        return self._path("videos", record.owner, f"{record.id}.{record.suffix}")

    def _lease(self, job_id: str, number: int) -> str:
        return self._path("leases", f"{job_id}.{number}")

    def _segment(self, record: JobRecord, index: int) -> str:
        return self._path("segments", f"{record.id}.{record.lease}", f"{index:06d}")
