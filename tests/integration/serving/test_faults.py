"""Faults: crashed and stopped replicas, unavailable storage, failed iterations. No job is lost."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from postgres_server import PostgresServer
from s3_server import S3Server, environment
from sqlalchemy import update

from ardiff.data.config import StorageConfig
from ardiff.errors import DataError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.request import SampleRequest
from ardiff.serving.database import jobs
from ardiff.serving.keys import digest
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.store import JobStore

from .conftest import JOB, LONG, SHORT_LEASE, Serve, Served, eventually, serving
from .test_api import frames_of, sha256


def test_any_replica_serves_any_job(serve_on_each: Serve) -> None:
    first, second = serve_on_each("a"), serve_on_each("b")
    lets = [first.hold(), second.hold()]
    video = first.ask(**JOB)
    eventually(lambda: video["id"] in first.replica.running or video["id"] in second.replica.running)
    holder, other = (first, second) if video["id"] in first.replica.running else (second, first)
    for let in lets:
        let(50)
    eventually(lambda: other.look(video)["frames_done"] >= 5)
    assert other.look(video)["status"] == "in_progress"
    for let in lets:
        let(math.inf)
    streamed = other.client.get(f"/v1/videos/{video['id']}/stream")
    assert len(frames_of(streamed.content)) == JOB["num_frames"]
    assert other.wait(video)["frames_sha256"] == holder.look(video)["frames_sha256"]
    assert other.client.get(f"/v1/videos/{video['id']}/content").status_code == 200


def test_a_job_is_cancelled_through_another_replica(serve: Serve) -> None:
    first = serve("a")
    let = first.hold()
    video = first.ask(**LONG)
    let(40)
    eventually(lambda: first.look(video)["frames_done"] > 0)
    second = serve("b")
    let(math.inf)
    assert second.client.post(f"/v1/videos/{video['id']}/cancel").json()["status"] == "cancelled"
    assert first.look(video)["status"] == "cancelled"
    assert not first.replica.models["tiny"].busy


def test_a_stream_of_which_nothing_was_read_fails_with_its_replica(serve: Serve) -> None:
    first = serve("a", segment_seconds=60.0)
    with first.client.stream("POST", "/v1/videos:stream", json=LONG) as answer:
        parts = answer.iter_raw()  # held: dropping it would close the connection
        next(parts)
        first.crash()
        second = serve("b", lease_seconds=SHORT_LEASE)
        failed = second.wait({"id": answer.headers["x-video-id"]}, "failed")
    assert failed["error"]["type"] == "replica_crashed"


def test_a_job_that_crashes_its_replicas_fails(serve: Serve) -> None:
    settings = {"max_attempts": 2, "lease_seconds": SHORT_LEASE}
    first = serve("a", **settings)
    video = first.ask(**LONG)
    for name in ("b", "c"):
        eventually(lambda at=first: at.record(video).lease and at.replica.running)
        first.crash()
        first = serve(name, **settings)
        eventually(lambda at=first: at.look(video)["status"] == "failed" or at.replica.running)
    failed = first.wait(video, "failed")
    assert failed["error"]["type"] == "replica_crashed"


def test_jobs_of_a_crashed_replica_are_repeated_one_at_a_time(serve: Serve) -> None:
    """One of them may have caused the crash, and must not fail the others with it."""
    first = serve("a")
    let = first.hold()
    videos = [first.ask(**{**JOB, "seed": seed}) for seed in (1, 2, 3)]
    eventually(lambda: first.replica.models["tiny"].num_jobs == 3)
    let(40)
    eventually(lambda: all(first.look(video)["frames_done"] > 0 for video in videos))
    first.crash()
    second = serve("b", lease_seconds=SHORT_LEASE)
    while any(second.look(video)["status"] != "completed" for video in videos):
        assert second.replica.models["tiny"].num_jobs <= 1
        time.sleep(0.01)
    assert [second.record(v).crashes for v in videos] == [1, 1, 1]


def test_one_replica_runs_the_job_of_a_crashed_one_alone_and_the_others_continue(serve_on_each: Serve) -> None:
    first = serve_on_each("a")
    let = first.hold()
    videos = [first.ask(**{**JOB, "seed": seed}) for seed in (1, 2)]
    eventually(lambda: first.replica.models["tiny"].num_jobs == 2)
    let(40)
    eventually(lambda: all(first.look(video)["frames_done"] > 0 for video in videos))
    others = [serve_on_each(name, lease_seconds=SHORT_LEASE) for name in ("b", "c")]
    body = {**LONG, "num_frames": 1000}
    with contextlib.ExitStack() as streams:
        for other in others:  # both are busy, and stay so
            let = other.hold()
            let(40)
            answer = streams.enter_context(other.client.stream("POST", "/v1/videos:stream", json=body))
            next(answer.iter_raw())
        first.crash()

        def isolating() -> list[Served]:
            return [other for other in others if any(video["id"] in other.replica.running for video in videos)]

        eventually(isolating)
        (alone,) = isolating()
        (free,) = [other for other in others if other is not alone]
        refused = httpx.post(f"{alone.url}/v1/videos:stream", json=LONG, timeout=60)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
        free.lets[-1](60)
        with httpx.stream("POST", f"{free.url}/v1/videos:stream", json=body, timeout=60) as accepted:
            assert accepted.status_code == 200
        job = free.ask(**JOB)
        eventually(lambda: job["id"] in free.replica.running)
        free.poll()
        assert [alone] == isolating()
        assert sum(video["id"] in alone.replica.running for video in videos) == 1
    for other in others:
        other.lets[-1](math.inf)
    for video in videos:
        alone.wait(video)
    assert [alone.record(video).crashes for video in videos] == [1, 1]
    free.wait(job)


def test_a_crashed_job_of_a_model_of_other_replicas_delays_no_other(serve: Serve, make_pipeline: Any) -> None:
    first = serve("a", pipelines={"first": make_pipeline(), "tiny": make_pipeline()})
    first.hold()
    elsewhere = first.ask(**JOB, model="first")
    eventually(lambda: first.replica.running)
    first.crash()
    second = serve("b", lease_seconds=SHORT_LEASE)
    eventually(lambda: second.record(elsewhere).crashes)
    video = replace(second.record(elsewhere), id=new_id(), model="tiny", lease=0)
    second.replica.stores.jobs.store.create(video, lambda load: None)
    assert second.wait({"id": video.id})["model"] == "tiny"
    assert second.look(elsewhere)["status"] == "queued"


def test_the_state_of_a_job_never_goes_back(serve_on_each: Serve) -> None:
    """A client whose requests reach the replicas in turn sees one state after the other."""
    replicas = [serve_on_each("a"), serve_on_each("b")]
    video = replicas[0].ask(**{**JOB, "num_frames": 120})
    order = ["queued", "in_progress", "completed"]
    seen: list[tuple[int, int, int]] = []
    while not seen or seen[-1][0] < 2:
        for replica in replicas:
            state = replica.look(video)
            seen.append((order.index(state["status"]), state["progress"], state["iterations_done"]))
    assert seen == sorted(seen)
    assert {status for status, _, _ in seen} >= {1, 2}


def test_replicas_outlive_an_outage_longer_than_a_lease(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """No heartbeat could be written meanwhile, so no replica counts as crashed when storage is available again."""
    first, second = serve("a"), serve("b", lease_seconds=SHORT_LEASE)
    first.hold()(40)
    with first.client.stream("POST", "/v1/videos:stream", json=LONG) as answer:
        video_id = answer.headers["x-video-id"]
        eventually(lambda: video_id in second.replica.queue.leases_seen)

        def away(*arguments: object) -> None:
            raise DataError("away")

        with monkeypatch.context() as outage:
            for name in ("open_jobs", "heartbeat"):
                outage.setattr(JobStore, name, away)
            time.sleep(2 * SHORT_LEASE)
        for _ in range(3):
            second.poll()
        assert video_id in first.replica.running
        record = second.record({"id": video_id})
        assert (record.lease, record.crashes) == (1, 0)


def test_a_key_that_is_removed_stops_working_while_a_sweep_hangs(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(JobStore, "start_sweep", lambda store, seconds: let_go.wait(60))
    keys = tmp_path / "keys.yaml"

    def write(text: str) -> None:  # in one step: a half-written file lacks keys
        draft = keys.with_suffix(".new")
        draft.write_text(text)
        draft.replace(keys)

    write(f"alice: {{sha256: {digest('ka')}}}\nbob: {{sha256: {digest('kb')}}}")
    served = serve(keys=str(keys), keys_seconds=0.2)
    header = {"authorization": "Bearer ka"}
    try:
        assert served.client.get("/v1/models", headers=header).status_code == 200
        write(f"bob: {{sha256: {digest('kb')}}}")
        eventually(lambda: served.client.get("/v1/models", headers=header).status_code == 401, 50)
        other = {"authorization": "Bearer kb"}
        assert served.client.get("/v1/models", headers=other).status_code == 200
        write("")  # without any key nobody has access
        eventually(lambda: served.client.get("/v1/models", headers=other).status_code == 401, 50)
        assert served.client.get("/v1/models").status_code == 401
    finally:
        let_go.set()


def test_a_slow_database_delays_no_heartbeat(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement renews the leases of all jobs, also while all other calls hang."""
    served = serve()
    let = served.hold()
    videos = [served.ask(**LONG, seed=seed) for seed in range(8)]
    eventually(lambda: served.replica.models["tiny"].num_jobs == 8)
    let(2)
    release, calls = threading.Event(), list[set[str]]()
    heartbeat = JobStore.heartbeat

    def count(store: JobStore, records: list[JobRecord]) -> None:
        calls.append({record.id for record in records})
        heartbeat(store, records)

    for name in ("open_jobs", "publish", "held_states"):
        call = getattr(JobStore, name)
        monkeypatch.setattr(JobStore, name, lambda *args, call=call: release.wait(60) and call(*args))
    monkeypatch.setattr(JobStore, "heartbeat", count)
    try:
        eventually(lambda: calls.count({video["id"] for video in videos}) >= 2)
    finally:
        release.set()


