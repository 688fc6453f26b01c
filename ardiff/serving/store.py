"""The jobs in the database. Any replica can serve any job, and no job is lost when one crashes.

A replica that runs a job holds its lease: the status is ``in_progress``, and ``lease`` is a number that grows with each
claim. Every write of the holder names the number, so a replica that has lost its lease changes nothing. A heartbeat
is a counter. Identifiers begin with the time of creation, so they sort like the queue.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import sqlalchemy as sa

from ardiff.serving.database import Database, clock, jobs, segments, service
from ardiff.serving.records import JobRecord, Status, is_id

logger = logging.getLogger(__name__)
_LEFTOVER_SECONDS = 60.0
"""Age at which the segments of an ended job are removed."""
_ADMISSION_LOCK, _ISOLATION_LOCK = 2, 3
_FIELDS = {f.name for f in fields(JobRecord)}
"""A newer release may have stored others."""
_COLUMNS = [c for c in jobs.c if c.name in _FIELDS and c is not jobs.c.changes]
_EXPIRED = sa.func.coalesce(jobs.c.expires_at <= clock(), sa.literal(False)).label("expired")
_RECORD = (*_COLUMNS, jobs.c.changes, jobs.c.record, _EXPIRED)
_QUEUED, _HELD = jobs.c.status == "queued", jobs.c.status == "in_progress"
_SUSPECT = jobs.c.crashes > 0


class Load(NamedTuple):
    """Jobs that have not ended: those of one owner, and those of all that are queued."""

    owned: int
    queued: int


@dataclass(frozen=True, slots=True)
class OpenJobs:
    """Jobs that have not ended, of the same model and status. A replica has crashed with each suspect."""

    model: str
    status: Status
    suspect: bool
    count: int
    oldest: str
    """The identifier that was created first."""


class Lease(NamedTuple):
    """A replica's claim on a job: its number, and the count of its heartbeats."""

    number: int
    heartbeat: int


