"""Jobs in the database, on SQLite and on a real PostgreSQL: leases, limits, expiry, versions; and their files."""

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from postgres_server import SECRET, PostgresServer
from sqlalchemy import select, text, update

from ardiff.errors import ConfigError, DataError
from ardiff.serving import database as schema
from ardiff.serving.database import Database, jobs, segments, service
from ardiff.serving.files import JobFiles
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.store import JobStore, Lease, Load, OpenJobs, Segment

from .conftest import age_jobs

PART = Segment(0, b"part")
KEEP = 1000.0


@pytest.fixture(params=["sqlite", "postgresql"])
def make_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Database]]:
    """``make_database()``: the same database each time, through connections of its own."""
    settings = [str(tmp_path / "jobs.sqlite")]
    if request.param == "postgresql":
        settings = [*request.getfixturevalue("postgres").new_database().values()]
    made: list[Database] = []

    def make() -> Database:
        made.append(Database(*settings))
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture
def store(make_database: Callable[[], Database]) -> JobStore:
    database = make_database()
    database.prepare()
    return JobStore(database)


def record(owner: str = "alice", **changes: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "kind": "job",
        "model": "tiny",
        "params": {"num_frames": 4},
        "fps": 8.0,
        "size": "16x16",
        "iterations": 4,
        "created_at": time.time(),
    }
    return JobRecord(**{"id": new_id(), "owner": owner, **fields, **changes})


def accept(load: Load) -> None:
    """A check that every job passes."""


def queue(store: JobStore, **changes: Any) -> JobRecord:
    job = record(**changes)
    assert store.create(job, accept)
    return job


def together(count: int, action: Callable[[int], Any]) -> list[Any]:
    """The results of ``action(number)``, called in as many threads at the same time."""
    barrier, results = threading.Barrier(count), list[Any]()

    def run(number: int) -> None:
        barrier.wait(60)
        results.append(action(number))

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def test_the_life_of_a_job(store: JobStore) -> None:
    job = queue(store)
    assert store.read("alice", job.id) == job
    assert store.read("bob", job.id) is None
    assert store.read("alice", "../../etc/passwd") is None
    assert store.open_jobs() == [OpenJobs("tiny", "queued", False, 1, job.id)]
    assert store.claim("other", 5) == []
    (held,) = store.claim("tiny", 5)
    assert (held.lease, held.status) == (1, "in_progress")
    assert store.claim("tiny", 5) == store.claim_job(job.id) == store.open_jobs() == []
    store.publish(replace(held, frames_done=2), PART)
    store.publish(replace(held, frames_done=3), PART)  # again, because no response arrived
    assert store.read("alice", job.id).frames_done == 3
    store.publish(replace(held, frames_done=4), None)
    assert [store.read_stream(held, position) for position in (0, 3, 4)] == [b"part", b"t", b""]
    assert store.read("alice", job.id).frames_done == 4
    ended = store.finish(replace(held, status="completed", media_type="video/mp4", frames_sha256="00"), KEEP)
    assert ended == store.read("alice", job.id)
    assert ended.frames_sha256 == "00"
    assert abs(ended.ended_at - time.time()) < 60
    assert ended.expires_at - ended.ended_at == pytest.approx(KEEP, abs=1)
    assert store.load("alice") == Load(0, 0)
    assert store.cancel("alice", job.id, KEEP) is None
    assert store.read("alice", job.id) == ended
    store.delete([job.id])
    assert store.read("alice", job.id) is None
    assert store.read_stream(held, 0) == b""


def test_each_queued_job_has_one_holder_and_the_oldest_is_first(
    store: JobStore, make_database: Callable[[], Database]
) -> None:
    created = sorted(queue(store).id for _ in range(30))
    replicas = [JobStore(make_database()) for _ in range(6)]

    def work(number: int) -> list[str]:
        taken: list[str] = []
        while claimed := replicas[number].claim("tiny", 2):
            taken += [held.id for held in claimed]
        return taken

    taken = together(6, work)
    assert sorted(job_id for ids in taken for job_id in ids) == created
    assert all(ids == sorted(ids) for ids in taken)


