"""PATCH /v1/videos/ID: class, prompt and guidance change while a video is generated, on whichever replica."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from toy_text import ToyEncoder

from ardiff.cli import main
from ardiff.client import Client
from ardiff.errors import DataError
from ardiff.pipeline import ARDiffusionPipeline

from .conftest import JOB, LONG, SHORT_LEASE, Serve, Served, eventually
from .test_api import sha256
from .test_outlive import HALF, undisturbed

GUIDED: dict[str, Any] = {"class_label": 0, "guidance_scale": 2.0}
NEXT = 19
"""The first frame of JOB that has not started after HALF + 1 iterations."""


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def change(served: Served, video: dict[str, Any], **values: Any) -> httpx.Response:
    return served.client.patch(f"/v1/videos/{video['id']}", json=values)


def request_change(
    served: Served,
    threads: ThreadPoolExecutor,
    video: dict[str, Any],
    through: Served | None = None,
    **values: Any,
) -> "Future[httpx.Response]":
    """Returns when the replica that runs a video knows of a change, which it cannot apply while it is held."""
    assert served.held.wait(240)
    job = served.replica.running.get(video["id"])
    assert job is not None
    count = len(job.record.changes)
    answer = threads.submit(change, through or served, video, **values)
    eventually(lambda: len(job.record.changes) > count)
    return answer


def from_frame(answer: "Future[httpx.Response]") -> int:
    """The frame from which a change is applied."""
    assert answer.result().status_code == 200, answer.result().text
    assert answer.result().json()["status"] == "applied"
    return int(answer.result().json()["from_frame"])


def test_changes_act_from_the_first_frame_that_has_not_started(serve: Serve, threads: ThreadPoolExecutor) -> None:
    served = serve()
    let = served.hold()
    video = served.ask(**JOB, **GUIDED)
    let(HALF)
    first = request_change(served, threads, video, class_label="ring")
    second = request_change(served, threads, video, guidance_scale=3.0, prompt="square")
    assert [c["status"] for c in served.look(video)["changes"]] == ["pending", "pending"]
    let(1)
    assert (from_frame(first), from_frame(second)) == (NEXT, NEXT)
    let(4)
    third = request_change(served, threads, video, class_label=1)
    let(1)
    assert from_frame(third) == NEXT + 1
    let(math.inf)
    done = served.wait(video)
    assert [c["from_frame"] for c in done["changes"]] == [NEXT, NEXT, NEXT + 1]
    conditions = [(NEXT, {"class_label": 2, "guidance_scale": 3.0}), (NEXT + 1, {"class_label": 1})]
    assert [(c["frame"], c["class_label"]) for c in done["conditions"]] == [(NEXT, 2), (NEXT + 1, 1)]
    expected = served.pipeline(**JOB, **GUIDED, conditions=conditions).frames[0]
    plain = served.pipeline(**JOB, **GUIDED, mode="full", conditions=conditions).frames[0]  # without any cache
    unchanged = served.pipeline(**JOB, **GUIDED).frames[0]
    assert done["frames_sha256"] == sha256(expected)
    assert np.abs(expected.numpy().astype(int) - plain.numpy().astype(int)).max() <= 1
    assert (expected[:NEXT] == unchanged[:NEXT]).all()
    assert (expected[NEXT:] != unchanged[NEXT:]).flatten(1).any(dim=1).all()
    again = {name: done[name] for name in (*JOB, *GUIDED, "conditions")}
    assert served.wait(served.ask(**again))["frames_sha256"] == done["frames_sha256"]


def test_a_change_reaches_a_stream_through_another_replica(serve: Serve, threads: ThreadPoolExecutor) -> None:
    served, other = serve("a"), serve("b")
    let = served.hold()
    let(HALF)
    with served.client.stream("POST", "/v1/videos:stream", json={**JOB, "class_label": 0}) as answer:
        video = {"id": answer.headers["x-video-id"]}
        parts = answer.iter_raw()
        received = [next(parts)]
        requested = request_change(served, threads, video, through=other, class_label=2)
        let(1)
        assert from_frame(requested) == NEXT
        let(math.inf)
        received += parts
    conditions = [{"frame": NEXT, "class_label": 2}]
    assert b"".join(received) == undisturbed(other, class_label=0, conditions=conditions)
    assert b"".join(received) != undisturbed(other, class_label=0)


@pytest.mark.parametrize("applied", [True, False])
def test_a_change_outlives_its_replica(serve_on_each: Serve, threads: ThreadPoolExecutor, applied: bool) -> None:
    first = serve_on_each("a")
    let = first.hold()
    video = first.ask(**JOB, class_label=0)
    let(HALF)
    eventually(lambda: first.look(video)["frames_done"] >= 14)
    requested = request_change(first, threads, video, class_label=1)
    if applied:
        let(1)
        assert from_frame(requested) == NEXT
        let(8)  # two frames have started with it, and none of them is final
        assert first.held.wait(240)
    first.crash()
    second = serve_on_each("b", lease_seconds=SHORT_LEASE)
    done = second.wait(video)
    (stored,) = done["changes"]
    assert (stored["status"], second.record(video).begun) == ("applied", 1)
    assert stored["from_frame"] == NEXT if applied else 14 <= stored["from_frame"] <= NEXT
    expected = second.pipeline(**JOB, class_label=0, conditions=[(stored["from_frame"], {"class_label": 1})])
    assert done["frames_sha256"] == sha256(expected.frames[0])


def test_a_change_that_cannot_be_stored_waits(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    let = served.hold()
    video = served.ask(**JOB, class_label=0)
    let(HALF)
    store, failed = served.replica.stores.jobs.store, list[str]()
    publish = store.publish

    def fail(record: Any, segment: Any) -> bool:
        if record.change_frames and len(failed) < 2:
            failed.append(record.id)
            raise DataError("the disk is full")
        return publish(record, segment)

    monkeypatch.setattr(store, "publish", fail)
    with ThreadPoolExecutor(1) as threads:
        requested = request_change(served, threads, video, class_label=1)
        while not requested.done():
            let(1)
            assert served.held.wait(240)
            served.poll()  # a change that could not be stored is due again
        frame = from_frame(requested)
    assert len(failed) == 2
    assert frame >= NEXT
    let(math.inf)
    expected = served.pipeline(**JOB, class_label=0, conditions=[(frame, {"class_label": 1})]).frames[0]
    assert served.wait(video)["frames_sha256"] == sha256(expected)


def test_a_queued_video_changes_from_its_first_frame(serve: Serve) -> None:
    served = serve(engine={"max_requests": 1})
    let = served.hold()
    running = served.ask(**LONG)
    eventually(lambda: served.look(running)["status"] == "in_progress")
    video = served.ask(**JOB, class_label=0)
    assert change(served, video, class_label="ring").json()["status"] == "pending"
    let(math.inf)
    served.client.post(f"/v1/videos/{running['id']}/cancel")
    done = served.wait(video)
    assert done["changes"] == [
        {
            "object": "video.change",
            "status": "applied",
            "from_frame": 0,
            "class_label": 1,
            "prompt": None,
            "guidance_scale": None,
        }
    ]
    assert done["frames_sha256"] == sha256(served.pipeline(**JOB, class_label=1).frames[0])


def test_a_change_that_comes_too_late_is_shown(serve: Serve, threads: ThreadPoolExecutor) -> None:
    served = serve()
    let = served.hold()
    settings = {"num_frames": 4, "num_inference_steps": 20, "ar_step": 0, "seed": 4, "class_label": 0}
    video = served.ask(**settings)
    let(5)
    requested = request_change(served, threads, video, class_label=1)
    let(1)
    assert requested.result().json()["status"] == "not_applied"
    let(math.inf)
    done = served.wait(video)
    assert [(c["status"], c["from_frame"]) for c in done["changes"]] == [("not_applied", None)]
    assert done["frames_sha256"] == sha256(served.pipeline(**settings).frames[0])
    refused = change(served, video, class_label=1)
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "completed")
    assert change(served, {"id": "video_" + "0" * 32}, class_label=1).status_code == 404


def test_bad_changes_are_rejected(serve: Serve) -> None:
    served = serve(limits={"changes": 2})
    served.hold()
    video = served.ask(**LONG)
    path = f"/v1/videos/{video['id']}"
    for values, param, reason in [
        ({}, None, "at least one of prompt, class_label, guidance_scale"),
        ({"class_label": None}, None, "at least one of"),
        ({"num_frames": 500}, "num_frames", "not permitted"),
        ({"seed": 1, "class_label": 1}, "seed", "not permitted"),
        ({"class_label": 3}, "class_label", "the model has classes 0..2 (disc, ring, square)"),
        ({"class_label": "car"}, "class_label", "There is no class 'car'"),
        ({"prompt": "a red ring"}, "prompt", "takes no text"),
        ({"prompt": "ring", "class_label": 1}, "prompt", "not both"),
        ({"class_label": [1]}, "class_label", "valid"),
        ({"guidance_scale": -1.0}, "guidance_scale", "at least 0"),
        ({"guidance_scale": 1e308}, "guidance_scale", "at most 20"),
        ({"guidance_scale": 3.0}, "guidance_scale", "Guidance is off in this video"),
        ({"__proto__": {}}, "__proto__", "not permitted"),
        ([], None, ""),
        ([[]] * 1000, None, ""),
    ]:
        answer = served.client.patch(path, json=values)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, param), error
        assert reason in error["message"]
    for body in (b"", b"\x00" * 100, b'{"guidance_scale": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000):
        answer = served.client.patch(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    assert served.client.patch(path, content=b"class_label=1").status_code == 415
    assert served.look(video)["changes"] == []
    store, record = served.replica.stores.jobs.store, served.record(video)
    for _ in range(2):
        store.add_change(record.owner, record.id, {"class_label": 1}, lambda record: None)
    refused = change(served, video, class_label=1)
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        422,
        "The video has 2 changes already, and 2 are allowed.",
    )


def test_a_prompt_changes(
    make_pipeline: Callable[..., ARDiffusionPipeline], serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make_pipeline(condition="cross_attention", condition_dim=5, text_encoder=ToyEncoder())
    served = serve(pipelines={"text": pipeline}, limits={"texts": 3}, engine={"long_prompts": "error"})
    let = served.hold()
    video = served.ask(**JOB, prompt="a red ring")
    let(40)
    assert served.held.wait(240)
    with ThreadPoolExecutor(2) as threads:
        job, client = served.replica.running.get(video["id"]), Client(served.url)
        assert job is not None
        requested = threads.submit(client.change, video["id"], prompt="a blue disc")
        eventually(lambda: job.record.changes)
        let(4)
        first = requested.result()["from_frame"]
        command = ["client", "--url", served.url, "change", video["id"], "--prompt", "", "--class-label", "ring"]
        called = threads.submit(main, command)
        eventually(lambda: len(job.record.changes) == 2 and served.held.is_set())
        let(4)
        assert called.result() == 0
    second = json.loads(capsys.readouterr().out)["from_frame"]
    assert second > first > 0
    for prompt, reason in [
        ("one two three four five six seven eight nine", "more than the 8 tokens"),
        ("a" * 20_000, "at most 10000 characters"),
    ]:
        answer = change(served, video, prompt=prompt)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "prompt")
        assert reason in answer.json()["error"]["message"]
    with ThreadPoolExecutor(1) as threads:
        requested_last = request_change(served, threads, video, prompt="a plus")
        assert "4 texts: at most 3" in change(served, video, prompt="a star").json()["error"]["message"]
        let(math.inf)
        third = from_frame(requested_last)
    conditions = [(first, "a blue disc"), (second, {"prompt": "", "class_label": 1}), (third, "a plus")]
    expected = pipeline(**JOB, prompt="a red ring", conditions=conditions).frames[0]
    assert served.wait(video)["frames_sha256"] == sha256(expected)
