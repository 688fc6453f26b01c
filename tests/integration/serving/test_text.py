"""Prompts through the HTTP API, the client and the command line: frames are those of the pipeline."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_text import ToyEncoder

from ardiff.cli import main
from ardiff.errors import ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.params import MAX_PROMPT_LENGTH
from ardiff.serving.config import ServiceConfig
from ardiff.serving.metrics import PrometheusRecorder
from ardiff.serving.replica import Replica

from .conftest import Serve, Served, serving
from .test_api import sha256

TEXT: dict[str, Any] = {"condition": "cross_attention", "condition_dim": 5}
SHORT: dict[str, Any] = {"num_frames": 6, "num_inference_steps": 4, "ar_step": 2, "seed": 3}
MakePipeline = Callable[..., ARDiffusionPipeline]


@pytest.fixture(scope="module")
def texts(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of two models: ``text``, which takes prompts and classes, and ``plain``, which takes classes."""
    pipelines = {"text": make_pipeline(text_encoder=ToyEncoder(), **TEXT), "plain": make_pipeline()}
    with serving(make_pipeline, tmp_path_factory.mktemp("texts")) as serve:
        yield serve(pipelines=pipelines, limits={"texts": 4}, engine={"long_prompts": "error"})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a red ring"},
        {"prompt": "a red ring", "class_label": 1},
        {"prompt": "a ring", "negative_prompt": "a red square", "guidance_scale": 2.0},
        {"prompt": "a ring", "conditions": [{"frame": 3, "prompt": "a blue disc"}]},
        {"prompt": ""},
    ],
)
def test_a_video_of_a_prompt_has_the_frames_of_the_pipeline(texts: Served, fields: dict[str, Any]) -> None:
    done = texts.wait(texts.ask(**SHORT, **fields))
    assert done["frames_sha256"] == sha256(texts.pipeline(**SHORT, **fields).frames[0])
    other = {**fields, "prompt": "a green plus"}
    assert done["frames_sha256"] != sha256(texts.pipeline(**SHORT, **other).frames[0])
    assert {name: done[name] for name in ("prompt", "negative_prompt")} == {
        "prompt": fields["prompt"],
        "negative_prompt": fields.get("negative_prompt"),
    }