class HeldState(NamedTuple):
    """A job as the holder of its lease must know it: the number of the present lease, whether to stop, and how many
    changes are requested."""

    lease: int
    cancelled: bool
    num_changes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the stream of a running job."""

    start: int
    """Bytes of the stream before it."""
    data: bytes
    latents: bytes = b""
    """Those of the generated frames, as :func:`ardiff.sampling.saved.pack_latents` writes them."""
    state: bytes | None = None
    """The state of the sampling after these frames; None before any is generated, after all are, and if a later segment
    has one."""


class JobStore:
    """Runs the statements on jobs. Methods raise DataError if the database is unavailable."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def load(self, owner: str) -> Load:
        """The jobs that have not ended."""
        return Load(*self.database.rows(_count(owner))[0])

    def repeated(self, owner: str, key_hash: str) -> JobRecord | None:
        """The job that was requested with this idempotency key."""
        same = sa.and_(jobs.c.owner == owner, jobs.c.idempotency == key_hash)
        return self._record(sa.select(*_RECORD).where(same))

    def create(self, record: JobRecord, check: Callable[[Load], None]) -> bool:
        """Stores a job. One that is ``in_progress`` is held by the caller, so no replica takes it.

        Args:
            check: Called with the jobs before this one; what it raises rejects the job.

        Returns:
            Whether it is stored; False if there is a job with its idempotency key.
        """
        with self.database.transaction(_ADMISSION_LOCK) as connection:
            if record.idempotency is not None:
                same = sa.exists().where(jobs.c.owner == record.owner, jobs.c.idempotency == record.idempotency)
                if connection.scalar(sa.select(same)):
                    return False
            check(Load(*connection.execute(_count(record.owner)).one()))
            values = {"heartbeat": 0, "cancelled": False, "has_files": False}
            connection.execute(sa.insert(jobs).values(_to_row(record) | values))
        return True

    def read(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None if this owner has no such job."""
        if not is_id(job_id):
            return None
        own = sa.and_(jobs.c.id == job_id, jobs.c.owner == owner)
        return self._record(sa.select(*_RECORD).where(own))

    def page(self, owner: str, count: int, after: str | None = None, newest_first: bool = True) -> list[JobRecord]:
        """The owner's first records in order of creation; with ``after``, those that follow this job."""
        statement = sa.select(*_RECORD).where(jobs.c.owner == owner).limit(count)
        if after is not None:
            statement = statement.where(jobs.c.id < after if newest_first else jobs.c.id > after)
        return self._records(statement.order_by(jobs.c.id.desc() if newest_first else jobs.c.id))

    def open_jobs(self) -> list[OpenJobs]:
        """All queued jobs, and the suspects that run, in groups; the group with the oldest job first."""
        oldest = sa.func.min(jobs.c.id)
        group = (jobs.c.model, jobs.c.status, _SUSPECT)
        statement = sa.select(*group, sa.func.count(), oldest).where(jobs.c.ended_at.is_(None)).group_by(*group)
        rows = self.database.rows(statement.where(sa.or_(_QUEUED, sa.and_(_HELD, _SUSPECT))).order_by(oldest))
        return [OpenJobs(model, status, bool(suspect), count, first) for model, status, suspect, count, first in rows]

    def claim(self, model: str, count: int) -> list[JobRecord]:
        """Takes the leases of up to ``count`` of the model's oldest queued jobs, without suspects."""
        oldest = sa.select(jobs.c.id).where(
            _QUEUED, jobs.c.ended_at.is_(None), jobs.c.model == model, jobs.c.crashes == 0
        )
        oldest = oldest.order_by(jobs.c.id).limit(count).with_for_update(skip_locked=True)  # on SQLite without effect
        claimed = self._records(_claimed(jobs.c.id.in_(sa.select(oldest.cte("oldest").c.id))))
        return sorted(claimed, key=lambda record: record.id)

    def claim_job(self, job_id: str) -> list[JobRecord]:
        """Takes the lease of a queued job. None, if it is taken."""
        return self._records(_claimed(jobs.c.id == job_id))

    def claim_suspect(self, job_id: str) -> list[JobRecord]:
        """Takes the lease of a queued suspect. None, if it is taken, or if any suspect runs."""
        running = jobs.alias()
        is_running = sa.and_(running.c.status == "in_progress", running.c.ended_at.is_(None))
        alone = ~sa.exists().where(is_running, running.c.crashes > 0)
        with self.database.transaction(_ISOLATION_LOCK) as connection:
            return _to_records(connection.execute(_claimed(sa.and_(jobs.c.id == job_id, alone))).all())

    def leases(self) -> dict[str, Lease]:
        """The lease of every job that a replica runs."""
        statement = sa.select(jobs.c.id, jobs.c.lease, jobs.c.heartbeat).where(_HELD, jobs.c.ended_at.is_(None))
        return {job_id: Lease(number, heartbeat) for job_id, number, heartbeat in self.database.rows(statement)}

    def take_over(self, job_id: str, lease: Lease) -> list[JobRecord]:
        """Takes the next lease of a job whose holder has sent no heartbeat since ``lease``. None, if it has."""
        same = sa.and_(jobs.c.id == job_id, jobs.c.lease == lease.number, jobs.c.heartbeat == lease.heartbeat)
        return self._records(_claimed(same, _HELD))

    def heartbeat(self, records: Sequence[JobRecord]) -> None:
        """Renews the leases; called by their holder."""
        leases = [(record.id, record.lease) for record in records]
        same = sa.tuple_(jobs.c.id, jobs.c.lease).in_(leases)
        self.database.change(sa.update(jobs).where(same, _HELD).values(heartbeat=jobs.c.heartbeat + 1))

    def held_states(self, job_ids: Sequence[str]) -> dict[str, HeldState]:
        """The state of each of these jobs that is held."""
        columns = (jobs.c.id, jobs.c.lease, jobs.c.cancelled, jobs.c.num_changes)
        rows = self.database.rows(sa.select(*columns).where(jobs.c.id.in_(job_ids), _HELD))
        return {job_id: HeldState(*state) for job_id, *state in rows}

    def add_change(
        self, owner: str, job_id: str, change: Mapping[str, Any], check: Callable[[JobRecord], None]
    ) -> JobRecord | None:
        """Adds a change to those of a job, for the holder of its lease to apply, and returns the job; None if there is
        none.

        Args:
            check: Called with the job before; what it raises rejects the change.
        """
        own = sa.and_(jobs.c.id == job_id, jobs.c.owner == owner)
        with self.database.transaction() as connection:
            rows = connection.execute(sa.select(*_RECORD).where(own).with_for_update()).all()
            if not (records := _to_records(rows)):
                return None
            check(records[0])
            changes = [*records[0].changes, dict(change)]
            values = {"changes": json.dumps(changes), "num_changes": len(changes)}
            connection.execute(sa.update(jobs).where(own).values(values))
        return replace(records[0], changes=changes)

    def publish(self, record: JobRecord, segment: Segment | None) -> bool:
        """Writes the progress of a running job, and the next segment of its video. Returns False without the lease."""
        with self.database.transaction() as connection:
            held = connection.execute(_held_by(record).values(_to_row(record))).rowcount > 0
            if segment is None or not held:
                return held
            row = {"job_id": record.id, "begun": record.begun} | asdict(segment)
            known = sa.exists().where(*(segments.c[name] == row[name] for name in ("job_id", "begun", "start")))
            values = [sa.literal(row[column.name], column.type) for column in segments.c]
            connection.execute(sa.insert(segments).from_select(list(segments.c), sa.select(*values).where(~known)))
            if segment.state is not None:
                earlier = sa.and_(_of_video(record), segments.c.start < segment.start, segments.c.state.is_not(None))
                connection.execute(sa.update(segments).where(earlier).values(state=None))
        return True

    def release(self, record: JobRecord) -> None:
        """Returns a job to the queue; called by the lease holder."""
        self.database.change(_held_by(record).values(_to_row(record) | {"status": "queued"}))

    def finish(self, record: JobRecord, keep_seconds: float) -> JobRecord | None:
        """Writes the final record and returns it as it is stored; without the lease returns None."""
        statement = _held_by(record).values(_to_row(record) | _end(keep_seconds)).returning(*_RECORD)
        return self._record(statement)

    def cancel(self, owner: str, job_id: str, keep_seconds: float) -> JobRecord | None:
        """Ends a queued job, and returns it. Otherwise the holder of the lease is to stop the job."""
        own = sa.and_(jobs.c.id == job_id, jobs.c.owner == owner)
        values = _end(keep_seconds) | {"status": "cancelled"}
        ended = self._record(sa.update(jobs).where(own, _QUEUED).values(values).returning(*_RECORD))
        if ended is None:
            self.database.change(sa.update(jobs).where(own, jobs.c.ended_at.is_(None)).values(cancelled=True))
        return ended

    def read_stream(self, record: JobRecord, position: int) -> bytes:
        """The next bytes of a running job's stream from ``position`` on; none if they are not written yet."""
        before = sa.select(segments.c.start, segments.c.data).where(_of_video(record), segments.c.start <= position)
        rows = self.database.rows(before.order_by(segments.c.start.desc()).limit(1))
        return bytes(rows[0].data)[position - rows[0].start :] if rows else b""

    def continue_stream(self, record: JobRecord) -> list[Segment]:
        """The segments of the stream up to the last one with a state; the new holder, who calls it, removes the
        others."""
        columns = [segments.c[f.name] for f in fields(Segment)]
        statement = sa.select(*columns).where(_of_video(record)).order_by(segments.c.start)
        with self.database.transaction() as connection:
            rows = [Segment(*row) for row in connection.execute(statement)]
            while rows and rows[-1].state is None:
                rows.pop()
            last, held = rows[-1].start if rows else -1, sa.exists().where(_holds_lease(record))
            connection.execute(sa.delete(segments).where(_of_video(record), segments.c.start > last, held))
        return rows

    def delete(self, job_ids: Sequence[str]) -> None:
        """Removes jobs."""
        with self.database.transaction() as connection:
            connection.execute(sa.delete(segments).where(segments.c.job_id.in_(job_ids)))
            connection.execute(sa.delete(jobs).where(jobs.c.id.in_(job_ids)))

    def start_sweep(self, seconds: float) -> bool:
        """Whether the caller is to remove what has expired: one replica in ``seconds``."""
        due = service.c.swept_at <= clock() - seconds
        return bool(self.database.change(sa.update(service).where(due).values(swept_at=clock())))

    def expired_files(self, count: int) -> list[JobRecord]:
        """Jobs whose files have expired and are not removed yet."""
        return self._records(sa.select(*_RECORD).where(jobs.c.has_files, jobs.c.expires_at <= clock()).limit(count))

    def mark_removed(self, job_ids: Sequence[str]) -> None:
        """Notes that the files of these jobs are removed."""
        self.database.change(sa.update(jobs).where(jobs.c.id.in_(job_ids)).values(has_files=False))

    def remove_expired(self, keep_seconds: float) -> None:
        """Removes jobs ``keep_seconds`` after their files, and segments that nobody reads any more."""
        recent = sa.or_(jobs.c.ended_at.is_(None), jobs.c.ended_at > clock() - _LEFTOVER_SECONDS)
        needed = sa.exists().where(jobs.c.id == segments.c.job_id, recent)
        self.database.change(sa.delete(segments).where(~needed))
        self.database.change(sa.delete(jobs).where(~jobs.c.has_files, jobs.c.expires_at <= clock() - keep_seconds))

    def _records(self, statement: sa.Executable) -> list[JobRecord]:
        return _to_records(self.database.rows(statement))

    def _record(self, statement: sa.Executable) -> JobRecord | None:
        return next(iter(self._records(statement)), None)


def _count(owner: str) -> sa.Select[Any]:
    """Counts the jobs that have not ended: the owner's, and those of all that are queued."""
    own = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.ended_at.is_(None), jobs.c.owner == owner)
    queued = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.ended_at.is_(None), _QUEUED)
    return sa.select(own.scalar_subquery(), queued.scalar_subquery())


