"""Predicted costs equal those that the engine and the plain sampler measure."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.ar_step import smallest_ar_step
from ardiff.diffusion.config import DiffusionConfig
from ardiff.sampling.cost import frame_evaluations, sequential_passes
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import SamplingMode, SamplingParams, expand_params
from ardiff.sampling.request import SampleRequest


@pytest.mark.parametrize("mode", ["window", "rolling"])
@pytest.mark.parametrize("given", [0, 3])
@pytest.mark.parametrize(("frames", "steps"), [(1, 4), (5, 6), (8, 6), (9, 6), (20, 6), (20, 3)])
def test_the_engine_evaluates_as_many_frames(
    make_dit: Any, mode: SamplingMode, given: int, frames: int, steps: int
) -> None:
    check_cost(make_dit, steps, SamplingParams(num_frames=frames, mode=mode, given_frames=min(given, frames - 1)))


@pytest.mark.parametrize("given", [0, 3, 8, 12])
@pytest.mark.parametrize(("sink", "stride"), [(1, 1), (4, 1), (0, 3), (2, 5)])
def test_a_sink_is_evaluated_once_and_a_stride_saves_evaluations(
    make_dit: Any, sink: int, stride: int, given: int
) -> None:
    check_cost(make_dit, 4, SamplingParams(num_frames=20, sink_frames=sink, window_stride=stride, given_frames=given))


def check_cost(make_dit: Any, steps: int, params: SamplingParams) -> None:
    """Every valid ``ar_step`` with a window of 8 frames, two videos."""
    model, given = make_dit(attention_window=8), params.given_frames
    condition = torch.zeros(2, given, 2, 4) if given else None
    window = 8 if params.mode == "window" else None
    smallest = smallest_ar_step(params.num_frames, steps, window, params.sink_frames, params.window_stride)
    for ar_step in range(smallest, steps + 1):
        params = replace(params, num_inference_steps=steps, ar_step=ar_step)
        engine = SamplingEngine(model, DiffusionConfig())
        videos = tuple(expand_params(params, class_label=[0, 1], seed=[0, 1]))
        engine.run(SampleRequest(videos=videos, condition=condition))
        assert engine.frame_evaluations == 2 * frame_evaluations(params, 8), ar_step


def test_guidance_costs_a_second_branch() -> None:
    params = SamplingParams(num_frames=8, num_inference_steps=5, ar_step=5)
    [guided] = expand_params(params, guidance_scale=2.5)
    assert frame_evaluations(params, 8) == 8 * 5 + 7
    assert frame_evaluations(guided, 8) == 2 * (8 * 5 + 7)


def test_published_costs_of_long_videos() -> None:
    """Per frame and branch of 512 frames in 4 steps: most of it is the clean frames of a window that moves."""
    params = SamplingParams(num_frames=512, num_inference_steps=4, ar_step=1)
    for sink, expected in ((0, [15.65, 9.84, 6.94, 5.48]), (1, [14.69, 9.36, 6.69, 5.36])):
        settings = [replace(params, sink_frames=sink, window_stride=stride) for stride in (1, 2, 4, 8)]
        assert [frame_evaluations(p, 16) / 512 for p in settings] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("frames", "ar_step"), [(8, 0), (8, 5), (20, 2)])
@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize(("sink", "stride"), [(0, 1), (2, 1), (0, 5), (1, 3)])
def test_the_plain_sampler_evaluates_every_visible_frame(
    frames: int, ar_step: int, given: int, sink: int, stride: int
) -> None:
    schedule = ad_schedule(frames, 6, ar_step, 8, given, sink, stride)
    params = SamplingParams(num_frames=frames, num_inference_steps=6, ar_step=ar_step, mode="full", given_frames=given)
    params = replace(params, sink_frames=sink, window_stride=stride)
    assert schedule.window is not None
    assert len(schedule.update) == sequential_passes(params)
    visible = int((schedule.window[:, 1] - schedule.window[:, 0]).sum())
    assert frame_evaluations(params, 8) == visible == sum(len(schedule.visible(n)) for n in range(len(schedule.update)))
