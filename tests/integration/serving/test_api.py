"""The HTTP API on a real server: jobs, streams, uploads, rejections. Frames are those of the pipeline."""

import contextlib
import gzip
import hashlib
import io
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import delete

from ardiff.config import build
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.diffusion.student import Student
from ardiff.errors import ConfigError
from ardiff.resolution import Resolution
from ardiff.serving.config import ServiceConfig
from ardiff.serving.database import segments
from ardiff.serving.files import JobFiles
from ardiff.serving.keys import digest
from ardiff.serving.store import JobStore

from .conftest import JOB, LONG, Serve, Served, eventually, serving


def frames_of(data: bytes) -> np.ndarray:
    """All frames, uint8 ``(F, H, W, 3)``."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sha256(video: torch.Tensor) -> str:
    return hashlib.sha256(video.numpy().tobytes()).hexdigest()


def test_a_job_gives_the_frames_of_the_pipeline(serve: Serve) -> None:
    served = serve()
    settings: dict[str, Any] = {"num_frames": 20, "ar_step": 3, "num_inference_steps": 8, "guidance_scale": 1.5}
    video = served.ask(class_label="ring", seed=7, **settings)
    assert video["status"] == "queued"
    assert video["iterations"] == 8 + 19 * 3
    done = served.wait(video)
    expected = served.pipeline(class_label=1, seed=7, **settings).frames[0]
    assert done["frames_sha256"] == sha256(expected)
    assert (done["progress"], done["frames_done"], done["iterations_done"]) == (100, 20, done["iterations"])
    times = [done[name] for name in ("created_at", "started_at", "first_frame_at", "completed_at", "expires_at")]
    assert times == sorted(times)
    assert all(isinstance(when, int) for when in times)
    assert 0 < done["first_frame_seconds"] <= done["completed_seconds"]
    content = served.client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert len(content.content) == done["bytes"]
    decoded = frames_of(content.content)
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected.numpy()).mean() < 30  # 4:2:0 and noise-like pictures


def test_batched_with_others_a_video_has_the_same_frames(serve: Serve) -> None:
    served = serve()
    asked = [{"class_label": i % 3, "seed": i, "num_frames": 6 + i, "num_inference_steps": 6 + i} for i in range(6)]
    jobs = [served.ask(**fields) for fields in asked]
    for fields, job in zip(asked, jobs, strict=True):
        done = served.wait(job)
        alone = served.pipeline(**fields, ar_step=done["ar_step"]).frames[0].numpy()
        decoded = frames_of(served.client.get(f"/v1/videos/{job['id']}/content").content)
        assert decoded.shape == alone.shape
        reference = frames_of(encode_video(alone, 8.0))
        assert np.abs(decoded.astype(int) - reference).mean() < 8


def test_batched_streams_have_the_frames_of_the_pipeline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    runner, packed = served.replica.models["tiny"], []
    step = runner.engine.step

    def together() -> Any:
        if not packed:
            eventually(lambda: runner.num_jobs == 5)
        packed.append(len(runner.engine.iterations))
        return step()

    monkeypatch.setattr(runner.engine, "step", together)
    settings: list[dict[str, Any]] = [
        {"class_label": 0, "num_frames": 12, "num_inference_steps": 6, "ar_step": 2, "seed": 1},
        {"class_label": 1, "num_frames": 30, "num_inference_steps": 9, "ar_step": 3, "seed": 2, "guidance_scale": 2.5},
        {"class_label": None, "num_frames": 5, "num_inference_steps": 20, "ar_step": 0, "seed": 3},
        {"class_label": 2, "num_frames": 7, "num_inference_steps": 5, "ar_step": 5, "seed": 4, "guidance_scale": 4.0},
        {"class_label": 1, "num_frames": 1, "num_inference_steps": 14, "ar_step": 1, "seed": 5},
    ]
    answers: dict[int, httpx.Response] = {}

    def ask(index: int) -> None:
        answers[index] = httpx.post(f"{served.url}/v1/videos:stream", json=settings[index], timeout=60)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(packed) >= 4
    for index, fields in enumerate(settings):
        assert len(frames_of(answers[index].content)) == fields["num_frames"]
        done = served.wait({"id": answers[index].headers["x-video-id"]})
        assert done["frames_sha256"] == sha256(served.pipeline(**fields).frames[0])


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_a_stream_can_be_decoded_and_its_record_is_kept(serve: Serve, codec: str) -> None:
    served = serve(codec=codec)
    fields = {"num_frames": 12, "num_inference_steps": 5, "ar_step": 2, "seed": 1}
    answer = served.client.post("/v1/videos:stream", json=fields)
    assert answer.status_code == 200
    kind = "video/webm" if codec == "vp9" else "video/mp4"
    assert answer.headers["content-type"].startswith(f"{kind}; codecs=")
    assert frames_of(answer.content).shape == (12, 16, 16, 3)
    done = served.wait({"id": answer.headers["x-video-id"]})
    assert done["frames_sha256"] == sha256(served.pipeline(class_label=None, **fields).frames[0])
    content = served.client.get(f"/v1/videos/{done['id']}/content")
    assert content.headers["content-type"] == kind
    assert len(frames_of(content.content)) == 12


def test_frames_are_sent_while_others_are_still_generated(serve: Serve) -> None:
    served = serve()
    with served.client.stream("POST", "/v1/videos:stream", json=LONG) as answer:
        parts = answer.iter_raw()
        received = b"".join(next(parts) for _ in range(3))
        video = {"id": answer.headers["x-video-id"]}
        eventually(lambda: served.look(video)["frames_done"])
        running = served.look(video)
        assert running["status"] == "in_progress"
        assert running["frames_done"] < 400
        assert 0 < running["iterations_done"] < running["iterations"]
        assert b"moof" in received


def test_the_first_frame_is_sent_after_as_many_iterations_as_it_has_steps(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    engine, calls, go_on = served.replica.models["tiny"].engine, iter(range(10**6)), threading.Event()
    step = engine.step

    def held() -> Any:
        if next(calls) == 12:
            assert go_on.wait(60)
        return step()

    monkeypatch.setattr(engine, "step", held)
    fields = {"num_frames": 8, "num_inference_steps": 12, "ar_step": 5}
    with served.client.stream("POST", "/v1/videos:stream", json=fields) as answer:
        parts = answer.iter_raw()
        received = next(parts)
        assert len(frames_of(received)) == 1
        eventually(lambda: served.look({"id": answer.headers["x-video-id"]})["frames_done"])
        running = served.look({"id": answer.headers["x-video-id"]})
        assert (running["frames_done"], running["iterations_done"]) == (1, 12)
        assert running["first_frame_at"] is not None
        go_on.set()
        received += b"".join(parts)
    assert len(frames_of(received)) == 8


def test_a_client_that_disconnects_cancels_its_stream(serve: Serve) -> None:
    served = serve()
    with served.client.stream("POST", "/v1/videos:stream", json=LONG) as answer:
        next(answer.iter_raw())
        video = {"id": answer.headers["x-video-id"]}
    done = served.wait(video, "cancelled")
    assert not served.replica.models["tiny"].busy
    assert not served.replica.models["tiny"].engine.busy
    assert done["frames_done"] < 400


def test_a_client_that_disconnects_before_the_first_frame_cancels_its_stream(serve: Serve) -> None:
    served = serve()
    let = served.hold()
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/v1/videos:stream", json=LONG, timeout=0.15)
    eventually(lambda: any(job.stop for job in served.replica.running))
    let(math.inf)
    [video] = served.client.get("/v1/videos").json()["data"]
    assert served.wait(video, "cancelled")["frames_done"] == 0


def test_a_job_is_cancelled_before_the_next_iteration_and_deleted(serve: Serve) -> None:
    served = serve()
    video = served.ask(**LONG)
    other = served.ask(num_frames=8, num_inference_steps=10)
    while served.look(video)["frames_done"] == 0:
        time.sleep(0.02)
    for _ in range(2):  # a repeated request changes nothing
        cancelled = served.client.post(f"/v1/videos/{video['id']}/cancel").json()
        assert cancelled["status"] == "cancelled"
        assert cancelled["frames_done"] < 400
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 409
    assert served.client.get(f"/v1/videos/{video['id']}/stream").status_code == 409
    served.wait(other)  # which ran beside it
    running = served.ask(**LONG)
    for removed in (video, video, running):
        answer = served.client.delete(f"/v1/videos/{removed['id']}")
        assert answer.json() == {"id": removed["id"], "object": "video.deleted", "deleted": True}
        assert served.client.get(f"/v1/videos/{removed['id']}").status_code == 404
    assert served.client.delete("/v1/videos/video_x").status_code == 404
    assert not served.replica.models["tiny"].busy


def test_readers_of_a_job_may_connect_late_and_disconnect(serve: Serve) -> None:
    served = serve()
    let = served.hold()
    video = served.ask(**JOB)
    let(40)
    path = f"/v1/videos/{video['id']}/stream"
    with served.client.stream("GET", path) as answer:
        next(answer.iter_raw())
    assert served.look(video)["status"] == "in_progress"
    let(math.inf)
    late = served.client.get(path)
    assert len(frames_of(late.content)) == 24
    served.wait(video)
    again = served.client.get(path).content
    assert len(frames_of(again)) == 24
    assert again.count(b"moof") > 1  # fragments, as in a stream


def test_a_picture_and_a_clip_are_continued(serve: Serve) -> None:
    served = serve()
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    fields: dict[str, Any] = {"num_frames": 8, "num_inference_steps": 5, "ar_step": 2, "seed": 2}
    files = {"input_reference": ("x.png", buffer.getvalue(), "image/png")}
    answer = served.client.post("/v1/videos", data={**fields, "class_label": "ring"}, files=files)
    assert answer.status_code == 202, answer.text
    assert answer.json()["given_frames"] == 1
    done = served.wait(answer.json())
    expected = served.pipeline(class_label=1, condition=torch.from_numpy(picture)[None], **fields).frames[0]
    assert done["frames_sha256"] == sha256(expected)
    clip = encode_video(np.random.default_rng(0).integers(0, 255, (3, 24, 32, 3), np.uint8), 8)
    files = {"input_reference": ("../../etc/x.mp4", clip, "video/mp4")}
    streamed = served.client.post("/v1/videos:stream", data=fields, files=files)
    assert len(frames_of(streamed.content)) == 8
    assert served.wait({"id": streamed.headers["x-video-id"]})["given_frames"] == 3


@pytest.fixture(scope="module")
def one(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for all tests of this module whose requests are rejected."""
    with serving(make_pipeline, tmp_path_factory.mktemp("one")) as serve:
        yield serve(limits={"num_frames": 64, "body_bytes": 200_000, "upload_frames": 4})


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"num_frames": 65}, "num_frames", "at most 64"),
        ({"num_frames": 0}, "num_frames", "at least 1"),
        ({"num_frames": "16"}, "num_frames", "valid integer"),
        ({"num_frames": 16.5}, "num_frames", "integer"),
        ({"num_inference_steps": 251}, "num_inference_steps", "at most 250"),
        ({"ar_step": 51}, "ar_step", "must be between"),
        ({"ar_step": 1, "num_frames": 40}, "ar_step", "The smallest valid ar_step is 7"),
        ({"class_label": 3}, "class_label", "classes 0..2 (disc, ring, square)"),
        ({"class_label": "cat"}, "class_label", "classes 0..2"),
        ({"class_label": -1}, "class_label", "classes 0..2"),
        ({"seed": 2**53}, "seed", "less than or equal"),
        ({"seed": -1}, "seed", "greater than or equal"),
        ({"size": "32x32"}, "size", "makes 16x16 only"),
        ({"guidance_scale": 21}, "guidance_scale", "at most 20"),
        ({"fps": 61}, "fps", "at most 60"),
        ({"fps": 0}, "fps", "greater than 0"),
        ({"model": "../../etc/passwd"}, "model", "no model"),
        ({"mode": "rolling", "num_frames": 40}, "mode", "attention_window"),
        ({"output": "/tmp/x"}, "output", "not permitted"),
        ([], None, "valid dictionary"),
    ],
)
def test_invalid_values_are_rejected_before_any_work(one: Served, fields: Any, param: str | None, reason: str) -> None:
    engine = one.replica.models["tiny"].engine
    before = engine.frame_evaluations, one.client.get("/v1/videos").json()["data"]
    for path in ("/v1/videos", "/v1/videos:stream"):
        answer = one.client.post(path, json=fields)
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert error["type"] == "invalid_request"
        assert error["param"] == param
        assert reason in error["message"]
    assert (engine.frame_evaluations, one.client.get("/v1/videos").json()["data"]) == before


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"seed": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"x" * 200_001, "application/json", 413),
        (b"seed=1", "application/x-www-form-urlencoded", 415),
        (b"nonsense", "multipart/form-data", 400),
    ],
)
def test_unreadable_bodies_are_rejected(one: Served, body: bytes, kind: str, status: int) -> None:
    answer = one.client.post("/v1/videos", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_form_without_its_boundary_does_not_break_the_service(serve: Serve) -> None:
    served = serve()
    headers = {"content-type": "multipart/form-data; boundary=y"}
    answer = served.client.post("/v1/videos", content=b"--x\r\n", headers=headers)
    assert answer.status_code in (202, 400, 422)  # an empty form is a request with all defaults


def test_a_body_without_a_length_is_cut_off(one: Served) -> None:
    def endless() -> Any:
        for _ in range(300):
            yield b" " * 1000

    answer = one.client.post("/v1/videos", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_uploads_beyond_the_limits_are_rejected(one: Served) -> None:
    def send(data: bytes) -> dict[str, Any]:
        answer = one.client.post("/v1/videos", data={"num_frames": 8}, files={"input_reference": ("x", data)})
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "input_reference"
        return answer.json()["error"]["message"]

    assert "more than the 4 allowed" in send(encode_video(np.zeros((5, 16, 16, 3), np.uint8), 8))
    assert "it is a GIF" in send(b"GIF89a" + b"\0" * 50)


def test_other_hosts_and_other_sites_need_keys(one: Served, serve: Serve) -> None:
    foreign = one.client.get("/v1/models", headers={"host": "evil.example"})
    assert foreign.status_code == 403
    page = one.client.post("/v1/videos", json={}, headers={"origin": "http://evil.example"})
    assert page.status_code == 403
    assert one.client.get("/healthz", headers={"host": "10.0.0.1"}).status_code == 200
    assert one.client.get("/v1/models", headers={"origin": one.url}).status_code == 200
    open_to_all = serve(allow_anonymous=True)
    assert open_to_all.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 200


def test_keys_keep_owners_apart_and_have_limits(serve: Serve, tmp_path: Path) -> None:
    lines = [f"alice: {{sha256: {digest('ka')}, jobs: 1}}", f"bob: {{sha256: {digest('kb')}, requests_per_minute: 2}}"]
    (tmp_path / "keys.yaml").write_text("\n".join(lines))
    served = serve(keys=str(tmp_path / "keys.yaml"))
    alice, bob = ({"authorization": f"Bearer {key}"} for key in ("ka", "kb"))
    for path in ("/v1/models", "/v1/videos", "/metrics"):
        refused = served.client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert served.client.get(path, headers={"authorization": "Bearer kc"}).status_code == 401
    video = served.client.post("/v1/videos", json=LONG, headers=alice).json()
    path = f"/v1/videos/{video['id']}"
    assert served.client.get(path, headers=alice).status_code == 200
    assert served.client.get(path, headers=bob).status_code == 404
    assert served.client.post(f"{path}/cancel", headers=bob).status_code == 404
    served.client.delete(path, headers=bob)  # which deletes a video of bob's own with this id: there is none
    assert served.client.get(path, headers=alice).json()["status"] in ("queued", "in_progress")
    assert served.client.get(f"{path}/stream", headers=bob).status_code == 404
    assert served.client.get("/v1/videos", headers=bob).json()["data"] == []
    second = served.client.post("/v1/videos", json={}, headers=alice)
    assert (second.status_code, second.json()["error"]["type"]) == (429, "too_many_jobs")
    assert int(second.headers["retry-after"]) >= 1
    answers = [served.client.post("/v1/videos", json={}, headers=bob) for _ in range(3)]
    assert [a.status_code for a in answers] == [202, 202, 429]
    assert answers[2].json()["error"]["type"] == "rate_limit"
    assert int(answers[2].headers["retry-after"]) >= 1


def test_a_key_has_so_many_streams_open_and_no_more(serve: Serve, tmp_path: Path) -> None:
    lines = [f"alice: {{sha256: {digest('ka')}}}", f"bob: {{sha256: {digest('kb')}, streams: 1}}"]
    (tmp_path / "keys.yaml").write_text("\n".join(lines))
    served = serve(keys=str(tmp_path / "keys.yaml"), streams_per_key=2)
    alice, bob = ({"authorization": f"Bearer {key}"} for key in ("ka", "kb"))

    def listen(headers: dict[str, str], method: str = "POST", path: str = "/v1/videos:stream") -> Any:
        body = {"json": {**LONG, "num_frames": 1000}} if method == "POST" else {}
        return served.client.stream(method, path, headers=headers, **body)

    with listen(alice) as first:
        path = f"/v1/videos/{first.headers['x-video-id']}/stream"
        with listen(alice, "GET", path) as second, listen(bob) as other:
            assert (second.status_code, other.status_code) == (200, 200)
            for refused in (listen(alice), listen(alice, "GET", path), listen(bob)):
                with refused as answer:
                    assert answer.status_code == 429
                    assert int(answer.headers["retry-after"]) >= 1
                    assert json.loads(answer.read())["error"]["type"] == "too_many_streams"
        eventually(lambda: served.replica.streams.num_open == {"alice": 1, "bob": 0})
        assert served.client.get("/v1/videos/video_x/stream", headers=alice).status_code == 404
        assert served.replica.streams.num_open["alice"] == 1


def test_fifty_clients_get_a_video_or_a_rejection(serve: Serve) -> None:
    """With a queue of 16 and an engine of 4 no request is lost or served twice."""
    served = serve(max_waiting=16, engine={"max_requests": 4})
    answers: list[httpx.Response] = []

    def ask(seed: int) -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            path = "/v1/videos:stream" if seed % 5 == 0 else "/v1/videos"
            body = {"seed": seed, "num_frames": 12, "num_inference_steps": 6, "ar_step": 3}
            answers.append(client.post(path, json=body))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 50
    refused = [a for a in answers if a.status_code == 503]
    assert all(int(a.headers["retry-after"]) >= 1 and a.json()["error"]["type"] == "overloaded" for a in refused)
    accepted = [a for a in answers if a.status_code in (200, 202)]
    assert len(accepted) + len(refused) == 50
    assert len(accepted) >= 16
    ids = [a.headers["x-video-id"] if a.status_code == 200 else a.json()["id"] for a in accepted]
    assert len(set(ids)) == len(ids)
    seeds = [served.wait({"id": video_id})["seed"] for video_id in ids]
    assert len(set(seeds)) == len(seeds)
    listed = served.client.get("/v1/videos", params={"limit": 100}).json()["data"]
    assert sorted(v["id"] for v in listed) == sorted(ids)


def test_streams_leave_a_slot_for_a_queued_job(serve: Serve) -> None:
    served = serve(engine={"max_requests": 1}, requests_per_minute=100_000)
    body = {"num_frames": 24, "num_inference_steps": 12, "ar_step": 6}
    done, statuses = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/v1/videos:stream", json=body)
                statuses.append(answer.status_code)
                assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
                time.sleep(0.02)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: 200 in statuses)
        served.wait(served.ask(**body))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 503}