def test_a_video_that_cannot_be_made_a_file_fails(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: bytes) -> bytes:
        raise OSError("No space left on device")

    monkeypatch.setattr("ardiff.serving.completion.as_file", full)
    served = serve()
    failed = served.wait(served.ask(num_frames=2, num_inference_steps=2), "failed")
    assert failed["error"]["type"] == "internal"
    assert not served.replica.running


def test_a_stopping_replica_finishes_its_jobs(serve: Serve) -> None:
    served = serve(drain_seconds=200.0)
    video = served.ask(**JOB)
    eventually(lambda: served.look(video)["status"] != "queued")
    served.stop()
    assert serve("b").look(video)["status"] == "completed"


def test_a_stopping_replica_returns_unfinished_jobs_to_the_queue(serve: Serve) -> None:
    served = serve(drain_seconds=0.0)
    let = served.hold()
    video = served.ask(**{**JOB, "num_frames": 240})  # too long to be completed while the replica stops
    let(40)
    eventually(lambda: served.look(video)["frames_done"] > 0)
    served.server.should_exit = True
    eventually(lambda: any(job.stop for job in served.replica.running))
    served.stop()
    record = served.record(video)
    assert (record.status, record.crashes) == ("queued", 0)
    assert served.replica.stores.jobs.store.leases() == {}
    assert serve("b").wait(video)["status"] == "completed"


