"""Requests that one engine begins and another continues, bit for bit."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from toy_text import WIDTH, encoded

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.student import Student
from ardiff.dit import DiT
from ardiff.errors import DecodeError
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import FrameCondition, expand_params
from ardiff.sampling.request import SampleRequest
from ardiff.sampling.saved import SavedState

DIFFUSION = DiffusionConfig(prediction="v")
STUDENT = DiffusionConfig(student=Student(timesteps=(999, 842, 614, 303), num_steps=2, guidance=1.5))
LONG = {"num_frames": 13, "ar_step": 2}
"""More frames than the window of the model, 8."""
CHANGES = [FrameCondition(frame=3, class_label=2), FrameCondition(frame=8, class_label=None, guidance_scale=3.0)]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one window": ({}, {"num_frames": 8, "ar_step": 1}),
    "all together": ({}, {"num_frames": 8, "ar_step": 0, "given_frames": 3}),
    "one after another": ({}, {**LONG, "ar_step": 3, "solver": "unipc"}),
    "long": ({}, {**LONG, "guidance_scale": 2.0, "solver": "dpmpp_2m"}),
    "two videos": ({}, {**LONG, "seed": [1, 2], "class_label": [0, None], "guidance_scale": 2.0}),
    "sink and stride": ({}, {**LONG, "sink_frames": 2, "window_stride": 3, "solver": "unipc"}),
    "given frames fill the window": ({}, {**LONG, "sink_frames": 2, "given_frames": 9, "num_frames": 15}),
    "changes": ({}, {**LONG, "conditions": CHANGES, "guidance_scale": 2.0}),
    "rolling": (
        {"attention_window": 3},
        {**LONG, "num_frames": 24, "ar_step": 1, "mode": "rolling", "given_frames": 2},
    ),
    "rolling without band": ({}, {"num_frames": 8, "ar_step": 2, "mode": "rolling"}),
    "condition tokens": (
        {"condition": "tokens", "positions": "sincos", "condition_tokens": 3, "condition_dim": 5},
        {**LONG, "guidance_scale": 1.5},
    ),
}


def make_request(dtype: torch.dtype = torch.float32, **changes: Any) -> SampleRequest:
    settings = {"class_label": 0, "num_inference_steps": 3, "seed": 5, **changes}
    videos = tuple(expand_params(**settings))
    shape = (len(videos), videos[0].given_frames, 2, 4)
    given = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)) if shape[1] else None
    return SampleRequest(videos=videos, condition=given)


def saved_everywhere(engine: SamplingEngine, request: SampleRequest) -> tuple[Tensor, list[SampleRequest]]:
    """All frames of a request, and after each iteration the request with which another engine continues."""
    request_id, resumed = engine.submit(request), []
    chunks = [] if request.condition is None else [request.condition]
    while True:
        chunks += [frames.latents for frames in engine.step()]
        if not engine.busy:
            return torch.cat(chunks, dim=1), resumed
        state = SavedState.from_bytes(engine.save(request_id).to_bytes())
        resumed.append(replace(request, resume=state, condition=torch.cat(chunks, dim=1) if chunks else None))


def run_beside(engine: SamplingEngine, request: SampleRequest, other: SampleRequest) -> Tensor:
    """All frames of a request that starts while another one runs."""
    engine.submit(other)
    engine.step()
    request_id, chunks = engine.submit(request), [] if request.condition is None else [request.condition]
    while engine.busy:
        chunks += [frames.latents for frames in engine.step() if frames.request_id == request_id]
    return torch.cat(chunks, dim=1)


def next_state(engine: SamplingEngine, request: SampleRequest) -> SavedState:
    """The state of a request after one more iteration."""
    request_id = engine.submit(request)
    while engine.iterations.get(request_id, 0) <= request.iteration:
        engine.step()
    return engine.save(request_id)


@pytest.mark.parametrize("attention", ["ragged", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_another_engine_continues_after_any_iteration(make_dit: Callable[..., DiT], case: str, attention: Any) -> None:
    changes, settings = CASES[case]
    model, config = make_dit(**changes), EngineConfig(attention_backend=attention)
    whole, resumed = saved_everywhere(SamplingEngine(model, DIFFUSION, config), make_request(**settings))
    assert len(resumed) > 5 or settings["ar_step"] == 0
    for request, following in itertools.pairwise(resumed):
        state = next_state(SamplingEngine(model, DIFFUSION, config), request)
        assert following.resume is not None
        assert torch.equal(state.moving, following.resume.moving), request.iteration
    request, other = resumed[len(resumed) // 2], make_request(num_frames=9, seed=8)
    assert torch.equal(SamplingEngine(model, DIFFUSION, config).run(request), whole)
    assert torch.equal(run_beside(SamplingEngine(model, DIFFUSION, config), request, other), whole)


def test_another_engine_continues_a_student(make_dit: Callable[..., DiT]) -> None:
    """Its solver draws later noise when a frame starts."""
    model = make_dit()
    whole, resumed = saved_everywhere(
        SamplingEngine(model, STUDENT), make_request(num_frames=10, num_inference_steps=3)
    )
    for request in resumed[1::7]:
        assert torch.equal(SamplingEngine(model, STUDENT).run(request), whole)


def test_another_engine_continues_with_texts_that_changed_meanwhile(make_dit: Callable[..., DiT]) -> None:
    model = make_dit(condition="cross_attention", condition_dim=WIDTH)
    texts, settings = encoded("a ring", "a square"), {**LONG, "guidance_scale": 2.0}
    request = replace(make_request(prompt="a ring", **settings), prompts=texts)
    engine = SamplingEngine(model, DIFFUSION)
    request_id = engine.submit(request)
    chunks = [frames.latents for _ in range(9) for frames in engine.step()]
    frame = engine.change(request_id, {"prompt": "a square"}, texts)
    chunks += [frames.latents for _ in range(4) for frames in engine.step()]
    conditions = [FrameCondition(frame=frame, prompt="a square")] if frame else []
    changed = replace(make_request(prompt="a ring", conditions=conditions, **settings), prompts=texts)
    resumed = replace(changed, resume=engine.save(request_id), condition=torch.cat(chunks, dim=1))
    while engine.busy:
        chunks += [frames.latents for frames in engine.step()]
    assert torch.equal(SamplingEngine(model, DIFFUSION).run(resumed), torch.cat(chunks, dim=1))


def test_damaged_and_foreign_states_are_rejected(make_dit: Callable[..., DiT]) -> None:
    engine, request = SamplingEngine(make_dit(), DIFFUSION), make_request(num_frames=6, ar_step=1)
    _, resumed = saved_everywhere(engine, request)
    state = resumed[3].resume
    assert state is not None
    with pytest.raises(DecodeError, match="damaged"):
        SavedState.from_bytes(state.to_bytes()[:-5])
    with pytest.raises(DecodeError, match="Expected the tensors iteration, moving, got other"):
        SavedState.from_bytes(save({"other": torch.zeros(1)}))
    with pytest.raises(DecodeError, match="no number of iterations"):
        SavedState.from_bytes(save({"iteration": torch.zeros(2), "moving": state.moving}))
    for change, reason in (
        ({"resume": replace(state, moving=state.moving[:, 1:])}, "the moving frames of the saved state must be"),
        ({"resume": replace(state, iteration=99)}, "has 99 iterations of 8"),
        ({"condition": None}, "condition must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine.submit(replace(resumed[3], **change))
    assert not engine.busy