def test_a_form_and_a_longer_video_keep_their_prompts(texts: Served) -> None:
    form = {name: (None, str(value)) for name, value in {**SHORT, "prompt": "a red ring"}.items()}
    answer = texts.client.post("/v1/videos", files=form)
    assert answer.status_code == 202, answer.text
    done = texts.wait(answer.json())
    assert done["frames_sha256"] == sha256(texts.pipeline(**SHORT, prompt="a red ring").frames[0])
    for prompt in (None, "a blue disc"):
        body = {"video": {"id": done["id"]}, "seconds": "0.5", "prompt": prompt}
        longer = texts.client.post("/v1/videos/extensions", json=body).json()
        assert (longer["prompt"], longer["given_frames"]) == (prompt or "a red ring", 6)
        texts.wait(longer)
    changing = texts.wait(texts.ask(**SHORT, prompt="a red ring", conditions=[{"frame": 3, "prompt": "a plus"}]))
    for prompt in (None, "a blue disc"):
        body = {"video": {"id": changing["id"]}, "seconds": "0.5", "prompt": prompt}
        longer = texts.client.post("/v1/videos/extensions", json=body).json()
        assert (longer["prompt"], longer["conditions"]) == (prompt or "a plus", [])
        texts.wait(longer)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"model": "plain", "prompt": "a red car"},
            "prompt",
            "has classes 0..2 (disc, ring, square), and takes no text",
        ),
        (
            {"model": "plain", "negative_prompt": "a", "guidance_scale": 2.0},
            "negative_prompt",
            "the model takes no text",
        ),
        ({"model": "plain", "conditions": [{"frame": 1, "prompt": "a"}]}, "conditions", "the model takes no text"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": ["a", "b"]}, "prompt", "valid string"),
        ({"prompt": "a" * 100_000}, "prompt", f"at most {MAX_PROMPT_LENGTH} characters"),
        (
            {"negative_prompt": "a" * 100_000, "guidance_scale": 2.0},
            "negative_prompt",
            f"at most {MAX_PROMPT_LENGTH} characters",
        ),
        ({"conditions": [{"frame": 1, "prompt": "a" * 100_000}]}, "conditions", "at most"),
        ({"prompt": "one two three four five six seven eight nine"}, "prompt", "more than the 8 tokens that are read"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt", "set guidance_scale above 1"),
        ({"conditions": [{"frame": i, "prompt": f"a {i}"} for i in range(5)]}, "conditions", "5 texts: at most 4"),
    ],
)
def test_a_bad_prompt_is_rejected_before_anything_is_computed(
    texts: Served, fields: dict[str, Any], param: str, reason: str
) -> None:
    encoder = texts.pipeline.text._encoder
    assert isinstance(encoder, ToyEncoder)
    known, videos = len(encoder.calls), texts.client.get("/v1/videos").json()["data"]
    for path in ("/v1/videos", "/v1/videos:stream"):
        answer = texts.client.post(path, json={**SHORT, **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, param), error
        assert reason in error["message"]
        assert len(error["message"]) < 500
    assert len(encoder.calls) == known
    assert texts.client.get("/v1/videos").json()["data"] == videos


def test_a_prompt_names_a_class_for_a_model_without_text(texts: Served) -> None:
    done = texts.wait(texts.ask(model="plain", prompt="ring", **SHORT))
    assert (done["class_label"], done["prompt"]) == (1, "ring")
    listed = texts.client.get("/v1/models").json()["data"]
    assert {model["id"]: model["text"] for model in listed} == {"text": True, "plain": False}


def test_long_prompts_are_cut_off_by_default(make_pipeline: MakePipeline, serve: Serve) -> None:
    served = serve(pipelines={"text": make_pipeline(text_encoder=ToyEncoder(), **TEXT)})
    long = "one two three four five six seven eight nine"
    done = served.wait(served.ask(prompt=long, **SHORT))
    expected = served.pipeline(prompt=long.removesuffix(" nine"), **SHORT).frames[0]
    assert done["frames_sha256"] == sha256(expected)


def test_the_command_line_sends_prompts(texts: Served, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-frames", "6", "--num-inference-steps", "4", "--ar-step", "2", "--seed", "3"]
    prompts = ["--prompt", "a red ring", "--negative-prompt", "a disc", "--guidance-scale", "2"]
    changes = ["--conditions", json.dumps([{"frame": 2, "prompt": "a plus"}])]
    assert main(["client", "--url", texts.url, "create", *options, *prompts, *changes]) == 0
    done = texts.wait({"id": capsys.readouterr().out.strip()})
    settings = {
        "prompt": "a red ring",
        "negative_prompt": "a disc",
        "guidance_scale": 2.0,
        "conditions": [(2, "a plus")],
    }
    assert done["frames_sha256"] == sha256(texts.pipeline(**SHORT, **settings).frames[0])


@pytest.mark.parametrize("wrong", ["missing", "unnamed"])
def test_a_service_does_not_start_without_its_text_encoder(
    make_pipeline: MakePipeline, tmp_path: Path, wrong: str
) -> None:
    encoder = ToyEncoder()
    encoder.uri = str(tmp_path / "gone")
    make_pipeline(text_encoder=encoder if wrong == "missing" else None, **TEXT).save_pretrained(str(tmp_path / "model"))
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    reason = f"There is no text encoder in {encoder.uri}" if wrong == "missing" else "names no text encoder"
    with pytest.raises(ConfigError, match=rf"^The model story cannot be served: .*{reason}.*text_encoder\.uri"):
        Replica({"story": pipeline}, ServiceConfig(storage=str(tmp_path)), PrometheusRecorder(), "a")