def test_a_replica_whose_host_stops_it_takes_no_job_and_returns_its_own(serve: Serve) -> None:
    """The host waits for open connections first, so the replica itself must end them in time."""
    stopping = threading.Event()
    first = serve("a", stopping=stopping, drain_seconds=1.0, engine={"max_requests": 2})
    with first.client.stream("POST", "/v1/videos:stream", json={**LONG, "num_frames": 1000}) as answer:
        parts = answer.iter_raw()
        next(parts)
        running, waiting = first.ask(**{**LONG, "num_frames": 1000}, seed=1), first.ask(**JOB)
        eventually(lambda: first.look(running)["frames_done"] > 0)
        assert first.look(waiting)["status"] == "queued"
        stopping.set()
        with pytest.raises(httpx.HTTPError):
            for _ in parts:
                pass
    refused = first.client.post("/v1/videos", json=JOB)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    eventually(lambda: not first.replica.running)
    first.poll()
    records = [first.record(video) for video in (running, waiting, {"id": answer.headers["x-video-id"]})]
    assert [(record.status, record.kind, record.crashes) for record in records] == 3 * [("queued", "job", 0)]
    assert records[1].lease == 0
    assert first.replica.stores.jobs.store.leases() == {}
    assert serve("b").wait(waiting)["status"] == "completed"


