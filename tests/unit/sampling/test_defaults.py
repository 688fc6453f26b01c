"""A model's own defaults of sampling parameters."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.sampling_defaults import SamplingDefaults
from ardiff.diffusion.student import Student
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.params import ModelInfo, SamplingParams, validate
from ardiff.train.tasks.config import DistillTaskConfig
from ardiff.train.tasks.distill import diffusion_of_student

OWN = SamplingDefaults(num_inference_steps=20, ar_step=5)
INFO = ModelInfo(num_frames=16, num_classes=0, num_timesteps=1000, sampling_defaults=OWN)


@pytest.mark.parametrize(
    ("given", "steps", "ar_step"),
    [
        ({}, 20, 5),
        ({"num_inference_steps": 50}, 50, 13),  # a quarter of the steps, as 5 of 20
        ({"num_inference_steps": 1}, 1, 1),
        ({"ar_step": 0}, 20, 0),
        ({"num_inference_steps": 50, "ar_step": 5}, 50, 5),
        ({"num_frames": 17, "num_inference_steps": 40, "window_stride": 5}, 40, 10),
        ({"num_frames": 17, "num_inference_steps": 40, "window_stride": 15}, 40, 20),  # the smallest that is possible
    ],
)
def test_what_a_request_leaves_out(given: dict[str, Any], steps: int, ar_step: int) -> None:
    params = validate(SamplingParams(**given), INFO)
    assert (params.num_inference_steps, params.ar_step, params.solver) == (steps, ar_step, "ddim")


def test_without_own_defaults_they_are_those_of_the_paper() -> None:
    params = validate(SamplingParams(), replace(INFO, sampling_defaults=None))
    assert (params.num_inference_steps, params.ar_step) == (50, 5)


def test_they_travel_with_the_pipeline(tmp_path: Path, make_pipeline: Callable[..., ARDiffusionPipeline]) -> None:
    make_pipeline().save_pretrained(str(tmp_path / "usual"))
    make_pipeline(sampling_defaults=OWN).save_pretrained(str(tmp_path / "own"))
    usual, own = (json.loads((tmp_path / name / "config.json").read_text())["diffusion"] for name in ("usual", "own"))
    assert own == usual | {"sampling_defaults": {"num_inference_steps": 20, "ar_step": 5}}
    assert "sampling_defaults" not in usual  # so that folders of before are equal
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path / "own"))
    explicit = ARDiffusionPipeline.from_pretrained(str(tmp_path / "usual"))(num_inference_steps=20, ar_step=5)
    assert torch.equal(pipeline().frames, explicit.frames)


def test_a_student_has_its_own() -> None:
    teacher = DiffusionConfig(sampling_defaults=OWN)
    student = diffusion_of_student(DistillTaskConfig(), teacher)
    assert student == diffusion_of_student(DistillTaskConfig(), DiffusionConfig())
    with pytest.raises(ValueError, match="not for students"):
        replace(teacher, student=Student(timesteps=(999,)))


def test_what_is_out_of_range_is_an_error() -> None:
    for values in ({"ar_step": 51}, {"ar_step": -1}, {"num_inference_steps": 0, "ar_step": 0}):
        with pytest.raises(ValueError, match="ar_step between 0 and num_inference_steps, got"):
            SamplingDefaults(**values)
    with pytest.raises(ValueError, match="must be at most num_timesteps, 10"):
        DiffusionConfig(num_timesteps=10, sampling_defaults=OWN)