def test_a_list_continues_after_its_last_entry(serve: Serve) -> None:
    served = serve()
    ids = [served.ask(num_frames=2, num_inference_steps=2)["id"] for _ in range(5)]
    first = served.client.get("/v1/videos", params={"limit": 3}).json()
    assert [v["id"] for v in first["data"]] == ids[:1:-1]
    assert first["has_more"]
    rest = served.client.get("/v1/videos", params={"limit": 3, "after": ids[2]}).json()
    assert [v["id"] for v in rest["data"]] == ids[1::-1]
    assert not rest["has_more"]
    oldest = served.client.get("/v1/videos", params={"limit": 2, "order": "asc", "after": ids[0]}).json()
    assert (oldest["first_id"], oldest["last_id"], oldest["has_more"]) == (ids[1], ids[2], True)
    none = served.client.get("/v1/videos", params={"after": ids[0]}).json()
    assert none == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_request_is_repeated_with_its_idempotency_key(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    let = served.hold()
    key, body = {"idempotency-key": "k1"}, {"num_frames": 2, "num_inference_steps": 2}

    def post(headers: dict[str, str], **fields: Any) -> httpx.Response:
        return served.client.post("/v1/videos", json=body | fields, headers=headers)

    first, again = post(key), post(key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"] == again.headers["location"].rpartition("/")[2]
    assert len(served.client.get("/v1/videos").json()["data"]) == 1
    assert post(key, num_frames=3).json()["error"]["param"] == "Idempotency-Key"
    assert post({"idempotency-key": "k2"}).json()["id"] != first.json()["id"]
    # A rejected request does not use its key up. Neither does a deleted video.
    assert post({"idempotency-key": "k3"}, num_frames=0).status_code == 422
    assert post({"idempotency-key": "k3"}).status_code == 202
    let(math.inf)
    served.client.delete(f"/v1/videos/{first.json()['id']}")
    assert post(key).json()["id"] != first.json()["id"]
    assert post({"idempotency-key": "x" * 256}).status_code == 422


def test_many_requests_with_one_idempotency_key_make_one_job(serve: Serve) -> None:
    served = serve()
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"num_frames": 2, "num_inference_steps": 2}
        answers.append(httpx.post(f"{served.url}/v1/videos", json=body, headers={"idempotency-key": "k"}, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(served.client.get("/v1/videos").json()["data"]) == 1


def test_a_prompt_is_the_name_of_a_class_and_seconds_are_frames(one: Served) -> None:
    asked = one.ask(prompt="ring", seconds="1.5", fps=4, num_inference_steps=2)
    assert (asked["class_label"], asked["prompt"], asked["num_frames"], asked["seconds"]) == (1, "ring", 6, "1.5")
    assert one.ask(prompt="", seconds=1, num_inference_steps=2)["class_label"] is None
    for fields, param in (
        ({"prompt": "a red car"}, "prompt"),
        ({"prompt": "ring", "class_label": 1}, "prompt"),
        ({"seconds": 1, "num_frames": 8}, "seconds"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": 9}, "num_frames"),
        ({"seconds": 0.01}, "num_frames"),
        ({"input_reference": {"image_url": "http://127.0.0.1/x.png"}}, "input_reference"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference"),
        ({"input_reference": {"image_url": "data:image/png;base64,%%"}}, "input_reference"),
    ):
        answer = one.client.post("/v1/videos", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), fields


def test_a_video_is_extended_with_all_its_frames(serve: Serve) -> None:
    served = serve(limits={"upload_frames": 8})
    fields = {"num_frames": 8, "num_inference_steps": 3, "ar_step": 1, "seed": 3, "fps": 4, "class_label": 2}
    video = served.ask(**fields)
    early = served.client.post("/v1/videos/extensions", json={"video": {"id": video["id"]}, "seconds": 1})
    assert early.status_code in (202, 409)
    served.wait(video)
    body = {"video": {"id": video["id"]}, "seconds": "1", "prompt": "ring"}
    longer = served.wait(served.client.post("/v1/videos/extensions", json=body).json())
    assert (longer["num_frames"], longer["given_frames"], longer["class_label"], longer["fps"]) == (12, 8, 1, 4)
    same = served.client.post("/v1/videos/extensions", json={"video": {"id": video["id"]}, "seconds": 1}).json()
    assert same["class_label"] == 2
    file = served.client.get(f"/v1/videos/{video['id']}/content").content
    before = torch.from_numpy(decode_clip(file, 0, 8, resolution=Resolution.square(16)))
    settings = {name: longer[name] for name in ("class_label", "num_frames", "num_inference_steps", "ar_step", "seed")}
    assert longer["frames_sha256"] == sha256(served.pipeline(condition=before, **settings).frames[0])
    for wrong, status in (
        ({**body, "video": {"id": longer["id"]}}, 422),  # 12 frames
        ({**body, "video": {"id": "video_x"}}, 404),
        ({**body, "seconds": 0}, 422),
        ({"seconds": 1}, 422),
        ({"video": None, "seconds": 1}, 422),
    ):
        assert served.client.post("/v1/videos/extensions", json=wrong).status_code == status
    clip = encode_video(before[:3].numpy(), 8)
    uploaded = {"files": {"video": ("v.mp4", clip)}, "data": {"seconds": "0.5", "prompt": "disc"}}
    answer = served.client.post("/v1/videos/extensions", **uploaded).json()
    assert (answer["num_frames"], answer["given_frames"], answer["class_label"]) == (7, 3, 0)


def test_pictures_of_a_video(serve: Serve) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=20, num_inference_steps=2))
    path = f"/v1/videos/{video['id']}/content"
    frames = frames_of(served.client.get(path).content)
    for variant, media_type, size in (("thumbnail", "image/webp", (16, 16)), ("spritesheet", "image/jpeg", (64, 64))):
        answer = served.client.get(path, params={"variant": variant})
        assert answer.headers["content-type"] == media_type
        picture = Image.open(io.BytesIO(answer.content)).convert("RGB")
        assert picture.size == size
        assert np.abs(np.asarray(picture.crop((0, 0, 16, 16)), int) - frames[0]).mean() < 20
    last = np.asarray(picture.crop((48, 48, 64, 64)), int)
    assert np.abs(last - frames[-1]).mean() < 20
    assert served.client.get(path, params={"variant": "audio"}).status_code == 422


def test_ranges_of_bytes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=4, num_inference_steps=2))
    path = f"/v1/videos/{video['id']}/content"
    monkeypatch.setattr("ardiff.serving.responses.PIECE_BYTES", 100)  # many pieces
    whole = served.client.get(path).content
    assert len(whole) == video["bytes"] > 500
    for asked, expected in (
        ("bytes=0-9", whole[:10]),
        ("bytes=10-", whole[10:]),
        ("bytes=-7", whole[-7:]),
        ("bytes=90-310", whole[90:311]),
        ("bytes=0-99999", whole),
    ):
        part = served.client.get(path, headers={"range": asked})
        assert part.status_code == 206
        assert part.content == expected
        assert part.headers["content-range"].endswith(f"/{len(whole)}")
    outside = served.client.get(path, headers={"range": f"bytes={len(whole)}-"})
    assert outside.status_code == 416
    assert outside.headers["content-range"] == f"bytes */{len(whole)}"
    for odd in ("bytes=-", "bytes=a-b", "bytes=5-2", "pages=1-2", "bytes=1-2,4-5", "x"):
        assert served.client.get(path, headers={"range": odd}).content == whole


def test_a_client_that_has_the_video_does_not_get_it_again(serve: Serve) -> None:
    served = serve()
    videos = [served.wait(served.ask(num_frames=4, num_inference_steps=2)) for _ in range(2)]
    path, other = (f"/v1/videos/{video['id']}/content" for video in videos)
    etag, other_etag = (served.client.get(p).headers["etag"] for p in (path, other))
    assert etag != other_etag
    for tags, status in ((etag, 304), (f"{other_etag}, W/{etag}", 304), ("*", 304), (other_etag, 200)):
        answer = served.client.get(path, headers={"if-none-match": tags})
        assert (answer.status_code, answer.headers["etag"]) == (status, etag)
        assert (len(answer.content) == 0) == (status == 304)
    for tag, status in ((etag, 206), (other_etag, 200), (f"W/{etag}", 200)):
        assert served.client.get(path, headers={"range": "bytes=0-9", "if-range": tag}).status_code == status


def test_a_video_is_sent_without_loading_it(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=4, num_inference_steps=2))
    file = next((tmp_path / "shared" / "videos" / "anonymous").iterdir())
    with file.open("ab") as sparse:
        sparse.truncate(2**30)
    reads: list[int] = []
    read = storage.read_range
    monkeypatch.setattr(
        "ardiff.serving.responses.read_range", lambda uri, at, size: (reads.append(size), read(uri, at, size))[1]
    )
    path = f"/v1/videos/{video['id']}/content"
    part = served.client.get(path, headers={"range": f"bytes={2**29}-{2**29 + 1}"})
    assert (part.status_code, part.content, reads) == (206, b"\0\0", [2])
    with served.client.stream("GET", path) as answer:
        assert answer.headers["content-length"] == str(2**30)
        for chunk in answer.iter_raw():
            assert len(chunk) <= 2**20
            if len(reads) > 8:
                break
    assert max(reads) == 2**20
    eventually(lambda: len(reads) < 100)