def test_a_reader_of_another_replicas_video_is_disconnected_after_the_time_for_draining(serve: Serve) -> None:
    stopping = threading.Event()
    reader = serve("a", stopping=stopping, drain_seconds=0.5, engine={"max_requests": 1})
    reader.hold()
    reader.ask(**LONG, seed=0)
    eventually(lambda: reader.replica.running)
    worker = serve("b")
    let = worker.hold()
    video = worker.ask(**LONG, seed=1)
    let(40)
    eventually(lambda: worker.look(video)["frames_done"] > 0)
    assert video["id"] in worker.replica.running
    with reader.client.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
        parts = answer.iter_raw()
        next(parts)
        stopping.set()
        with pytest.raises(httpx.HTTPError):
            for _ in parts:
                pass
    assert worker.look(video)["status"] == "in_progress"
    let(math.inf)
    assert worker.client.post(f"/v1/videos/{video['id']}/cancel").json()["status"] == "cancelled"


def test_an_unmounted_folder(serve: Serve, tmp_path: Path) -> None:
    """Requests are rejected, a running stream continues, and its end is recorded when the folder is there again."""
    shared, real, file = tmp_path / "shared", tmp_path / "real", tmp_path / "file"
    real.mkdir()
    file.write_text("not a folder")

    def point(target: Path) -> None:  # in one step: otherwise a writer could create the folder in between
        draft = shared.with_name("draft")
        draft.symlink_to(target)
        draft.replace(shared)

    point(real)
    served = serve()
    done = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    let = served.hold()
    let(40)
    with served.client.stream("POST", "/v1/videos:stream", json=JOB) as answer:
        parts = answer.iter_raw()
        received = next(parts)
        point(file)
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for refused in (
                client.post("/v1/videos", json={}),
                client.get(f"/v1/videos/{done['id']}"),
                client.get(f"/v1/videos/{done['id']}/content"),
                client.get("/v1/videos"),
            ):
                assert refused.status_code == 503, refused.text
                assert refused.json()["error"]["type"] == "database_unavailable"
                assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/healthz").json()["status"] == "degraded"
            assert client.get("/healthz").status_code == 200
            let(math.inf)
            received += b"".join(parts)
            assert len(frames_of(received)) == JOB["num_frames"]
            running = client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()
            assert running["status"] == "in_progress"  # until its end is written
            point(real)
        assert served.wait({"id": answer.headers["x-video-id"]})["frames_done"] == JOB["num_frames"]
    assert served.look(done)["status"] == "completed"
    assert served.client.get("/healthz").json()["status"] == "ok"


def test_requests_do_not_queue_for_a_database_that_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(storage_seconds=1.5)
    let_go = threading.Event()
    with monkeypatch.context() as outage:
        outage.setattr(JobStore, "create", lambda store, *arguments: let_go.wait(60))
        answers: list[httpx.Response] = []
        ask = partial(httpx.post, f"{served.url}/v1/videos", json={}, timeout=60)
        threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(8)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            let_go.set()
    assert {(a.status_code, a.json()["error"]["type"]) for a in answers} == {(503, "database_unavailable")}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers)
    assert max(a.elapsed.total_seconds() for a in answers) < 9.0  # one after another they would take twelve
    eventually(lambda: served.client.get("/healthz").json()["database"] == "ok")
    served.wait(served.ask(num_frames=2, num_inference_steps=2))


