"""Job records in shared storage, so that any replica answers for any job and none is lost with a replica.

::

    service.json                says that this is the folder
    jobs/<owner>/<id>.json      the record; after its creation only the job's lease holder writes it
    inputs/<owner>/<id>.npy     given frames
    open/<id>.<owner>           exists until the job has ended; waiting jobs are those without a lease
    leases/<id>.<n>             who works on the job, rewritten as a sign of life; made only where none is, so one of
                                several replicas gets it; of two the higher n counts
    cancels/<id>                asks the lease holder to stop
    segments/<id>.<n>/<k>       the video of lease n so far, in parts; kept a while for those who still read it
    videos/<owner>/<id>.<type>  the result

Identifiers begin with the time of creation, so their order is that of the queue. They and the owners' names are checked
before they become part of a place: no text of a client ever is.
"""

import io
import json
import logging
import re
import secrets
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.serving.exclusive import changed_at, create_bytes

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled", "expired")
logger = logging.getLogger(__name__)
_ID = re.compile(r"video_[0-9a-f]{32}")
# A job's marker is written before its record; without a record for so long, it belongs to a request that failed.
_ORPHAN_SECONDS = 60.0
_LEFT_SECONDS = 60.0
_MARK = "service.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """What is known of a job."""

    id: str
    owner: str
    """Name of the API key."""
    kind: Literal["job", "stream"]
    """A ``stream`` ends with the connection that asked for it and is not repeated by another replica."""
    settings: dict[str, Any]
    """The request, checked and complete."""
    num_frames: int
    iterations: int
    """Iterations of the AD schedule."""
    created_at: float
    """Seconds since 1970, as all times here."""
    status: Status = "queued"
    frames_done: int = 0
    iterations_done: int = 0
    lease: int = 0
    """Number of the last lease under which the job was worked on."""
    deaths: int = 0
    """Replicas that died with the job."""
    started_at: float | None = None
    first_frame_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    error_type: str | None = None
    error: str | None = None
    media_type: str | None = None
    video_bytes: int | None = None
    frames_sha256: str | None = None
    """Hash of the frames before encoding: equal for equal videos."""

    @property
    def ended(self) -> bool:
        """Whether the job has come to its end, whichever."""
        return self.status in ENDED

    def now(self) -> "JobRecord":
        """The record as it is to be told: a job past its date is expired, with its video."""
        if self.expires_at is not None and time.time() >= self.expires_at:
            return replace(self, status="expired")
        return self


@dataclass(frozen=True, slots=True)
class Lease:
    """Who works on a job: the number of the lease, and when its holder gave the last sign of life (store's clock)."""

    number: int
    beat: int


def new_id() -> str:
    """An identifier that sorts by time and cannot be guessed."""
    return f"video_{int(time.time() * 1000):012x}{secrets.token_hex(10)}"


def created_ms(job_id: str) -> int:
    """When the job was created, in ms since 1970."""
    return int(job_id[6:18], 16)


def is_id(text: str) -> bool:
    """Whether the text has the form of an identifier."""
    return _ID.fullmatch(text) is not None


class JobStore:
    """Reads and writes what the module's text lists. Every method may raise DataError when storage is away."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)

    def mark(self) -> None:
        """Marks the folder, so that an empty one in its place, such as a disk that is not mounted, is told from it."""
        create_bytes(self._place(_MARK), b"{}")

    def _check_mark(self) -> None:
        if not storage.exists(self._place(_MARK)):
            raise DataError(f"{self.root} is not the folder that the service began with: {_MARK} is missing.")

    def create(self, record: JobRecord, given: np.ndarray | None) -> None:
        """Puts a job into the queue, with its given frames uint8 ``(k, H, W, 3)``, if any.

        With ``record.lease`` 1 it is the caller's from the beginning, and nobody else ever sees it wait.
        """
        if given is not None:
            buffer = io.BytesIO()
            np.save(buffer, given, allow_pickle=False)
            storage.write_bytes(self._input(record), buffer.getvalue())
        if record.lease:
            self.beat(record)
        storage.write_bytes(self._place("open", f"{record.id}.{record.owner}"), b"")
        self.write(record)

    def write(self, record: JobRecord) -> None:
        """Writes the record."""
        storage.write_bytes(self._record(record.owner, record.id), json.dumps(asdict(record)).encode())

    def read(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None if this owner has no such job."""
        if not is_id(job_id):
            return None
        place = self._record(owner, job_id)
        if not storage.exists(place):
            self._check_mark()
            return None
        try:
            return JobRecord(**json.loads(storage.read_bytes(place)))
        except (ValueError, TypeError) as error:
            logger.error("%s is not a record of a job: %s", place, error)
            return None

    def newest(self, owner: str, count: int, before: str | None = None) -> list[JobRecord]:
        """The owner's last records, newest first, those created before job ``before`` if it is given."""
        names = (name.removesuffix(".json") for name in changed_at(self._place("jobs", owner)))
        ids = sorted((n for n in names if is_id(n) and (before is None or n < before)), reverse=True)
        if not ids:
            self._check_mark()
        found = (self.read(owner, job_id) for job_id in ids[:count])
        return [record for record in found if record is not None]

    def given_frames(self, record: JobRecord) -> np.ndarray | None:
        """The given frames, uint8 ``(k, H, W, 3)``, or None."""
        place = self._input(record)
        return np.load(io.BytesIO(storage.read_bytes(place)), allow_pickle=False) if storage.exists(place) else None

    def open_jobs(self) -> dict[str, str]:
        """Identifier and owner of every job that has not ended, oldest first."""
        names = sorted(changed_at(self._place("open")))
        if not names:
            self._check_mark()
        return {job_id: owner for job_id, _, owner in (name.partition(".") for name in names)}

    def leases(self) -> dict[str, Lease]:
        """The lease that counts of every job that somebody works on."""
        found: dict[str, Lease] = {}
        for name, beat in changed_at(self._place("leases")).items():
            job_id, _, number = name.partition(".")
            if job_id not in found or int(number) > found[job_id].number:
                found[job_id] = Lease(int(number), beat)
        return found

    def claim(self, owner: str, job_id: str) -> JobRecord | None:
        """Takes a waiting job: its record under a new lease, or None if another replica has it or it has ended."""
        record = self.read(owner, job_id)
        if record is None:
            if time.time() - created_ms(job_id) / 1000 > _ORPHAN_SECONDS:
                storage.delete_file(self._place("open", f"{job_id}.{owner}"))
            return None
        # The record names the last lease; asked in this order, a lease that began in between is not overlooked.
        if record.lease and storage.exists(self._lease(job_id, record.lease)):
            return None
        return self.take(record, record.lease + 1)

    def take(self, record: JobRecord, number: int) -> JobRecord | None:
        """The record under lease ``number``, or None if another replica got it."""
        if not create_bytes(self._lease(record.id, number), b""):
            return None
        # Somebody may have worked on it, and ended, since the record was read.
        latest = self.read(record.owner, record.id)
        if latest is None or latest.ended or latest.lease >= number:
            if latest is not None and latest.ended:
                self.close(latest)
            storage.delete_file(self._lease(record.id, number))
            return None
        claimed = replace(latest, lease=number)
        self.write(claimed)
        return claimed

    def beat(self, record: JobRecord) -> None:
        """A sign of life of the lease's holder."""
        storage.write_bytes(self._lease(record.id, record.lease), b"")

    def release(self, record: JobRecord) -> None:
        """Gives the job back to the queue; the caller holds its lease."""
        waiting = replace(record, status="queued", frames_done=0, iterations_done=0, started_at=None)
        self.write(waiting)
        self.drop_leases(record)

    def request_cancel(self, record: JobRecord) -> None:
        """Asks the lease's holder, whichever replica that is, to stop the job."""
        storage.write_bytes(self._place("cancels", record.id), b"")

    def cancels(self) -> set[str]:
        """Jobs whose lease holder is asked to stop."""
        return set(changed_at(self._place("cancels")))

    def finish(self, record: JobRecord, video: bytes | None) -> None:
        """Writes the result, then the record of an ended job, then removes what says that it is open."""
        if video is not None:
            storage.write_bytes(self._video(record), video)
        self.write(record)
        self.close(record)

    def close(self, record: JobRecord) -> None:
        """Removes what an ended job does not need any more."""
        self.drop_leases(record)
        storage.delete_file(self._input(record))
        storage.delete_file(self._place("cancels", record.id))
        storage.delete_file(self._place("open", f"{record.id}.{record.owner}"))

    def write_segment(self, record: JobRecord, index: int, data: bytes) -> None:
        """The next part of a running job's video."""
        storage.write_bytes(self._segment(record, index), data)

    def read_segment(self, record: JobRecord, index: int) -> bytes | None:
        """A part of a running job's video, or None if there is none yet."""
        place = self._segment(record, index)
        return storage.read_bytes(place) if storage.exists(place) else None

    def video(self, record: JobRecord) -> bytes:
        """The result. Raises DataError if it is not there."""
        return storage.read_bytes(self._video(record))

    def delete(self, record: JobRecord) -> None:
        """Removes an ended job: the video first, so that no file outlives its record."""
        storage.delete_file(self._video(record))
        self.close(record)
        storage.delete_file(self._record(record.owner, record.id))

    def sweep(self, keep_seconds: float) -> None:
        """Removes videos of expired jobs, a while later their records, parts that nobody reads any more, and leases of
        jobs that are not there, as a replica that dies leaves them.

        Records and videos are written last when their job ends, so only those that were written so long ago are read.
        """
        open_jobs = self.open_jobs()
        written: dict[str, int] = {}
        for name, changed in changed_at(self._place("segments")).items():
            folder = name.partition("/")[0]
            written[folder] = max(written.get(folder, 0), changed)
        for folder, changed in written.items():
            if folder.partition(".")[0] not in open_jobs and time.time() - changed / 1e9 > _LEFT_SECONDS:
                storage.delete_folder(self._place("segments", folder))
        for name, changed in changed_at(self._place("leases")).items():
            if name.partition(".")[0] not in open_jobs and time.time() - changed / 1e9 > _LEFT_SECONDS:
                storage.delete_file(self._place("leases", name))
        for owner, job_id in self._untouched("videos", keep_seconds):
            record = self.read(owner, job_id)
            if record is not None and record.now().status == "expired":
                storage.delete_file(self._video(record))
        for owner, job_id in self._untouched("jobs", 2 * keep_seconds):
            record = self.read(owner, job_id)
            if record is not None and record.expires_at and record.expires_at + keep_seconds <= time.time():
                self.delete(record)

    def _untouched(self, folder: str, seconds: float) -> list[tuple[str, str]]:
        """Owners and identifiers of the files in a folder that were last written so many seconds ago."""
        latest = time.time() - seconds
        names = [name for name, changed in changed_at(self._place(folder)).items() if changed / 1e9 <= latest]
        parts = [name.partition("/") for name in names]
        return [(owner, file.partition(".")[0]) for owner, _, file in parts]

    def drop_leases(self, record: JobRecord) -> None:
        """Removes the record's lease and earlier ones; those first, for while any is left, nobody takes the job."""
        for name in sorted(changed_at(self._place("leases"))):
            job_id, _, number = name.partition(".")
            if job_id == record.id and int(number) <= record.lease:
                storage.delete_file(self._place("leases", name))

    def _place(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def _record(self, owner: str, job_id: str) -> str:
        return self._place("jobs", owner, f"{job_id}.json")

    def _input(self, record: JobRecord) -> str:
        return self._place("inputs", record.owner, f"{record.id}.npy")

    def _video(self, record: JobRecord) -> str:
        return self._place("videos", record.owner, f"{record.id}.{suffix(record)}")

    def _lease(self, job_id: str, number: int) -> str:
        return self._place("leases", f"{job_id}.{number}")

    def _segment(self, record: JobRecord, index: int) -> str:
        return self._place("segments", f"{record.id}.{record.lease}", f"{index:06d}")


def suffix(record: JobRecord) -> str:
    """Ending of the video's file name."""
    return "webm" if (record.media_type or "").startswith("video/webm") else "mp4"