def test_head_has_the_headers_of_get_and_no_body(serve: Serve) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=4, num_inference_steps=2))
    for path in ("/", "/healthz", "/v1/models", f"/v1/videos/{video['id']}", f"/v1/videos/{video['id']}/content"):
        head, get = served.client.head(path), served.client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length", "etag", "accept-ranges"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
    served.hold()
    running = served.ask(**LONG)
    head = served.client.head(f"/v1/videos/{running['id']}/stream")  # which does not wait for the first frame
    assert (head.status_code, head.headers["content-type"]) == (200, "video/mp4")
    for path, status in ((f"/v1/videos/{running['id']}/content", 409), ("/v1/videos/video_x", 404)):
        assert served.client.head(path).status_code == status


def test_other_methods_are_rejected_with_those_that_are_offered(one: Served) -> None:
    for path, methods in (
        ("/v1/videos", "GET, HEAD, POST"),
        ("/v1/videos/video_x", "DELETE, GET, HEAD, PATCH"),
        ("/v1/videos/video_x/content", "GET, HEAD"),
        ("/v1/videos:stream", "POST"),
        ("/", "GET, HEAD"),
    ):
        answer = one.client.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
        assert answer.json()["error"]["type"] == "method_not_allowed"


def test_pages_of_named_origins_may_use_the_service(serve: Serve, one: Served) -> None:
    origin = "https://videos.example"
    served = serve(cors_origins=[origin])
    asked = {"origin": origin, "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "content-type,idempotency-key"
    preflight = served.client.options("/v1/videos", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    answer = served.client.post("/v1/videos", json={"num_frames": 0}, headers={"origin": origin})
    assert answer.status_code == 422
    assert answer.headers["access-control-allow-origin"] == origin
    assert "ETag" in answer.headers["access-control-expose-headers"]
    other = served.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in one.client.get("/v1/models", headers={"origin": one.url}).headers
    with pytest.raises(ConfigError, match="set keys"):
        build(ServiceConfig, {"cors_origins": ["*"]})


def test_clients_of_http_1_0_get_files_but_no_streams(serve: Serve) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=4, num_inference_steps=2))
    path = f"/v1/videos/{video['id']}"

    def get(path: str) -> tuple[bytes, bytes]:
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=120) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        return head.lower(), body

    head, body = get(f"{path}/content")
    assert body == served.client.get(f"{path}/content").content
    assert b"chunked" not in head
    head, body = get(f"{path}/stream")
    assert head.startswith(b"http/1.1 505")
    assert json.loads(body)["error"]["type"] == "http_version"