def test_the_jobs_of_a_removed_model_fail_together(
    serve: Serve, make_pipeline: Callable[..., ARDiffusionPipeline]
) -> None:
    first = serve(pipelines={"old": make_pipeline()})
    videos = [first.ask(**LONG) for _ in range(3)]
    first.stop()
    second = serve("b", job_seconds=1.0)
    assert second.wait(videos[0], "failed")["error"]["type"] == "no_model"
    assert second.replica.stores.jobs.store.open_jobs() == []  # none waits for its own job_seconds
    for video in videos[1:]:
        assert second.wait(video, "failed")["error"]["type"] == "no_model"


def test_an_outage_of_postgresql(
    postgres: PostgresServer, make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path
) -> None:
    """Requests are rejected; streams and jobs continue, no job changes hands, and their ends are recorded later."""
    with serving(make_pipeline, tmp_path) as start:
        settings = postgres.new_database() | {"storage_seconds": 5.0}
        first, second = start("a", **settings), start("b", **settings, lease_seconds=SHORT_LEASE)
        lets = [first.hold(), second.hold()]
        job = first.ask(**JOB)
        eventually(lambda: any(job["id"] in served.replica.running for served in (first, second)))
        (holder,) = [served for served in (first, second) if job["id"] in served.replica.running]
        both = len(first.replica.running) + 1

        def let_some() -> None:
            """Not before the stream is there: the job alone would use them up."""
            eventually(lambda: len(first.replica.running) == both)
            for let in lets:
                let(40)

        threading.Thread(target=let_some, daemon=True).start()
        with first.client.stream("POST", "/v1/videos:stream", json=JOB) as answer:
            parts = answer.iter_raw()
            received = next(parts)
            postgres.stop()
            try:
                refused = httpx.post(f"{second.url}/v1/videos", json=JOB, timeout=60)
                assert (refused.status_code, refused.json()["error"]["type"]) == (503, "database_unavailable")
                assert int(refused.headers["retry-after"]) >= 1
                eventually(lambda: httpx.get(f"{second.url}/healthz").json()["database"] == "unavailable")
                for let in lets:
                    let(math.inf)
                received += b"".join(parts)
                assert len(frames_of(received)) == JOB["num_frames"]
                eventually(lambda: holder.replica.finisher.busy)
                time.sleep(2 * SHORT_LEASE)
            finally:
                postgres.start()
        stream = {"id": answer.headers["x-video-id"]}
        for video in (job, stream):
            eventually(lambda: second.client.get(f"/v1/videos/{video['id']}").status_code == 200)  # noqa: B023
            assert second.wait(video)["frames_sha256"] == sha256(first.pipeline(class_label=None, **JOB).frames[0])
            assert (second.record(video).lease, second.record(video).crashes) == (1, 0)
        assert len(second.client.get("/v1/videos").json()["data"]) == 2
        second.wait(second.ask(**JOB))


def test_an_outage_of_storage_alone(serve: Serve, tmp_path: Path) -> None:
    """Jobs are accepted and run; their ends are recorded when their videos are stored."""
    served = serve(database=str(tmp_path / "jobs.sqlite"))
    done = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    (tmp_path / "shared").rename(tmp_path / "away")
    (tmp_path / "shared").write_text("not a folder")
    video = served.ask(**JOB)
    refused = served.client.get(f"/v1/videos/{done['id']}/content")
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "storage_unavailable")
    eventually(lambda: served.replica.finisher.busy)
    assert served.look(video)["status"] == "in_progress"
    assert served.client.get("/healthz").json()["database"] == "ok"
    (tmp_path / "shared").unlink()
    (tmp_path / "away").rename(tmp_path / "shared")
    served.wait(video)
    assert len(frames_of(served.client.get(f"/v1/videos/{video['id']}/content").content)) == JOB["num_frames"]


