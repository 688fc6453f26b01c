"""Costs that are foretold are those that the engine has."""

from typing import Any

import pytest

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.ar_step import smallest_ar_step
from ardiff.diffusion.config import DiffusionConfig
from ardiff.sampling import SampleRequest, SamplingEngine
from ardiff.sampling.cost import frame_evaluations, sequential_passes


@pytest.mark.parametrize("executor", ["window", "rolling"])
@pytest.mark.parametrize(("frames", "steps"), [(1, 4), (5, 6), (8, 6), (9, 6), (30, 6), (30, 3)])
def test_the_engine_evaluates_as_many_frames(make_dit: Any, executor: str, frames: int, steps: int) -> None:
    model = make_dit(attention_window=8)
    window = 8 if executor == "window" else None
    for ar_step in range(smallest_ar_step(frames, steps, window), steps + 1):
        engine = SamplingEngine(model, DiffusionConfig())
        engine.run(
            SampleRequest(
                class_labels=(0, 1),
                seeds=(0, 1),
                num_frames=frames,
                ar_step=ar_step,
                num_inference_steps=steps,
                executor=executor,  # type: ignore[arg-type]
            )
        )
        assert engine.frame_evaluations == 2 * frame_evaluations(frames, steps, ar_step, 8, executor), ar_step


@pytest.mark.parametrize(("frames", "ar_step"), [(8, 0), (8, 5), (20, 2)])
def test_the_plain_sampler_evaluates_every_visible_frame(frames: int, ar_step: int) -> None:
    schedule = ad_schedule(frames, 6, ar_step, 8)
    assert schedule.window is not None
    assert len(schedule.update) == sequential_passes(frames, 6, ar_step)
    visible = int((schedule.window[:, 1] - schedule.window[:, 0]).sum())
    assert frame_evaluations(frames, 6, ar_step, 8, "full") == visible
