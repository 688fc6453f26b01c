"""Random requests that share attention calls, against the plain sampler: they start at any time, change their
condition, move to a later engine, are cancelled, or fail together."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.student import Student
from ardiff.dit import DiT
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import FrameCondition, InvalidParamError, expand_params
from ardiff.sampling.request import SampleRequest

STUDENT = DiffusionConfig(student=Student(timesteps=(999, 842, 614, 303), num_steps=2, guidance=1.5))
KINDS: dict[str, tuple[dict[str, Any], DiffusionConfig]] = {
    "standard": ({}, DiffusionConfig(prediction="v")),
    "band": ({"attention_window": 3}, DiffusionConfig()),
    "tokens": (
        {"condition": "tokens", "positions": "sincos", "condition_tokens": 3, "condition_dim": 5},
        DiffusionConfig(),
    ),
    "student": ({}, STUDENT),
}
ROUNDS = 40


@dataclass
class Video:
    """A request with all changes so far, and its frames so far."""

    request: SampleRequest
    chunks: list[Tensor] = field(default_factory=list)

    @property
    def frames(self) -> Tensor:
        return torch.cat(self.chunks, dim=1)


def random_request(draw: random.Random, kind: str, window: int) -> SampleRequest:
    """Any valid request of up to three videos; few lengths, so that caches of equal capacity are common."""
    num_frames, count = draw.choice([1, 3, window, window, window + 5, window + 5]), draw.choice([1, 1, 2, 3])
    settings: dict[str, Any] = {"num_frames": num_frames, "num_inference_steps": draw.choice([2, 3])}
    settings["given_frames"] = draw.choice([0, 0, 0, min(2, num_frames - 1), num_frames - 1])
    settings["class_label"] = [draw.choice([0, 1, 2, None]) for _ in range(count)]
    settings["seed"] = [draw.randrange(1000) for _ in range(count)]
    if kind == "student":
        settings["num_inference_steps"] = 2
    else:
        settings["guidance_scale"] = draw.choice([1.0, 1.0, 2.0])
        settings["solver"] = draw.choice(["ddim", "dpmpp_2m", "unipc"])
    long = num_frames > window
    settings["ar_step"] = draw.choice([1, 2] if long else [0, 1, 2])
    if kind == "band":
        settings["mode"] = draw.choice(["window", "rolling"])
    if long and kind == "standard" and draw.random() < 0.6:
        settings |= {"sink_frames": draw.choice([1, 2]), "window_stride": draw.choice([1, 3])}
    videos = tuple(expand_params(**settings))
    shape, generator = (count, settings["given_frames"], 2, 4), torch.Generator().manual_seed(draw.randrange(1000))
    condition = torch.randn(shape, dtype=torch.float64, generator=generator) if shape[1] else None
    return SampleRequest(videos=videos, condition=condition)


def expected_frames(models: dict[str, DiT], diffusion: DiffusionConfig, video: Video) -> Tensor:
    model = models[video.request.params.mode]
    videos = tuple(replace(params, mode="full") for params in video.request.videos)
    return torch.cat(list(stream_request(model, diffusion, replace(video.request, videos=videos))), dim=1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_any_course_of_events_gives_the_videos_of_the_plain_sampler(
    make_dit: Callable[..., DiT], monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    draw, (changes, diffusion) = random.Random(f"{kind} {seed}"), KINDS[kind]
    model = make_dit(**changes).double()
    long = {"num_frames": model.config.num_frames + 5} if kind == "band" else {}
    plain = {"window": model, "rolling": make_dit(**changes, **long).double()}  # equal weights, all frames in one pass
    engine = SamplingEngine(model, diffusion, EngineConfig(attention_backend="stacked", max_requests=6))
    running, finished, happened = dict[int, Video](), list[Video](), list[str]()

    def submit() -> None:
        for _ in range(20):  # some combinations are not valid
            request = random_request(draw, kind, model.config.num_frames)
            try:
                request = engine.check(request)
            except InvalidParamError:
                continue
            given = [] if request.condition is None else [request.condition]
            running[engine.submit(request)] = Video(request, given)
            return
        raise AssertionError("no request is valid")

    def change(request_id: int) -> None:
        values = draw.choice([{"class_label": 2}, {"class_label": None}, {"guidance_scale": 3.0}])
        try:
            frame = engine.change(request_id, values)
        except InvalidParamError:
            return
        if frame is not None:
            happened.append("change")
            video, condition = running[request_id], FrameCondition(frame=frame, **values)
            changed = tuple(params.with_change(condition) for params in video.request.videos)
            video.request = replace(video.request, videos=changed)

    def resume(request_id: int) -> None:
        if engine.iterations.get(request_id, 0) > 0:
            happened.append("resume")
            state, video = engine.save(request_id), running.pop(request_id)
            engine.cancel(request_id)
            condition = video.frames if video.chunks else None
            running[engine.submit(replace(video.request, resume=state, condition=condition))] = video

    def cancel(request_id: int) -> None:
        happened.append("cancel")
        assert engine.cancel(request_id)
        del running[request_id]

    def fail() -> None:
        def raise_error(*arguments: Any) -> None:
            raise RuntimeError("a failed iteration")

        with monkeypatch.context() as broken:
            broken.setattr(engine._model, "forward_frames", raise_error)
            with pytest.raises(RuntimeError, match="a failed iteration"):
                engine.step()
        for request_id in list(running):
            cancel(request_id)
        happened.append("fail")

    def step() -> None:
        for event in engine.step():
            running[event.request_id].chunks.append(event.latents)
            if event.done:
                finished.append(running.pop(event.request_id))

    for _ in range(ROUNDS):
        if len(running) < 8 and draw.random() < 0.6:
            submit()
        event = draw.choices([step, change, resume, cancel, fail], [12, 3, 3, 1, 0.3])[0]
        if event in (change, resume, cancel) and running:
            event(draw.choice(list(running)))  # type: ignore[call-arg]
        elif event is fail and running:
            fail()
        step()
    while engine.busy:
        step()
    assert not running
    assert {"resume", "cancel"} <= set(happened)
    assert len(finished) > 8
    for video in finished:
        expected = expected_frames(plain, diffusion, video)
        error = (video.frames - expected).abs().max()
        assert error <= 1e-9 * max(1.0, float(expected.abs().max())), video.request