def hls_frames(url: str) -> int:
    """Frames that FFmpeg's HLS player shows."""
    with av.open(url, format="hls") as container:
        return sum(1 for _ in container.decode(video=0))


def test_hls_players_get_a_finished_video(serve: Serve) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=150, num_inference_steps=4, ar_step=1))
    path = f"/v1/videos/{video['id']}/hls.m3u8"
    answer = served.client.get(path)
    assert answer.headers["content-type"] == "application/vnd.apple.mpegurl"
    lines = answer.text.splitlines()
    durations = [float(line[8:-1]) for line in lines if line.startswith("#EXTINF:")]
    assert sum(durations) == pytest.approx(150 / 8)
    assert max(durations) <= 8
    assert lines[-1] == "#EXT-X-ENDLIST"
    assert hls_frames(f"{served.url}{path}") == 150
    for index, status in ((len(durations), 404), ("x", 422), (-1, 422)):
        assert served.client.get(f"/v1/videos/{video['id']}/hls/{index}.m4s").status_code == status
    assert served.client.get("/v1/videos/video_x/hls.m3u8").status_code == 404


def test_hls_players_follow_a_video_of_another_replica(serve: Serve) -> None:
    worker = serve("a")
    let = worker.hold()
    video = worker.ask(num_frames=200, num_inference_steps=4, ar_step=1)
    let(100)  # more than 64 frames: a complete segment
    reader = serve("b")
    path = f"/v1/videos/{video['id']}"
    early = reader.client.get(f"{path}/hls.m3u8")  # waits for the first segment
    assert early.text.count("#EXTINF") == 1
    assert "#EXT-X-ENDLIST" not in early.text
    header, first = (reader.client.get(f"{path}/hls/{name}").content for name in ("init.mp4", "0.m4s"))
    assert len(frames_of(header + first)) == early_frames(early.text)
    assert reader.client.get(f"{path}/hls/1.m4s").status_code == 404
    let(math.inf)
    assert hls_frames(f"{reader.url}{path}/hls.m3u8") == 200
    worker.wait(video)
    # A replica that has not followed it sends segments of the finished file: players may mix them.
    rest = [worker.client.get(f"{path}/hls/{index}.m4s").content for index in range(1, 4)]
    assert len(frames_of(header + first + b"".join(rest))) == 200