def test_a_replica_without_the_lease_changes_nothing(store: JobStore) -> None:
    job = queue(store)
    (lost,) = store.claim("tiny", 1)
    seen = store.leases()[job.id]
    store.heartbeat([lost])
    assert store.take_over(job.id, seen) == []  # it lives
    (held,) = store.take_over(job.id, store.leases()[job.id])
    assert held.lease == 2
    assert store.take_over(job.id, Lease(1, 1)) == []
    before = (store.read("alice", job.id), store.leases())
    store.heartbeat([lost])
    store.publish(replace(lost, frames_done=3), PART)
    store.release(lost)
    assert store.finish(replace(lost, status="completed"), KEEP) is None
    assert (store.read("alice", job.id), store.leases()) == before
    assert store.read_stream(lost, 0) == b""
    assert store.held_states([job.id])[job.id].lease == 2
    store.release(replace(held, crashes=1))
    store.heartbeat([held])
    assert store.finish(replace(held, status="completed"), KEEP) is None
    assert store.read("alice", job.id).status == "queued"


def test_one_suspect_runs_at_a_time(store: JobStore, make_database: Callable[[], Database]) -> None:
    ids = sorted(queue(store, crashes=1).id for _ in range(4))
    plain = queue(store)
    assert store.open_jobs()[0] == OpenJobs("tiny", "queued", True, 4, ids[0])
    replicas = [JobStore(make_database()) for _ in range(4)]
    claimed = together(4, lambda number: replicas[number].claim_suspect(ids[number]))
    (held,) = [held for taken in claimed for held in taken]
    assert OpenJobs("tiny", "in_progress", True, 1, held.id) in store.open_jobs()
    assert [taken.id for taken in store.claim("tiny", 9)] == [plain.id]
    assert store.finish(replace(held, status="failed"), KEEP) is not None
    assert len(store.claim_suspect(min(set(ids) - {held.id}))) == 1


def test_limits_hold_for_requests_at_the_same_time(store: JobStore, make_database: Callable[[], Database]) -> None:
    replicas = [JobStore(make_database()) for _ in range(8)]

    def check(load: Load) -> None:
        if load.owned >= 5 or load.queued >= 7:
            raise ConfigError("full")

    def ask(number: int) -> int:
        accepted = 0
        for owner in ("alice", "bob"):
            try:
                accepted += replicas[number].create(record(owner), check)
            except ConfigError:
                continue
        return accepted

    assert sum(together(8, ask)) == 7
    assert max(store.load("alice").owned, store.load("bob").owned) <= 5
    assert store.load("alice").queued == 7
    assert store.claim("tiny", 7)
    assert sum(together(8, ask)) == 3
    assert [store.load(owner).owned for owner in ("alice", "bob")] == [5, 5]


def test_an_idempotency_key_has_one_job(store: JobStore, make_database: Callable[[], Database]) -> None:
    replicas = [JobStore(make_database()) for _ in range(6)]
    created = together(6, lambda number: replicas[number].create(record(idempotency="k", request_hash="h"), accept))
    assert sorted(created) == [False] * 5 + [True]
    job = store.repeated("alice", "k")
    assert job.request_hash == "h"
    assert store.repeated("bob", "k") is None
    assert store.create(record("bob", idempotency="k"), accept)
    store.delete([job.id])
    assert store.repeated("alice", "k") is None


def test_a_cancellation_ends_a_queued_job_or_reaches_its_holder(store: JobStore) -> None:
    queued, running = queue(store), queue(store)
    assert store.cancel("bob", queued.id, KEEP) is None
    assert store.cancel("alice", queued.id, KEEP).status == "cancelled"
    assert store.claim_job(queued.id) == []
    (held,) = store.claim("tiny", 5)
    assert (held.id, store.held_states([held.id])[held.id].cancelled) == (running.id, False)
    assert store.cancel("alice", running.id, KEEP) is None
    store.release(held)  # while it stops
    (again,) = store.claim("tiny", 5)
    assert store.held_states([again.id])[again.id].cancelled


