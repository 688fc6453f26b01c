"""Students in the engine against the plain sampler, and what they refuse."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_requests import run_packed
from torch import Tensor

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.sampler import frame_noise, initial_noise, sample_full
from ardiff.diffusion.student import Student
from ardiff.dit import DiT
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import InvalidParamError, ModelInfo, SamplingParams, expand_params, validate
from ardiff.sampling.request import SampleRequest

STUDENT = Student(timesteps=(999, 842, 614, 303), num_steps=2, guidance=1.5)
DIFFUSION = DiffusionConfig(prediction="v", student=STUDENT)
INFO = ModelInfo(num_frames=8, num_classes=3, num_timesteps=1000, student=STUDENT)


def make_request(given: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> SampleRequest:
    """Two videos of 12 frames that start with given frames."""
    videos = expand_params(
        **{"class_label": [0, 1], "seed": [4, 5], "num_frames": 12, "given_frames": given, **changes}
    )
    condition = torch.randn(2, given, 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)) if given else None
    return SampleRequest(videos=tuple(videos), condition=condition)


def reference(model: DiT, request: SampleRequest, window: int | None) -> Tensor:
    params = validate(request.params, ModelInfo.from_configs(model.config, DIFFUSION))
    steps, given = params.resolved_num_inference_steps, params.given_frames
    dtype = next(model.parameters()).dtype
    noise, *later = (initial_noise([4, 5], params.num_frames, 2, 4, step).to(dtype) for step in range(steps))
    denoise = guided_denoiser(model, DIFFUSION, torch.tensor([0, 1]), 1.0)
    schedule = ad_schedule(params.num_frames, steps, steps, window, given, params.sink_frames, params.window_stride)
    return sample_full(denoise, noise, schedule, DIFFUSION, request.condition, "lcm", "distilled", later)


def check_equal(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (result - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": 6},
        {"num_frames": 14, "given": 3},
        {"num_frames": 14, "given": 9, "sink_frames": 1, "window_stride": 3},
    ],
)
def test_window_equals_the_plain_sampler(make_dit: Callable[..., DiT], steps: int, changes: dict[str, int]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model, request = make_dit().to(dtype), make_request(dtype=dtype, num_inference_steps=steps, **changes)
        engine = SamplingEngine(model, DIFFUSION)
        check_equal(engine.run(request), reference(model, request, 8), tolerance)
        assert engine.frame_evaluations == 2 * frame_evaluations(validate(request.params, INFO), 8)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("given", [0, 2])
def test_rolling_equals_one_pass_under_the_band_mask(make_dit: Callable[..., DiT], steps: int, given: int) -> None:
    short, whole = (make_dit(num_frames=frames, attention_window=5).double() for frames in (8, 12))
    request = make_request(given, num_inference_steps=steps, mode="rolling")
    check_equal(SamplingEngine(short, DIFFUSION).run(request), reference(whole, request, None), 1e-10)


def test_packed_requests_equal_each_alone(make_dit: Callable[..., DiT]) -> None:
    """Requests of different steps, lengths and given frames share passes, and one is cancelled."""
    model = make_dit().double()
    requests = [make_request(n % 3, num_inference_steps=1 + n % 4, num_frames=5 + 2 * n) for n in range(6)]
    packed = run_packed(model, DIFFUSION, requests, make_request(num_inference_steps=3, seed=[7, 8]))
    for request, streamed in zip(requests, packed, strict=True):
        alone = SamplingEngine(model, DIFFUSION).run(request)
        check_equal(streamed, alone[:, request.params.given_frames :], 1e-12)


def test_noise_between_steps_depends_on_the_video_alone(make_dit: Callable[..., DiT]) -> None:
    model = make_dit().double()
    both = SamplingEngine(model, DIFFUSION).run(make_request(num_inference_steps=3))
    [video] = expand_params(class_label=1, seed=5, num_frames=9, num_inference_steps=3)
    alone = SamplingEngine(model, DIFFUSION).run(SampleRequest(videos=(video,)))
    check_equal(alone[0, :8], both[1, :8], 1e-12)
    draws = [frame_noise(seed, frame, 2, 4, step) for seed in (0, 1) for frame in (0, 1) for step in (0, 1, 2)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(draws, 2))


def test_a_step_adds_new_noise_to_the_predicted_clean_frame(make_dit: Callable[..., DiT]) -> None:
    """The equation of the solver, for the first frame: the model never sees the same noise twice."""
    model, abar = make_dit().double(), DIFFUSION.alphas_cumprod()
    [video] = expand_params(class_label=1, seed=5, num_frames=1, num_inference_steps=2)
    denoise = guided_denoiser(model, DIFFUSION, torch.tensor([1]), 1.0)
    x = frame_noise(5, 0, 2, 4).double()[None, None]
    for step, t in enumerate((999, 614)):
        if step:
            x = q_sample(x, frame_noise(5, 0, 2, 4, step).double()[None, None], torch.tensor([[t]]), abar)
        x = denoise(x, torch.tensor([[t]]), torch.arange(1))
    check_equal(SamplingEngine(model, DIFFUSION).run(SampleRequest(videos=(video,))), x, 1e-12)


def test_a_call_takes_the_defaults_of_the_student(
    make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Any
) -> None:
    """Also after a round trip through a folder, and in mode full."""
    make_pipeline(student=STUDENT).save_pretrained(str(tmp_path))
    pipeline = ARDiffusionPipeline.from_pretrained(str(tmp_path))
    assert pipeline.diffusion.student == pipeline.info.student == STUDENT
    settings = {"class_label": [0, 1], "seed": [1, 2], "num_frames": 10}
    iterations = []
    frames = pipeline(**settings, callback_on_step_end=lambda *args: iterations.append(args[2].tolist())).frames
    assert len(iterations) == 2 * 10
    assert iterations[0] == [614, *[999] * 9]
    assert torch.equal(frames, pipeline(**settings, num_inference_steps=2, solver="lcm", ar_step=2).frames)
    full = pipeline(**settings, mode="full").frames
    assert (full.int() - frames.int()).abs().max() <= 1
    assert not torch.equal(frames, pipeline(**settings, num_inference_steps=1).frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_inference_steps": 50},
            "student of 1 to 4 steps: leave num_inference_steps out, which is 2, or lower it",
        ),
        ({"solver": "ddim"}, "leave solver out, which is lcm; got ddim"),
        ({"timestep_spacing": "log_snr"}, "leave timestep_spacing out; got log_snr"),
        ({"ar_step": 1}, "leave ar_step out, which is the number of steps, 2; got 1"),
        ({"guidance_scale": 1.5}, r"has learnt guidance of 1\.5: leave guidance_scale at 1"),
        ({"conditions": [(3, {"guidance_scale": 2.0})]}, "leave guidance_scale at 1"),
    ],
)
def test_what_a_student_cannot_do_is_an_error_that_says_what_it_can(changes: dict[str, Any], message: str) -> None:
    [params] = expand_params(**changes)
    with pytest.raises(InvalidParamError, match=message) as error:
        validate(params, INFO)
    assert error.value.param in {*changes, "guidance_scale"}


def test_a_student_takes_no_negative_prompt() -> None:
    info = replace(INFO, condition="cross_attention")
    validate(SamplingParams(prompt="a ring"), info)
    with pytest.raises(InvalidParamError, match="it takes no negative_prompt"):
        validate(SamplingParams(prompt="a ring", negative_prompt="red"), info)


@pytest.mark.parametrize("changes", [{"solver": "lcm"}, {"timestep_spacing": "distilled"}])
def test_other_models_refuse_what_is_for_students(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamError, match="is for students, which `ardiff distill` makes") as error:
        validate(SamplingParams(**changes), replace(INFO, student=None))
    assert [error.value.param] == list(changes)


def test_defaults_depend_on_the_model_and_leave_names_and_ids_as_they_were() -> None:
    plain = validate(SamplingParams(), replace(INFO, student=None))
    assert (plain.num_inference_steps, plain.solver, plain.ar_step) == (50, "ddim", 7)  # the least for 16 in 8 frames
    assert plain.changed() == {"ar_step": 7}
    student = validate(SamplingParams(), INFO)
    assert (student.num_inference_steps, student.solver, student.ar_step) == (2, "lcm", 2)
    assert student.tags() == ["s2", "lcm", "ar2"]
    assert validate(SamplingParams(num_inference_steps=1), INFO).ar_step == 1
    for name in ("num_inference_steps", "solver"):
        with pytest.raises(ValueError, match="validate"):
            getattr(SamplingParams(), f"resolved_{name}")


def test_the_timesteps_of_a_student_are_spread_evenly_from_the_noisiest_on() -> None:
    assert [STUDENT.timesteps_of(n) for n in (1, 2, 3)] == [(999,), (999, 614), (999, 842, 614)]
    with pytest.raises(ValueError, match="takes 1 to 4 steps, got 5"):
        STUDENT.timesteps_of(5)
    with pytest.raises(ValueError, match="must descend"):
        Student(timesteps=(999, 999))
    with pytest.raises(ValueError, match="num_steps must be between 1 and 2"):
        Student(timesteps=(999, 500), num_steps=3)