@pytest.mark.slow
def test_a_service_on_s3_survives_an_outage(serve: Serve, tmp_path: Path) -> None:
    impatient = StorageConfig(retry_seconds=0.0, timeout=10.0).environment()  # as a replica is
    with S3Server() as server, environment(server.environment() | impatient):
        settings = {"storage": f"s3://{server.make_bucket()}/serve", "database": str(tmp_path / "jobs.sqlite")}
        settings |= {"heartbeat_seconds": 1.0, "lease_seconds": 20.0}
        first = serve("a", **settings)
        done = first.wait(first.ask(**JOB))
        other = serve("b", **settings)
        assert other.look(done)["frames_sha256"] == done["frames_sha256"]
        assert len(frames_of(other.client.get(f"/v1/videos/{done['id']}/content").content)) == JOB["num_frames"]
        server.stop()
        refused = other.client.get(f"/v1/videos/{done['id']}/content")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "storage_unavailable")
        video = other.ask(**JOB)
        server.start()
        assert other.wait(video)["frames_sha256"] == done["frames_sha256"]


def test_an_unreadable_record_does_not_stop_the_service(serve: Serve) -> None:
    served = serve()
    bad = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    damaged = {"record": "{", "status": "queued", "ended_at": None}
    with served.replica.stores.jobs.store.database.transaction() as connection:
        connection.execute(update(jobs).where(jobs.c.id == bad["id"]).values(damaged))
    served.wait(served.ask(num_frames=2, num_inference_steps=2))
    assert served.client.get(f"/v1/videos/{bad['id']}").status_code == 404
    assert served.replica.healthy


class Poisoned(SamplingEngine):
    """An engine that runs out of memory in its fifth iteration, and in all further ones, with the job of seed 13."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.poisoned, self.steps = set[int](), 0

    def submit(self, request: SampleRequest) -> int:
        request_id = super().submit(request)
        if request.params.seed == 13:
            self.poisoned.add(request_id)
        return request_id

    def step(self) -> Any:
        self.steps += 1
        if self.poisoned & self.iterations.keys() and self.steps > 4:
            raise torch.OutOfMemoryError("out of memory")
        return super().step()


def test_out_of_memory_fails_one_job_and_no_other(
    serve: Serve, make_pipeline: Callable[..., ARDiffusionPipeline]
) -> None:
    class Pipeline(ARDiffusionPipeline):
        def engine(self, config: Any = None) -> SamplingEngine:
            return Poisoned(self.dit, self.diffusion, config or self.engine_config)

    plain = make_pipeline()
    pipeline = Pipeline(plain.vae, plain.dit, plain.diffusion, plain.statistics, plain.class_names)
    served = serve(pipelines={"tiny": pipeline})
    fields = {"num_frames": 30, "num_inference_steps": 20, "ar_step": 10}
    good = [served.ask(seed=seed, **fields) for seed in range(3)]
    bad = served.ask(seed=13, **fields)
    good += [served.ask(seed=seed, **fields) for seed in range(3, 6)]
    failed = served.wait(bad, "failed")
    assert failed["error"]["type"] == "out_of_memory"
    for seed, video in enumerate(good):
        served.wait(video)
        content = served.client.get(f"/v1/videos/{video['id']}/content").content
        assert frames_of(content).shape[0] == 30
        alone = plain(seed=seed, **fields).frames[0]
        assert served.look(video)["frames_sha256"] is not None
        assert abs(frames_of(content).mean() - alone.float().mean()) < 4
    assert served.replica.healthy


def test_values_that_are_not_finite_fail_one_job(
    serve: Serve, make_pipeline: Callable[..., ARDiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    engine = served.replica.models["tiny"].engine
    step, submit, poisoned = engine.step, engine.submit, set[int]()

    def remember(request: SampleRequest) -> int:
        request_id = submit(request)
        if request.params.seed == 13:
            poisoned.add(request_id)
        return request_id

    def poison() -> Any:
        finished = step()
        for frames in finished:
            if frames.request_id in poisoned:
                frames.latents.fill_(float("nan"))
        return finished

    monkeypatch.setattr(engine, "submit", remember)
    monkeypatch.setattr(engine, "step", poison)
    fields = {"num_frames": 10, "num_inference_steps": 10, "ar_step": 5}
    bad, good = served.ask(seed=13, **fields), served.ask(seed=1, **fields)
    assert served.wait(bad, "failed")["error"]["type"] == "not_finite"
    served.wait(good)
