"""Changes of the condition while a video is generated equal those that are known before, bit for bit."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toy_text import ToyEncoder, encoded

from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.control import LiveControl
from ardiff.sampling.params import FrameCondition, expand_params
from ardiff.sampling.request import SampleRequest

SETTINGS: dict[str, Any] = {"num_frames": 20, "num_inference_steps": 4, "ar_step": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline(make_pipeline) -> ARDiffusionPipeline:
    return make_pipeline(condition="cross_attention", condition_dim=5, attention_window=6, text_encoder=ToyEncoder())


def run(pipeline: ARDiffusionPipeline, control: LiveControl, changes: dict[int, Any], **settings: Any) -> Any:
    """Latents of a stream in which each change is set when so many frames are final, and what ``set`` returned."""
    frames, returned = [], []
    for latents in pipeline.stream_latents(control=control, **{**SETTINGS, **settings}):
        frames.append(latents)
        count = sum(chunk.shape[1] for chunk in frames)
        if count in changes:
            returned.append(control.set(**changes.pop(count)))
    assert not changes
    return torch.cat(frames, dim=1), returned


@pytest.mark.parametrize("mode", ["window", "rolling"])
def test_live_changes_equal_known_changes_bit_for_bit(pipeline: ARDiffusionPipeline, mode: str) -> None:
    changes = {2: {"prompt": "a square"}, 9: {"class_label": 2, "guidance_scale": 3.0}, 12: {"prompt": "a red ring"}}
    settings = {"prompt": ["a ring", "a disc"], "seed": [0, 1], "mode": mode, "class_label": 1}
    live, frames = run(pipeline, LiveControl(), dict(changes), **settings)
    assert frames == [3, 10, 13]  # a frame that has started is not final yet
    conditions = list(zip(frames, changes.values(), strict=True))
    known = torch.cat(list(pipeline.stream_latents(**SETTINGS, **settings, conditions=conditions)), dim=1)
    assert torch.equal(live, known)
    plain = torch.cat(list(pipeline.stream_latents(**SETTINGS, **settings)), dim=1)
    assert torch.equal(live[:, :3], plain[:, :3])
    assert not torch.equal(live[:, 3:], plain[:, 3:])


def test_scheduled_changes_stay_and_the_last_of_two_for_a_frame_wins(pipeline: ARDiffusionPipeline) -> None:
    control = LiveControl()
    assert control.set(prompt="never seen") == 0
    assert control.set(prompt="a ring") == 0
    frames = []
    for latents in pipeline.stream_latents(control=control, conditions=[(15, "a disc")], **SETTINGS):
        frames.append(latents)
        if len(frames) == 3:
            assert control.set(prompt="lost") == control.set(prompt="a square") == 4
    expected = pipeline.stream_latents(prompt="a ring", conditions=[(4, "a square"), (15, "a disc")], **SETTINGS)
    assert torch.equal(torch.cat(frames, dim=1), torch.cat(list(expected), dim=1))


def test_another_thread_sets(pipeline: ARDiffusionPipeline) -> None:
    control, returned = LiveControl(), []
    first, done = threading.Event(), threading.Event()

    def change() -> None:
        first.wait()
        returned.append(control.set(prompt="a square"))
        done.set()

    def frames() -> Iterator[torch.Tensor]:
        for latents in pipeline.stream_latents(prompt="a ring", control=control, **SETTINGS):
            yield latents
            first.set()

    thread = threading.Thread(target=change)
    thread.start()
    latents = torch.cat(list(frames()), dim=1)
    thread.join()
    assert done.is_set()
    conditions = [] if returned[0] is None else [(returned[0], "a square")]
    known = pipeline.stream_latents(prompt="a ring", conditions=conditions, **SETTINGS)
    assert torch.equal(latents, torch.cat(list(known), dim=1))


def test_changes_that_come_too_late_or_are_not_valid(pipeline: ARDiffusionPipeline) -> None:
    control, counts = LiveControl(), []
    for latents in pipeline.stream_latents(prompt="a ring", control=control, **{**SETTINGS, "guidance_scale": 1.0}):
        counts.append(latents.shape[1])
        if sum(counts) == 3:
            with pytest.raises(ValueError, match="class_label 7 is out of range"):
                control.set(class_label=7)
            with pytest.raises(ValueError, match="guidance is off in this request"):
                control.set(guidance_scale=2.0)
            with pytest.raises(TypeError, match="at least one of prompt, class_label, guidance_scale, got seed"):
                control.set(seed=3)
            with pytest.raises(TypeError, match="got nothing"):
                control.set()
        if sum(counts) == 19:
            assert control.set(prompt="a square") is None  # the last frame has started
    assert control.set(prompt="a square") is None
    with pytest.raises(ValueError, match="for one stream"):
        next(pipeline.stream(control=control, **SETTINGS))
    with pytest.raises(ValueError, match="needs mode=window or mode=rolling"):
        next(pipeline.stream(control=LiveControl(), mode="full", **SETTINGS))
    broken = LiveControl()
    with pytest.raises(ValueError, match="num_inference_steps"):
        next(pipeline.stream(control=broken, num_inference_steps=0))
    assert broken.set(prompt="a ring") == 0  # no stream has started


def test_many_changes_need_constant_memory(pipeline: ARDiffusionPipeline) -> None:
    """Prompts and conditions of frames that will not be evaluated again are dropped."""
    engine = pipeline.engine()
    settings = {**SETTINGS, "num_frames": 120}
    request = SampleRequest(videos=tuple(expand_params(prompt="a ring", **settings)), prompts=encoded("a ring"))
    request_id, sizes = engine.submit(request), []
    while engine.busy:
        for event in engine.step():
            text = f"ring number {event.first_frame}"
            if engine.change(request_id, {"prompt": text}, encoded(text)) is not None:
                request = engine._running[request_id].request
                sizes.append((len(request.prompts), len(request.starts), engine.num_bytes([request])))
    assert len(sizes) > 100
    assert max(sizes[20:]) == max(sizes[60:])
    assert len(engine._shared.prompts) < 40


def test_a_request_that_waits_is_changed_too(pipeline: ARDiffusionPipeline) -> None:
    engine = pipeline.engine(EngineConfig(max_requests=1))
    first, second = (
        engine.submit(SampleRequest(videos=tuple(expand_params(seed=seed, **SETTINGS)))) for seed in (0, 1)
    )
    engine.step()
    assert engine.change(second, {"prompt": "a ring"}, encoded("a ring")) == 0
    results: dict[int, list[torch.Tensor]] = {first: [], second: []}
    while engine.busy:
        for event in engine.step():
            results[event.request_id].append(event.latents)
    expected = torch.cat(list(pipeline.stream_latents(seed=1, conditions=[(0, "a ring")], **SETTINGS)), dim=1)
    assert torch.equal(torch.cat(results[second], dim=1), expected)
    assert engine.change(second, {"prompt": "a ring"}, {}) is None


def test_videos_whose_conditions_differ_are_changed_together(pipeline: ARDiffusionPipeline) -> None:
    engine = pipeline.engine()
    settings = {**SETTINGS, "num_frames": 40, "guidance_scale": 2.0, "seed": [0, 1]}
    stronger = [[], [FrameCondition(frame=5, guidance_scale=3.0)]]
    request_id = engine.submit(SampleRequest(videos=tuple(expand_params(conditions=stronger, **settings))))
    for _ in range(60):
        engine.step()
    assert engine.change(request_id, {"prompt": "a ring"}, encoded("a ring")) is not None


def test_changes_of_guidance_need_constant_memory(pipeline: ARDiffusionPipeline) -> None:
    engine = pipeline.engine()
    settings = {**SETTINGS, "num_frames": 60, "guidance_scale": 2.0}
    request_id, sizes = engine.submit(SampleRequest(videos=tuple(expand_params(**settings)))), []
    while engine.busy:
        for event in engine.step():
            if engine.change(request_id, {"guidance_scale": 1.0 + event.first_frame % 2}) is not None:
                sizes.append(len(engine._running[request_id].request.starts))
    assert len(sizes) > 40
    assert max(sizes[10:]) == max(sizes[20:]) < 20