def test_hls_players_that_return_late_get_the_whole_video(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    let = served.hold()
    video = served.ask(num_frames=150, num_inference_steps=4, ar_step=1)
    let(100)
    path = f"/v1/videos/{video['id']}/hls.m3u8"
    assert served.client.get(path).text.count("#EXTINF") == 1
    let(math.inf)
    served.wait(video)
    with served.replica.stores.jobs.store.database.transaction() as connection:
        connection.execute(delete(segments))  # as a minute after the end
    assert served.client.get(path).text.endswith("#EXT-X-ENDLIST\n")
    assert hls_frames(f"{served.url}{path}") == 150


def early_frames(playlist: str) -> int:
    """Frames of the segments of a playlist at 8 frames per second."""
    return round(8 * sum(float(line[8:-1]) for line in playlist.splitlines() if line.startswith("#EXTINF:")))


def test_hls_needs_mp4(serve: Serve) -> None:
    served = serve(codec="vp9")
    video = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    answer = served.client.get(f"/v1/videos/{video['id']}/hls.m3u8")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "not_supported")


def half_sent(served: Served, fields: bytes = b'{"num_frames"') -> socket.socket:
    """A connection on which a part of a body was sent."""
    connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=120)
    head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000"
    connection.sendall(f"{head}\r\n\r\n".encode() + fields)
    return connection


