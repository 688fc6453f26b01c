"""Jobs in shared storage. Any replica can serve any job, and no job is lost when one crashes.

::

    service.json                marks the folder as the service's
    jobs/<owner>/<id>.json      the record; after its creation only the lease holder writes it
    inputs/<owner>/<id>.npy     given frames
    open/<id>.<owner>           exists until the job has ended; a job without a lease is queued
    leases/<id>.<n>             which replica runs the job, rewritten as a heartbeat; created only if it does not exist,
                                so one of several replicas gets it; of two leases the higher n counts
    cancels/<id>                requests that the lease holder stops
    segments/<id>.<n>/<k>       the video of lease n so far, in segments; they outlive the job for a minute
    videos/<owner>/<id>.<type>  the result

Identifiers begin with the time of creation, so they sort like the queue. Identifiers and owner names are checked before
they become part of a path. No other text of a client ever does.
"""

import io
import json
import logging
import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.serving.exclusive import changed_at, create_bytes
from ardiff.serving.records import JobRecord, created_ms, is_id

logger = logging.getLogger(__name__)
_MARKER = "service.json"
_ORPHAN_SECONDS = 60.0
"""A job's marker in ``open`` is written before its record. A marker of this age without a record is an orphan."""
_LEFTOVER_SECONDS = 60.0
"""Age at which segments and leases of ended jobs are removed."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A replica's claim on a job: its number, and when the last heartbeat was written (ns, the store's clock)."""

    number: int
    heartbeat: int


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

    def newest(self, owner: str, count: int, before: str | None = None) -> list[JobRecord]:
        """The owner's last records, newest first; with ``before``, those created before that job."""
        names = (name.removesuffix(".json") for name in changed_at(self._path("jobs", owner)))
        ids = sorted((n for n in names if is_id(n) and (before is None or n < before)), reverse=True)
        if not ids:
            self._check_mark()
        records = (self.read(owner, job_id) for job_id in ids[:count])
        return [record for record in records if record is not None]

    def given_frames(self, record: JobRecord) -> np.ndarray | None:
        """The given frames, uint8 ``(k, H, W, 3)``, or None."""
        path = self._input(record)
        return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) if storage.exists(path) else None

    def open_jobs(self) -> dict[str, str]:
        """Identifier and owner of every job that has not ended, oldest first."""
        names = sorted(changed_at(self._path("open")))
        if not names:
            self._check_mark()
        return {job_id: owner for job_id, _, owner in (name.partition(".") for name in names)}

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
            if time.time() - created_ms(job_id) / 1000 > _ORPHAN_SECONDS:
                storage.delete_file(self._path("open", f"{job_id}.{owner}"))
            return None
        # The record names the last lease. Reading it before the lease file notices a lease that began in between.
        if record.lease and storage.exists(self._lease(job_id, record.lease)):
            return None
        return self.take(record, record.lease + 1)

    def take(self, record: JobRecord, number: int) -> JobRecord | None:
        """Takes lease ``number`` of a job. Returns the record under it, or None if another replica has it."""
        if not create_bytes(self._lease(record.id, number), b""):
            return None
        # Another replica may have run and ended the job since the record was read.
        latest = self.read(record.owner, record.id)
        if latest is None or latest.ended or latest.lease >= number:
            if latest is not None and latest.ended:
                self.close(latest)
            storage.delete_file(self._lease(record.id, number))
            return None
        claimed = replace(latest, lease=number)
        self.write(claimed)
        return claimed

    def heartbeat(self, record: JobRecord) -> None:
        """Renews the lease; called by its holder."""
        storage.write_bytes(self._lease(record.id, record.lease), b"")

    def release(self, record: JobRecord) -> None:
        """Returns the job to the queue; called by the lease holder."""
        self.write(replace(record, status="queued", frames_done=0, iterations_done=0, started_at=None))
        self.drop_leases(record)

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
        storage.delete_file(self._path("open", f"{record.id}.{record.owner}"))

    def write_segment(self, record: JobRecord, index: int, data: bytes) -> None:
        """Writes the next segment of a running job's video."""
        storage.write_bytes(self._segment(record, index), data)

    def read_segment(self, record: JobRecord, index: int) -> bytes | None:
        """A segment of a running job's video, or None if it is not written yet."""
        path = self._segment(record, index)
        return storage.read_bytes(path) if storage.exists(path) else None

    def video(self, record: JobRecord) -> bytes:
        """The finished video. Raises DataError if it does not exist."""
        return storage.read_bytes(self._video(record))

    def delete(self, record: JobRecord) -> None:
        """Removes an ended job: the video first, so that no video is left without a record."""
        storage.delete_file(self._video(record))
        self.close(record)
        storage.delete_file(self._record(record.owner, record.id))

    def remove_expired(self, keep_seconds: float) -> None:
        """Removes videos of expired jobs, their records ``keep_seconds`` later, and leftovers of crashed replicas.

        Only files that were written at least ``keep_seconds`` ago are read: a job's record and video are written last
        when it ends.
        """
        self._remove_leftovers()
        for owner, job_id in self._untouched("videos", keep_seconds):
            record = self.read(owner, job_id)
            if record is not None and record.now().status == "expired":
                storage.delete_file(self._video(record))
        for owner, job_id in self._untouched("jobs", 2 * keep_seconds):
            record = self.read(owner, job_id)
            if record is not None and record.expires_at and record.expires_at + keep_seconds <= time.time():
                self.delete(record)

    def _remove_leftovers(self) -> None:
        """Removes segments and leases of jobs that have ended."""
        open_jobs = self.open_jobs()
        oldest = (time.time() - _LEFTOVER_SECONDS) * 1e9
        written: dict[str, int] = {}
        for name, changed in changed_at(self._path("segments")).items():
            folder = name.partition("/")[0]
            written[folder] = max(written.get(folder, 0), changed)
        for folder, changed in written.items():
            if folder.partition(".")[0] not in open_jobs and changed < oldest:
                storage.delete_folder(self._path("segments", folder))
        for name, changed in changed_at(self._path("leases")).items():
            if name.partition(".")[0] not in open_jobs and changed < oldest:
                storage.delete_file(self._path("leases", name))

    def _untouched(self, folder: str, seconds: float) -> list[tuple[str, str]]:
        """Owner and job identifier of each file in a folder that was last written at least ``seconds`` ago."""
        latest = (time.time() - seconds) * 1e9
        names = [name.partition("/") for name, changed in changed_at(self._path(folder)).items() if changed <= latest]
        return [(owner, file.partition(".")[0]) for owner, _, file in names]

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
