"""Requests, responses, records and the client take their sampling parameters from SamplingParams."""

import subprocess
import sys
from dataclasses import asdict, fields

from ardiff.client import _request_options
from ardiff.config import field_documentation
from ardiff.sampling.params import FROM_INPUT, SamplingParams
from ardiff.serving.config import RequestLimits
from ardiff.serving.requests import document_body
from ardiff.serving.schemas import Video, VideoRequest

NAMES = {f.name for f in fields(SamplingParams)}
DOCUMENTATION = field_documentation(SamplingParams)


def test_a_request_has_every_parameter_with_its_default_and_description() -> None:
    parameters = asdict(SamplingParams())
    request = VideoRequest.model_fields
    assert set(request) - NAMES - {"prompt"} == {"model", "fps", "seconds"}
    assert NAMES - set(request) == {*FROM_INPUT}
    for name in NAMES - {*FROM_INPUT, "prompt", "class_label", "seed"}:  # which accept more than SamplingParams
        assert (request[name].default, request[name].description) == (parameters[name], DOCUMENTATION[name])


def test_a_response_has_every_parameter() -> None:
    assert set(Video.model_fields) >= NAMES


def test_the_client_has_an_option_for_every_field_of_a_request() -> None:
    assert set(_request_options()) == set(VideoRequest.model_fields)


def test_the_document_shows_the_limits_of_the_service() -> None:
    body = document_body(RequestLimits(num_frames=64, fps=30.0))["requestBody"]["content"]
    for content in body.values():
        properties = content["schema"]["properties"]
        assert properties["num_frames"]["maximum"] == 64
        assert properties["fps"]["anyOf"][0]["maximum"] == 30.0


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, ardiff.client; print({'torch', 'ray', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
