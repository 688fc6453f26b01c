"""Jobs and streams that outlive their replica: another one continues them after the last published frame."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import update

from ardiff.client import Client
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.params import SamplingParams
from ardiff.serving.database import segments

from .conftest import JOB, SHORT_LEASE, Proxy, Serve, Served, eventually
from .test_api import frames_of, sha256

HALF = 72
"""Iterations after which 14 of the 24 frames of JOB are final."""


def run_half(served: Served, **changes: Any) -> dict[str, Any]:
    """Requests a video, and runs it until half of it is published. Then nothing moves."""
    let = served.hold()
    video = served.ask(**JOB, **changes)
    let(HALF)
    eventually(lambda: served.look(video)["frames_done"] >= 14)
    return video


def evaluations(served: Served) -> int:
    """Frame evaluations of the present engine of a replica."""
    return served.replica.models["tiny"].engine.frame_evaluations


def all_evaluations(served: Served, video: dict[str, Any]) -> int:
    return frame_evaluations(SamplingParams.from_dict(served.record(video).params), 8)


def undisturbed(served: Served, **changes: Any) -> bytes:
    """The stream of the same video without any fault."""
    answer = served.client.post("/v1/videos:stream", json={**JOB, **changes})
    assert answer.status_code == 200
    return answer.content


def test_another_replica_continues_the_job_of_a_crashed_one(serve_on_each: Serve) -> None:
    first = serve_on_each("a")
    video = run_half(first)
    first.crash()
    second = serve_on_each("b", lease_seconds=SHORT_LEASE)
    done = second.wait(video)
    assert done["frames_sha256"] == sha256(second.pipeline(class_label=None, **JOB).frames[0])
    record = second.record(video)
    assert (record.crashes, record.begun) == (1, 1)
    assert evaluations(second) < 0.7 * all_evaluations(second, video)
    content = second.client.get(f"/v1/videos/{video['id']}/content").content
    assert len(frames_of(content)) == JOB["num_frames"]
    assert 'ardiff_frames_total{model="tiny"} 10.0' in second.client.get("/metrics").text


@pytest.mark.parametrize("settings", [{"codec": "vp9"}, {"codec": "av1"}])
def test_the_stream_of_each_codec_is_continued(serve: Serve, settings: dict[str, Any]) -> None:
    first = serve("a", **settings)
    video = run_half(first)
    first.crash()
    second = serve("b", lease_seconds=SHORT_LEASE, **settings)
    assert len(frames_of(second.client.get(f"/v1/videos/{video['id']}/stream").content)) == JOB["num_frames"]
    second.wait(video)
    assert second.record(video).begun == 1


def test_a_reader_elsewhere_gets_every_fragment_once(serve: Serve) -> None:
    reader = serve("reader", lease_seconds=SHORT_LEASE, engine={"max_requests": 1})
    reader.hold()
    reader.ask(**JOB)  # it takes no other job
    eventually(lambda: reader.replica.running)
    first = serve("a")
    video = run_half(first)
    with reader.client.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
        parts = answer.iter_raw()
        received = [next(parts)]
        first.crash()
        second = serve("b", lease_seconds=SHORT_LEASE)
        received += parts
    assert second.record(video).begun == 1
    assert b"".join(received) == undisturbed(second)


def test_a_client_continues_the_stream_of_a_crashed_replica(serve: Serve, proxy: Callable[[str], Proxy]) -> None:
    first, second = serve("a"), serve("b", lease_seconds=SHORT_LEASE)
    expected = undisturbed(second)
    through, let = proxy(first.url), first.hold()
    let(HALF)
    stream = Client(through.url).stream(**JOB)
    received = [next(stream)]
    (job,) = first.replica.running
    eventually(lambda: second.replica.stores.jobs.store.read_stream(job.record, 0))
    first.crash()
    through.point(second.url)
    received += stream
    assert b"".join(received) == expected
    record = second.record({"id": job.record.id})
    assert (record.kind, record.begun, record.crashes) == ("job", 1, 1)


def test_a_client_that_leaves_a_continued_stream_cancels_it(serve: Serve, proxy: Callable[[str], Proxy]) -> None:
    served = serve()
    through, let = proxy(served.url), served.hold()
    let(HALF)
    client = Client(through.url)
    stream = client.stream(**{**JOB, "num_frames": 400})
    next(stream)
    (job,) = served.replica.running
    other = serve("b", lease_seconds=SHORT_LEASE)
    eventually(lambda: other.replica.stores.jobs.store.read_stream(job.record, 0))
    served.crash()
    through.point(other.url)
    for _ in stream:
        if other.replica.running:
            break
    stream.close()
    assert other.look({"id": job.record.id})["status"] == "cancelled"


def test_a_stopped_replica_hands_on_its_jobs_and_streams(serve: Serve) -> None:
    first = serve("a", drain_seconds=0.0)
    video = run_half(first)
    first.stop()
    second = serve("b")
    done = second.wait(video)
    assert done["frames_sha256"] == sha256(second.pipeline(class_label=None, **JOB).frames[0])
    assert (second.record(video).begun, second.record(video).crashes) == (1, 0)
    assert evaluations(second) < 0.7 * all_evaluations(second, video)


def test_a_video_of_another_pipeline_begins_again(
    serve: Serve, make_pipeline: Callable[..., ARDiffusionPipeline]
) -> None:
    first = serve("a")
    video = run_half(first)
    begun = first.client.get(f"/v1/videos/{video['id']}").json()["frames_done"]
    assert begun >= 14
    first.crash()
    second = serve("b", pipelines={"tiny": make_pipeline(seed=7)}, lease_seconds=SHORT_LEASE)
    done = second.wait(video)
    assert second.record(video).begun > 1
    assert done["frames_sha256"] == sha256(second.pipeline(class_label=None, **JOB).frames[0])
    path = f"/v1/videos/{video['id']}/stream?offset=10"
    refused = second.client.get(path, headers={"If-Match": '"1"'})
    assert (refused.status_code, refused.json()["error"]["type"]) == (412, "restarted")
    assert second.client.get(path, headers={"If-Match": '"x"'}).status_code == 412


def test_a_reader_past_the_end_of_the_new_video_learns_that_it_began_again(
    serve: Serve, make_pipeline: Callable[..., ARDiffusionPipeline]
) -> None:
    first = serve("a")
    video = run_half(first)
    first.crash()
    second = serve("b", pipelines={"tiny": make_pipeline(seed=7)}, lease_seconds=SHORT_LEASE)
    let = second.hold()
    eventually(lambda: second.replica.running)
    with ThreadPoolExecutor(1) as thread:
        path = f"/v1/videos/{video['id']}/stream?offset=10000000"
        answer = thread.submit(second.client.get, path, headers={"If-Match": '"1"'})
        eventually(lambda: second.replica.streams.num_open["anonymous"] == 1)
        let(math.inf)
        assert (answer.result().status_code, answer.result().json()["error"]["type"]) == (412, "restarted")


@pytest.mark.parametrize("damage", [{"state": b"damaged"}, {"latents": b""}, {"data": b"other"}])
def test_a_video_whose_state_is_damaged_begins_again(serve: Serve, damage: dict[str, bytes]) -> None:
    first = serve("a")
    video = run_half(first)
    first.crash()
    with first.replica.stores.jobs.store.database.transaction() as connection:
        connection.execute(update(segments).values(damage))
    second = serve("b", lease_seconds=SHORT_LEASE)
    done = second.wait(video)
    assert second.record(video).begun > 1
    assert done["frames_sha256"] == sha256(second.pipeline(class_label=None, **JOB).frames[0])


def test_a_stream_is_read_from_a_position(serve: Serve) -> None:
    served = serve()
    let = served.hold()
    let(HALF)
    video = served.ask(**JOB)
    with served.client.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
        tag = {"If-Match": answer.headers["etag"]}
        parts = answer.iter_raw()
        whole = [next(parts)]
        rest = served.client.stream("GET", f"/v1/videos/{video['id']}/stream?offset=100", headers=tag)
        with rest as continued:
            let(math.inf)
            assert continued.status_code == 200
            whole += parts
            assert b"".join(whole)[100:] == continued.read()
    served.wait(video)
    path = f"/v1/videos/{video['id']}/stream?offset={len(b''.join(whole))}"
    complete = served.client.get(path, headers=tag)  # the connection broke after the last byte
    assert (complete.status_code, complete.content) == (200, b"")
    stored = served.client.get(f"/v1/videos/{video['id']}/stream?offset=100", headers=tag)
    assert stored.content == b"".join(whole)[100:]  # of a video that has ended, for a minute
    served.age(100)
    gone = served.client.get(f"/v1/videos/{video['id']}/stream?offset=100", headers=tag)
    assert (gone.status_code, gone.json()["error"]["type"]) == (410, "gone")