def test_a_body_that_does_not_arrive_is_given_up(serve: Serve) -> None:
    served = serve(limits={"body_seconds": 0.2})
    with half_sent(served) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    served.ask(num_frames=2, num_inference_steps=2)


def test_bodies_that_do_not_arrive_block_no_others(serve: Serve) -> None:
    served = serve(limits={"unfinished_bodies": 8, "body_seconds": 3600.0})
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(half_sent(served))
        for _ in range(3):
            served.ask(num_frames=2, num_inference_steps=2)
    eventually(lambda: served.client.get("/healthz").json()["status"] == "ok")


def test_large_headers_are_rejected(one: Served) -> None:
    for headers in ({f"x-{i}": "y" for i in range(120)}, {"x": "y" * 40_000}):
        answer = one.client.get("/v1/models", headers=headers)
        assert answer.status_code in (400, 431)  # 400: by the server itself
    assert one.client.get("/v1/models", headers={f"x-{i}": "y" * 100 for i in range(80)}).status_code == 200


def test_compressed_and_truncated_bodies_are_rejected(one: Served) -> None:
    body = gzip.compress(b'{"num_frames": 2}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = one.client.post("/v1/videos", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "unsupported_encoding")
    form = b'--b\r\nContent-Disposition: form-data; name="num_frames"\r\n\r\n2\r\n--b'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = one.client.post("/v1/videos", content=form, headers=kind)
    assert answer.status_code == 400
    assert "closing boundary" in answer.json()["error"]["message"]
    assert one.client.post("/v1/videos", content=form + b"--\r\n", headers=kind).json()["num_frames"] == 2


def test_a_record_and_its_video_expire_together(serve: Serve, tmp_path: Path) -> None:
    served = serve(keep_seconds=1000.0)
    video = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 200
    (file,) = (tmp_path / "shared" / "videos" / "anonymous").iterdir()
    served.age(900)
    assert file.exists()
    served.age(101)
    assert not file.exists()
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 410
    assert served.look(video)["status"] == "expired"  # the record exists for as long again
    served.age(1000)
    assert served.client.get(f"/v1/videos/{video['id']}").status_code == 404


def test_deadline(serve: Serve) -> None:
    served = serve(job_seconds=0.001)
    slow = {"num_frames": 400, "num_inference_steps": 250, "ar_step": 250, "guidance_scale": 2}
    failed = served.wait(served.ask(**slow), "failed")
    assert failed["error"]["type"] == "deadline"
    answer = served.client.post("/v1/videos:stream", json=slow)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "deadline"


def test_a_video_whose_file_is_missing_is_gone(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    next((tmp_path / "shared" / "videos" / "anonymous").iterdir()).unlink()
    for path in ("content", "stream"):
        answer = served.client.get(f"/v1/videos/{video['id']}/{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (410, "missing")
    assert served.client.get("/healthz").json()["storage"] == "ok"


def test_a_damaged_video_is_no_outage_of_storage(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    next((tmp_path / "shared" / "videos" / "anonymous").iterdir()).write_bytes(b"no video")
    for variant in ("thumbnail", "spritesheet"):
        answer = served.client.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
        assert (answer.status_code, answer.json()["error"]["type"]) == (410, "damaged")
    assert "ardiff_storage_up 1.0" in served.client.get("/metrics").text
    assert served.client.get("/healthz").json()["storage"] == "ok"


def test_requests_are_stored_at_the_same_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = {"storage_seconds": 240.0, "limits": {"upload_seconds": 60.0}}  # on a busy machine uploads take long
    served = serve(max_waiting=3, engine={"max_requests": 1}, jobs_per_key=100, **patience)
    served.hold()
    served.ask(**LONG)
    eventually(lambda: served.replica.running)
    files, write = served.replica.stores.files.store, JobFiles.write_input
    together, picture = threading.Barrier(6), io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")

    def write_together(record: Any, given_frames: Any) -> None:
        together.wait(200)  # until all requests are here
        write(files, record, given_frames)

    monkeypatch.setattr(files, "write_input", write_together)
    statuses: list[int] = []

    def ask() -> None:
        answer = httpx.post(
            f"{served.url}/v1/videos", data=LONG, files={"input_reference": picture.getvalue()}, timeout=300
        )
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [202, 202, 202, 503, 503, 503]  # and no more than may wait
    eventually(lambda: len(list((Path(files.root) / "inputs" / "anonymous").iterdir())) == 3)


def test_several_models_by_name(serve: Serve, make_pipeline: Any, make_vae: Any) -> None:
    other = make_pipeline(seed=5, num_classes=0, num_shapes=2)
    other.vae = make_vae(resolution=[16, 40], buckets=[[40, 16]])
    served = serve(pipelines={"first": make_pipeline(), "second": other})
    models = served.client.get("/v1/models").json()["data"]
    assert [(m["id"], m["num_classes"], m["size"]) for m in models] == [("first", 3, "16x16"), ("second", 0, "40x16")]
    assert served.client.get("/v1/models/second").json() == models[1]
    assert served.client.get("/v1/models/third").status_code == 404
    fields = {"num_frames": 4, "num_inference_steps": 3, "ar_step": 1, "seed": 0}
    done = served.wait(served.ask(model="second", **fields))
    assert done["frames_sha256"] == sha256(other(**fields).frames[0])
    assert done["size"] == "40x16"
    content = served.client.get(f"/v1/videos/{done['id']}/content").content
    assert decode_clip(content, 0, 4).shape == (4, 16, 40, 3)
    assert [m["sizes"] for m in models] == [["16x16"], ["40x16", "16x40"]]
    tall = served.wait(served.ask(model="second", size="16x40", **fields))
    assert (tall["size"], tall["frames_sha256"]) == ("16x40", sha256(other(size="16x40", **fields).frames[0]))
    refused = served.client.post("/v1/videos", json={"model": "second", "size": "16x16"})
    assert (refused.status_code, "size is 16x16: the model makes 40x16 or 16x40 only." in refused.text) == (422, True)
    assert served.wait(served.ask(**fields))["model"] == "first"


def test_a_student_is_served_with_its_own_defaults(serve: Serve, make_pipeline: Any) -> None:
    student = make_pipeline(student=Student(timesteps=(999, 614), num_steps=2, guidance=1.5))
    served = serve(pipelines={"student": student, "teacher": make_pipeline()})
    models = served.client.get("/v1/models").json()["data"]
    assert [(m["student"], m["steps"], m["ar_step"], m["maximum"]["num_inference_steps"]) for m in models] == [
        (True, 2, 2, 2), (False, 50, 5, 250)
    ]  # fmt: skip
    done = served.wait(served.ask(class_label=1, num_frames=10, seed=3))
    assert (done["num_inference_steps"], done["solver"], done["ar_step"]) == (2, "lcm", 2)
    assert done["frames_sha256"] == sha256(student(class_label=1, num_frames=10, seed=3).frames[0])
    for changes, param in (
        ({"num_inference_steps": 20}, "num_inference_steps"),
        ({"guidance_scale": 2}, "guidance_scale"),
    ):
        refused = served.client.post("/v1/videos", json={"num_frames": 4, **changes})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)
        assert "student of 1 to 2 steps" in refused.json()["error"]["message"]


def test_a_stream_that_begins_takes_no_slot_of_another_model(
    serve: Serve, make_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(pipelines={"first": make_pipeline(), "second": make_pipeline()}, engine={"max_requests": 1})
    store, create = served.replica.stores.jobs.store, JobStore.create
    begun, go_on = threading.Event(), threading.Event()

    def create_slowly(record: Any, *arguments: Any) -> bool:
        if record.model == "first":
            begun.set()
            go_on.wait(60)
        return create(store, record, *arguments)

    monkeypatch.setattr(store, "create", create_slowly)
    statuses: dict[str, int] = {}

    def ask(model: str) -> None:
        body = {"model": model, "num_frames": 2, "num_inference_steps": 2}
        statuses[model] = httpx.post(f"{served.url}/v1/videos:stream", json=body, timeout=120).status_code

    other = threading.Thread(target=ask, args=["first"])
    other.start()
    try:
        assert begun.wait(60)
        ask("second")
    finally:
        go_on.set()
        other.join()
    assert statuses == {"first": 200, "second": 200}


def test_metrics_and_health(serve: Serve) -> None:
    served = serve()
    served.wait(served.ask(num_frames=6, num_inference_steps=4))
    served.client.post("/v1/videos", json={"num_frames": 0})
    text = served.client.get("/metrics").text
    assert 'ardiff_frames_total{model="tiny"} 6.0' in text
    assert 'ardiff_frame_evaluations_total{model="tiny"} 29.0' in text  # F S + F - 1
    assert 'ardiff_jobs_ended_total{status="completed"} 1.0' in text
    assert 'ardiff_errors_total{kind="invalid_request"} 1.0' in text
    assert 'ardiff_first_frame_seconds_count{model="tiny"} 1.0' in text
    eventually(lambda: served.client.get("/healthz").json()["waiting"] == 0)
    health = served.client.get("/healthz").json()
    stores = {"database": "ok", "storage": "ok"}
    assert health == {"status": "ok", **stores, "replica": "a", "running": 0, "waiting": 0}


def test_the_document_and_the_page_load_nothing_from_other_hosts(serve: Serve) -> None:
    served = serve()
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/videos", "/v1/videos:stream", "/v1/videos/{video_id}/content", "/v1/models", "/healthz"} <= set(paths)
    content = paths["/v1/videos/{video_id}/content"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"video/mp4", "video/webm", "image/webp", "image/jpeg"}
    for path in ("/", "/page.js", "/page.css"):
        answer = served.client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert served.client.get("/docs").status_code == 404
    assert served.client.get("/nothing").json()["error"]["type"] == "not_found"
