"""Condition tokens before the frames in the packed engine, against the plain sampler."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT
from ardiff.sampling.cache import FrameCache
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import expand_params
from ardiff.sampling.request import SampleRequest

DIFFUSION = DiffusionConfig()
TOKENS = {"condition_tokens": 3, "condition_dim": 5}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"condition": "tokens", "positions": "sincos", **TOKENS},
    "band": {"condition": "tokens", "positions": "sincos", "attention_window": 3, **TOKENS},
    "upstream": {"kind": "upstream", "condition_attention": "self", **TOKENS},
    "first_class": {"kind": "upstream", "condition_attention": "self", "guidance_null": "first_class", **TOKENS},
}


def make_request(condition: torch.Tensor | None = None, **changes: Any) -> SampleRequest:
    given = 0 if condition is None else condition.shape[1]
    settings = {"num_frames": 6, "ar_step": 2, "num_inference_steps": 6, "solver": "ddim", "given_frames": given}
    return SampleRequest(videos=tuple(expand_params(**{**settings, **changes})), condition=condition)


def full(model: DiT, request: SampleRequest) -> torch.Tensor:
    videos = tuple(replace(video, mode="full") for video in request.videos)
    return torch.cat(list(stream_request(model, DIFFUSION, replace(request, videos=videos))), dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["ragged", "masked", "stacked", "flex"])
def test_the_engine_equals_full(make_dit: Any, kind: str, attention: Any) -> None:
    model = make_dit(**KINDS[kind]).double()
    given = torch.randn(2, 2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sink = {"sink_frames": 2, "window_stride": 2} if "attention_window" not in KINDS[kind] else {}
    videos = {"class_label": [2, None], "seed": [0, 1]}
    for request in (
        make_request(**videos),
        make_request(**videos, num_frames=14, guidance_scale=2.0, solver="dpmpp_2m", **sink),
        make_request(given, **videos, num_frames=8, ar_step=0, guidance_scale=2.0),
        make_request(**videos, conditions=[(0, {"guidance_scale": 3.0})]),
        make_request(**videos, guidance_scale=2.0, conditions=[(3, {"guidance_scale": 3.0})]),
    ):
        engine = SamplingEngine(model, DIFFUSION, EngineConfig(attention_backend=attention))
        assert (engine.run(request) - full(model, request)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["standard", "upstream"])
def test_packed_float32_equals_full(make_dit: Any, kind: str) -> None:
    model = make_dit(**KINDS[kind])
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(backend="packed"))
    requests = [make_request(class_label=c, num_frames=12, guidance_scale=1.0 + c) for c in range(3)]
    results: dict[int, list[torch.Tensor]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            results[event.request_id].append(event.latents)
    for request, frames in zip(requests, results.values(), strict=True):
        assert (torch.cat(frames, dim=1) - full(model, request)).abs().max() < 1e-5


def test_classes_differ(make_dit: Any) -> None:
    engine = SamplingEngine(make_dit(**KINDS["upstream"]), DIFFUSION)
    videos = [engine.run(make_request(class_label=label)) for label in (0, 1, None)]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(videos, videos[1:] + videos[:1], strict=True))


def test_they_are_computed_once_and_count_as_memory(make_dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_dit(**KINDS["upstream"]), []
    compute = model.condition_keys_values
    monkeypatch.setattr(model, "condition_keys_values", lambda c: calls.append(c.tolist()) or compute(c))
    engine = SamplingEngine(model, DIFFUSION)
    for label in (1, 1, 2):
        engine.submit(make_request(class_label=label, guidance_scale=2.0))
    while engine.busy:
        engine.step()
    assert sorted(calls) == [[1], [2], [model.null_class]]
    tokens = 2 * 2 * 3 * 16 * 4  # keys and values of two blocks, three tokens of width 16
    frames = FrameCache.num_bytes(replace(model.config, condition_tokens=0), 1, 6, torch.float32)
    table = 6 * model.modulation_width * 4
    request = make_request(class_label=1)
    assert engine.num_bytes([request]) == frames + tokens + table + tokens  # in the cache, and the shared table
    assert engine.num_bytes([request, request]) == 2 * (frames + tokens) + table + tokens


def test_models_whose_tokens_see_the_frames_or_come_from_the_caller_are_refused(make_dit: Any) -> None:
    for changes, message in (
        ({"kind": "upstream", **TOKENS}, r"dit\.condition_attention=all\): sample it with mode=full"),
        ({"kind": "upstream", "condition_attention": "self", "condition_dim": 5}, r"dit\.condition_tokens=0\)"),
    ):
        engine = SamplingEngine(make_dit(**changes), DIFFUSION)
        with pytest.raises(ValueError, match=message):
            engine.submit(make_request(class_label=0))
        assert engine.info.modes == ("full",)


def test_a_class_per_frame_is_refused(make_dit: Any) -> None:
    engine = SamplingEngine(make_dit(**KINDS["standard"]), DIFFUSION)
    changed = make_request(class_label=0, conditions=[(3, {"class_label": 1})])
    with pytest.raises(ValueError, match="hold for the whole video"):
        engine.submit(changed)