def test_pages_in_both_orders(store: JobStore) -> None:
    ids = sorted(queue(store).id for _ in range(5))
    queue(store, owner="bob")
    assert [job.id for job in store.page("alice", 3)] == ids[:1:-1]
    assert [job.id for job in store.page("alice", 3, ids[2])] == ids[1::-1]
    assert [job.id for job in store.page("alice", 2, ids[1], newest_first=False)] == ids[2:4]
    assert store.page("alice", 2, ids[4], newest_first=False) == []


def test_any_text_of_a_client_is_stored(store: JobStore) -> None:
    prompt = "a\0b \ud800 \U0001f642 ' \" -- %s :x \r\n"
    job = queue(store, prompt=prompt, params={"num_frames": 4, "negative_prompt": prompt})
    assert store.read("alice", job.id) == job
    assert store.claim("tiny", 1)[0].prompt == prompt


def test_what_a_newer_release_stored_is_ignored_and_a_damaged_record_is_skipped(store: JobStore) -> None:
    newer, damaged = queue(store), queue(store)
    with store.database.transaction() as connection:
        stored = connection.scalar(select(jobs.c.record).where(jobs.c.id == newer.id))
        for job, value in ((newer, stored[:-1] + ', "color": "red"}'), (damaged, "{")):
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(record=value))
    assert store.page("alice", 5) == [newer]
    assert [held.id for held in store.claim("tiny", 5)] == [newer.id]