def _claimed(where: sa.ColumnElement[bool], status: sa.ColumnElement[bool] = _QUEUED) -> Any:
    """Takes the next lease of jobs with this status."""
    values = {"status": "in_progress", "lease": jobs.c.lease + 1, "heartbeat": 0}
    return sa.update(jobs).where(where, status).values(values).returning(*_RECORD)


def _of_video(record: JobRecord) -> sa.ColumnElement[bool]:
    """The segments of the video as it began last."""
    return sa.and_(segments.c.job_id == record.id, segments.c.begun == record.begun)


def _holds_lease(record: JobRecord) -> sa.ColumnElement[bool]:
    """Whether the record's lease is the present one of its job."""
    return sa.and_(jobs.c.id == record.id, jobs.c.lease == record.lease, _HELD)


def _held_by(record: JobRecord) -> sa.Update:
    """An update of the job, as long as the record's lease is the present one."""
    return sa.update(jobs).where(_holds_lease(record))


def _end(keep_seconds: float) -> dict[str, Any]:
    return {"ended_at": clock(), "expires_at": clock() + keep_seconds, "has_files": True}


def _to_row(record: JobRecord) -> dict[str, Any]:
    """The columns that a replica writes. JSON escapes what a database would reject in the texts of clients."""
    values = asdict(record)
    columns = {column.name: values.pop(column.name) for column in _COLUMNS}
    del values["changes"]
    return columns | {"record": json.dumps(values)}


def _to_records(rows: Sequence[sa.Row[Any]]) -> list[JobRecord]:
    """The records of rows, without damaged ones."""
    return [record for row in rows if (record := _to_record(row)) is not None]


def _to_record(row: sa.Row[Any]) -> JobRecord | None:
    """The record of a row, or None if it is damaged."""
    columns = {column.name: row._mapping[column.name] for column in _COLUMNS}
    if row.expired:
        columns["status"] = "expired"
    try:
        values = json.loads(row.record).items()
        columns["changes"] = json.loads(row.changes)
        return JobRecord(**columns, **{name: value for name, value in values if name in _FIELDS})
    except (ValueError, TypeError) as error:
        logger.error("The record of %s is damaged: %s", columns["id"], error)
        return None
