"""Malformed and hostile requests, drawn from the OpenAPI document: no 5xx, and the service continues."""

import contextlib
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from .conftest import Serve, Served

HOSTILE = [
    ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", {}),
    ("GET", "/v1/videos/%00", {}),
    ("GET", "/v1/videos/video_" + "0" * 32 + "%2e%2e", {}),
    ("GET", "/../../etc/passwd", {}),
    ("GET", "/page.js/../../keys.py", {}),
    ("DELETE", "/v1/videos/../../shared", {}),
    ("GET", "/v1/videos?after=../../x&limit=100", {}),
    ("GET", "/v1/videos?limit=" + "9" * 400, {}),
    ("GET", "/v1/videos/" + "a" * 5000, {}),
    ("POST", "/v1/videos", {"content": b"\x00" * 1000, "headers": {"content-type": "application/json"}}),
    ("POST", "/v1/videos", {"json": {"class_label": "disc\x00", "num_frames": 2, "num_inference_steps": 2}}),
    ("POST", "/v1/videos", {"json": {"seed": 1e308}}),
    ("POST", "/v1/videos", {"content": b'{"class_label": "\\ud800"}', "headers": {"content-type": "application/json"}}),
    ("POST", "/v1/videos", {"json": {"guidance_scale": -1e308}}),
    ("POST", "/v1/videos", {"json": {"__proto__": {}, "num_frames": 2}}),
    ("POST", "/v1/videos", {"data": {"num_frames": "2"}, "files": {"input_reference": ("/etc/x", b"\x00\x01")}}),
    ("POST", "/v1/videos", {"data": {"seed": "1"}, "files": {"seed": ("x", b"1")}}),
    ("POST", "/v1/videos:stream", {"json": [[]] * 1000}),
    ("PATCH", "/v1/videos", {}),
    ("TRACE", "/v1/models", {}),
]


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


def fuzz(served: Served, mode: GenerationMode, examples: int) -> set[int]:
    """Sends examples to every operation; asserts what the document promises, and returns the statuses seen."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses: set[int] = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        phases = [Phase.generate]

        @seed(0)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            answer = case.call(timeout=60)
            assert answer.status_code < 500, answer.text
            # Methods and paths that the case has bent do not belong to the operation.
            if answer.status_code not in (404, 405):
                documented = case.operation.definition.raw["responses"]
                assert str(answer.status_code) in documented, (answer.status_code, case.path)
            statuses.add(answer.status_code)

        with contextlib.suppress(Unsatisfiable):  # nothing of the operation can be wrong
            send()
    return statuses


LIMITS = {"num_frames": 16, "num_inference_steps": 50}
PATIENT: dict[str, Any] = {
    "limits": LIMITS,
    "jobs_per_key": 1000,
    "max_waiting": 1000,
    "engine": {"max_requests": 256},  # a stream is refused where no place is free
}


def test_hostile_requests_are_rejected(serve: Serve) -> None:
    served = serve(**PATIENT)
    for method, path, options in HOSTILE:
        check(served.client.request(method, path, **options))
    assert served.replica.healthy
    served.wait(served.ask(num_frames=2, num_inference_steps=2))


@pytest.mark.slow
def test_requests_drawn_from_the_document_never_break_the_service(serve: Serve) -> None:
    served = serve(**PATIENT, requests_per_minute=100_000)
    bad = fuzz(served, GenerationMode.NEGATIVE, examples=24)
    good = fuzz(served, GenerationMode.POSITIVE, examples=8)
    assert {200, 422} <= bad | good  # hardly a drawn request for a video fits a model: fields exclude each other
    assert served.replica.healthy
    served.wait(served.ask(num_frames=2, num_inference_steps=2))


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@seed(0)
@given(st.binary(max_size=300), st.sampled_from(["application/json", "multipart/form-data; boundary=x", "", "\xff"]))
def _bytes(body: bytes, kind: str) -> None:
    assert CLIENT is not None
    headers = {"content-type": kind.encode("latin1")} if kind else {}
    check(CLIENT.post("/v1/videos", content=body, headers=headers))


CLIENT: httpx.Client | None = None


def test_random_bodies_are_rejected(serve: Serve) -> None:
    global CLIENT
    served = serve(limits=LIMITS)
    CLIENT = served.client
    _bytes()
    assert served.replica.healthy