def test_jobs_expire_by_the_clock_of_the_database(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    present = time.time
    monkeypatch.setattr("time.time", lambda: present() + 25 * 3600)  # a replica with a wrong clock
    waiting, done, failed = queue(store), queue(store), queue(store)
    for job, status in ((done, "completed"), (failed, "failed")):
        (held,) = store.claim_job(job.id)
        store.publish(held, PART)
        assert store.finish(replace(held, status=status), KEEP) is not None

    def sweep(age: float) -> list[str]:
        age_jobs(store, age)
        assert store.start_sweep(60.0)
        assert not store.start_sweep(60.0)  # another replica
        expired = sorted(job.id for job in store.expired_files(10))
        store.mark_removed(expired)
        store.remove_expired(KEEP)
        return expired

    assert sweep(0) == []
    assert (store.read("alice", done.id).status, store.read_stream(held, 0)) == ("completed", b"part")
    assert sweep(100) == []
    assert store.read_stream(held, 0) == b""
    assert sweep(KEEP) == sorted([done.id, failed.id])
    assert store.expired_files(10) == []
    assert [store.read("alice", job.id).status for job in (done, failed)] == ["expired", "expired"]
    assert sweep(KEEP) == []
    assert [store.read("alice", job.id) for job in (done, failed, waiting)] == [None, None, waiting]


def test_a_stream_is_continued_after_the_last_segment_with_a_state(store: JobStore) -> None:
    job = queue(store)
    (lost,) = store.claim("tiny", 1)
    lost = replace(lost, begun=lost.lease)
    parts = [Segment(0, b"ab", b"x", b"1"), Segment(2, b"cd", b"y", b"2"), Segment(4, b"ef", b"z"), Segment(6, b"end")]
    for part in [*parts[:2], parts[1], *parts[2:]]:  # one of them twice, because no response arrived
        store.publish(lost, part)
    (held,) = store.take_over(job.id, store.leases()[job.id])
    store.publish(lost, Segment(9, b"late", b"", b"3"))
    assert held.begun == 1
    published = [replace(parts[0], state=None), parts[1]]
    assert store.continue_stream(lost) == published
    assert store.read_stream(held, 6) == b"end"  # a replica without the lease removes nothing
    assert store.continue_stream(held) == published
    assert [store.read_stream(held, position) for position in (0, 2, 4)] == [b"ab", b"cd", b""]
    store.publish(held, Segment(4, b"efg", b"z"))
    assert store.read_stream(held, 5) == b"fg"


def test_a_stream_without_a_state_begins_again(store: JobStore) -> None:
    job = queue(store)
    (lost,) = store.claim("tiny", 1)
    lost = replace(lost, begun=lost.lease)
    store.publish(lost, Segment(0, b"old"))
    (held,) = store.take_over(job.id, store.leases()[job.id])
    assert store.continue_stream(held) == []
    held = replace(held, begun=held.lease)
    store.publish(held, Segment(0, b"new"))
    assert (store.read_stream(lost, 0), store.read_stream(held, 0)) == (b"", b"new")
    store.delete([job.id])
    assert store.database.rows(select(segments.c.job_id)) == []


def test_the_schema_is_created_once_and_changed_by_numbers(
    make_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    databases = [make_database() for _ in range(4)]
    together(4, lambda number: databases[number].prepare())
    store = JobStore(databases[0])
    job = queue(store)
    monkeypatch.setattr(schema, "VERSION", 3)
    changes = {2: ("ALTER TABLE jobs ADD COLUMN color TEXT", "UPDATE jobs SET color = 'red'"), 3: ()}
    monkeypatch.setattr(schema, "MIGRATIONS", changes)
    together(4, lambda number: databases[number].prepare())
    assert store.database.rows(text("SELECT color FROM jobs")) == [("red",)]
    assert store.database.rows(select(service.c.version)) == [(3,)]
    monkeypatch.setattr(schema, "VERSION", 2)
    with pytest.raises(ConfigError, match="has version 3, but this release of ardiff knows 2 only"):
        databases[0].prepare()
    assert store.read("alice", job.id) == job  # replicas of the earlier release continue


def test_replicas_that_create_the_file_together_do_not_lock_each_other_out(tmp_path: Path) -> None:
    for number in range(12):
        databases = [Database(str(tmp_path / f"{number}.sqlite")) for _ in range(4)]
        together(4, lambda i, databases=databases: databases[i].prepare())  # type: ignore[misc]
        for database in databases:
            database.close()


def test_all_versions_lead_to_the_schema() -> None:
    assert set(schema.MIGRATIONS) == set(range(2, schema.VERSION + 1))


def test_a_file_that_vanishes_is_an_outage(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    store = JobStore(Database(str(folder / "jobs.sqlite")))
    store.database.prepare()
    job = queue(store)
    folder.rename(tmp_path / "unmounted")
    for _ in range(2):
        with pytest.raises(DataError, match="The database of jobs is unavailable: unable to open"):
            store.read("alice", job.id)
    folder.mkdir()
    with pytest.raises(DataError, match="unavailable"):
        store.load("alice")
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "unmounted").rename(folder)
    assert store.read("alice", job.id) == job
    folder.rename(tmp_path / "away")
    folder.write_text("a file")
    with pytest.raises(DataError, match="Cannot write"):
        Database(str(folder / "jobs.sqlite")).prepare()


def test_the_password_is_read_for_each_connection(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, file = postgres.new_database()["database"], tmp_path / "password"
    for reference, reason in (("env:ARDIFF_NOTHING", "ARDIFF_NOTHING"), (str(file), "Cannot read the password")):
        with pytest.raises(DataError, match=reason):
            Database(uri, reference).prepare()
    file.write_text("wrong")
    database = Database(uri, str(file))
    with pytest.raises(DataError, match="password authentication failed") as caught:
        database.prepare()
    assert "wrong" not in str(caught.value)
    file.write_text(f"{os.environ[SECRET]}\n")
    database.prepare()
    database.close()


def test_a_restart_of_postgresql_loses_nothing(postgres: PostgresServer) -> None:
    store = JobStore(Database(*postgres.new_database().values()))
    store.database.prepare()
    job = queue(store)
    (held,) = store.claim("tiny", 1)
    postgres.stop()
    try:
        for _ in range(2):
            with pytest.raises(DataError, match="The database of jobs is unavailable"):
                store.heartbeat([held])
    finally:
        postgres.start()
    store.heartbeat([held])
    assert store.leases() == {job.id: Lease(1, 1)}
    store.database.close()


def check_files(files: JobFiles) -> None:
    files.mark()
    given = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    job = record(params={"num_frames": 4, "given_frames": 1}, lease=3, crashes=2, media_type="video/mp4")
    with pytest.raises(EOFError):
        files.read_input(job)
    files.write_input(job, given)
    assert np.array_equal(files.read_input(job), given)
    assert files.video(job) is None
    for lease in (1, 3):  # the first replica crashed after it wrote the video
        files.write_video(replace(job, lease=lease), b"video %d" % lease)
    assert files.video(job).read() == b"video 3"
    files.delete_video(replace(job, lease=1))
    assert files.video(job).read() == b"video 3"
    files.write_video(replace(job, lease=1), b"video 1")
    files.delete(job)
    assert files.video(job) is files.video(replace(job, lease=1)) is None
    with pytest.raises(EOFError):
        files.read_input(job)
    files.delete(job, record())


def test_files_in_a_local_folder(tmp_path: Path) -> None:
    check_files(JobFiles(str(tmp_path / "shared")))
    with pytest.raises(DataError, match="is not the folder"):
        JobFiles(str(tmp_path / "empty")).video(record(lease=1))


def test_files_on_s3(s3_bucket: str) -> None:
    check_files(JobFiles(f"{s3_bucket}/serve"))


REPLICAS, PROCESSES, JOBS = 100, 10, 2000


def simulate(settings: list[str], name: str, crash_after: int | None, results: Any) -> None:
    """A process of ten replicas without a model, which take, run and end jobs; it may crash while it holds some."""
    done = itertools.count(1)

    def replica() -> None:
        store, seen, idle = JobStore(Database(*settings, connections=1)), dict[str, tuple[Lease, float]](), 0
        while idle < 20:
            now = time.monotonic()
            leases = store.leases()
            seen = {i: seen[i] if i in seen and seen[i][0] == lease else (lease, now) for i, lease in leases.items()}
            for job_id, (lease, since) in seen.items():
                if now - since > 8.0:  # its holder has crashed
                    for taken in store.take_over(job_id, lease):
                        store.release(replace(taken, crashes=taken.crashes + 1))
            suspects = [group for group in store.open_jobs() if group.suspect and group.status == "queued"]
            claimed = store.claim("tiny", 2) or [
                held for group in suspects for held in store.claim_suspect(group.oldest)
            ]
            idle = 0 if claimed or leases else idle + 1
            for held in claimed:
                store.heartbeat(claimed)
                if crash_after is not None and next(done) > crash_after:
                    os._exit(1)
                store.publish(replace(held, frames_done=1), PART)
                if store.finish(replace(held, status="completed", frames_sha256=name), KEEP) is not None:
                    results.put(held.id)
            if not claimed:
                time.sleep(0.2)
        store.database.close()

    threads = [threading.Thread(target=replica) for _ in range(REPLICAS // PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_a_hundred_replicas_do_each_job_once() -> None:
    """Two of the ten processes crash with jobs in their hands."""
    context = multiprocessing.get_context("spawn")
    with PostgresServer(max_connections=150) as server, context.Manager() as manager:
        settings = list(server.new_database().values())
        store = JobStore(Database(*settings))
        store.database.prepare()
        ids = {queue(store).id for _ in range(JOBS)}
        results = manager.Queue()
        processes = [
            context.Process(target=simulate, args=(settings, str(n), 40 if n < 2 else None, results))
            for n in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
        assert [process.exitcode for process in processes] == [1, 1] + [0] * (PROCESSES - 2)
        ended = [results.get() for _ in range(results.qsize())]
        rows = store.database.rows(select(jobs.c.id, jobs.c.status, jobs.c.crashes, jobs.c.lease))
        store.database.close()
    assert {row.id for row in rows if row.status == "completed"} == ids
    assert len(set(ended)) == len(ended)
    assert set(ended) <= ids
    assert JOBS - len(ended) <= 20  # a crashed process may have ended one job per replica without reporting it
    assert any(row.crashes for row in rows)
    assert all(row.lease == 1 for row in rows if not row.crashes)
