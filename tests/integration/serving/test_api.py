"""The HTTP API on a real server: jobs, streams, uploads, rejections. Frames are those of the pipeline."""

import hashlib
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from ardiff.data.encode import encode_video
from ardiff.serving.keys import digest

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
    assert done["created_at"] <= done["started_at"] <= done["first_frame_at"] <= done["completed_at"]
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
        packed.append(len(runner.engine.running))
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
        running = served.look({"id": answer.headers["x-video-id"]})
        assert running["status"] == "in_progress"
        assert 0 < running["frames_done"] < 400
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


def test_delete_cancels_before_the_next_iteration_and_then_removes(serve: Serve) -> None:
    served = serve()
    video = served.ask(**LONG)
    other = served.ask(num_frames=8, num_inference_steps=10)
    while served.look(video)["frames_done"] == 0:
        time.sleep(0.02)
    cancelled = served.client.delete(f"/v1/videos/{video['id']}").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["frames_done"] < 400
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 409
    assert served.client.get(f"/v1/videos/{video['id']}/stream").status_code == 409
    served.wait(other)  # which ran beside it
    removed = served.client.delete(f"/v1/videos/{video['id']}").json()
    assert removed == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert served.client.get(f"/v1/videos/{video['id']}").status_code == 404


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
    assert "cannot be decoded" in send(b"GIF89a" + b"\0" * 50)


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
    for answer in (served.client.get(path, headers=bob), served.client.delete(path, headers=bob)):
        assert answer.status_code == 404
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


def test_ranges_of_bytes(serve: Serve) -> None:
    served = serve()
    video = served.wait(served.ask(num_frames=4, num_inference_steps=2))
    path = f"/v1/videos/{video['id']}/content"
    whole = served.client.get(path).content
    for asked, expected in (("bytes=0-9", whole[:10]), ("bytes=10-", whole[10:]), ("bytes=-7", whole[-7:])):
        part = served.client.get(path, headers={"range": asked})
        assert part.status_code == 206
        assert part.content == expected
    assert served.client.get(path, headers={"range": f"bytes={len(whole)}-"}).status_code == 416
    for odd in ("bytes=-", "bytes=a-b", "pages=1-2", "bytes=1-2,4-5", "x"):
        assert served.client.get(path, headers={"range": odd}).content == whole


def test_a_record_and_its_video_expire_together(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, now = serve(keep_seconds=1.0), time.time()
    for module in ("records", "store"):
        monkeypatch.setattr(f"ardiff.serving.{module}.time", SimpleNamespace(time=lambda: now))
    video = served.wait(served.ask(num_frames=2, num_inference_steps=2))
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 200
    file = next((tmp_path / "shared" / "videos" / "anonymous").iterdir())
    now = max(video["expires_at"], file.stat().st_mtime + 1.0) + 0.01
    assert served.look(video)["status"] == "expired"
    assert served.client.get(f"/v1/videos/{video['id']}/content").status_code == 410
    eventually(lambda: not file.exists())
    assert served.look(video)["status"] == "expired"  # the record exists for as long again
    now += 1000
    eventually(lambda: served.client.get(f"/v1/videos/{video['id']}").status_code == 404)


def test_deadline(serve: Serve) -> None:
    served = serve(job_seconds=0.001)
    slow = {"num_frames": 400, "num_inference_steps": 250, "ar_step": 250, "guidance_scale": 2}
    failed = served.wait(served.ask(**slow), "failed")
    assert failed["error"]["type"] == "deadline"
    answer = served.client.post("/v1/videos:stream", json=slow)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "deadline"


def test_several_models_by_name(serve: Serve, make_pipeline: Any) -> None:
    other = make_pipeline(seed=5, num_classes=0)
    served = serve(pipelines={"first": make_pipeline(), "second": other})
    models = served.client.get("/v1/models").json()["data"]
    assert [(m["id"], m["num_classes"], m["size"]) for m in models] == [("first", 3, "16x16"), ("second", 0, "16x16")]
    fields = {"num_frames": 4, "num_inference_steps": 3, "ar_step": 1, "seed": 0}
    done = served.wait(served.ask(model="second", **fields))
    assert done["frames_sha256"] == sha256(other(**fields)[0])
    assert served.wait(served.ask(**fields))["model"] == "first"


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
    assert health == {"status": "ok", "storage": "ok", "replica": "a", "running": 0, "waiting": 0}


def test_the_document_and_the_page_load_nothing_from_other_hosts(serve: Serve) -> None:
    served = serve()
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/videos", "/v1/videos:stream", "/v1/videos/{video_id}/content", "/v1/models", "/healthz"} <= set(paths)
    for path in ("/", "/page.js", "/page.css"):
        answer = served.client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert served.client.get("/docs").status_code == 404
    assert served.client.get("/nothing").json()["error"]["type"] == "not_found"
