"""Every solver in the engine against the plain sampler, which evaluates everything and remembers nothing."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from packed_requests import run_packed
from torch import Tensor

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.diffusion.solver_names import Solver, TimestepSpacing
from ardiff.dit import DiT
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import InvalidParamError, ModelInfo, SamplingParams, expand_params, validate
from ardiff.sampling.request import SampleRequest

DIFFUSION = DiffusionConfig(prediction="v")
SOLVERS = [solver for solver in get_args(Solver) if solver != "lcm"]  # that of students
SPACINGS = [spacing for spacing in get_args(TimestepSpacing) if spacing != "distilled"]
PRECISIONS = ((torch.float64, 1e-10), (torch.float32, 1e-4))
"""Types, and how much of the largest latent the samplers may differ by."""


def make_request(given: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> SampleRequest:
    """Two videos of 12 frames with guidance, which start with given frames."""
    settings = {"class_label": [0, 1], "seed": [0, 1], "num_frames": 12, "ar_step": 1, "num_inference_steps": 4}
    videos = expand_params(**{**settings, "guidance_scale": 1.5, "given_frames": given, **changes})
    condition = torch.randn(2, given, 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)) if given else None
    return SampleRequest(videos=tuple(videos), condition=condition)


def reference(model: DiT, request: SampleRequest, window: int | None) -> Tensor:
    params = request.params
    noise = initial_noise([0, 1], params.num_frames, 2, 4).to(next(model.parameters()).dtype)
    denoise = guided_denoiser(model, DIFFUSION, torch.tensor([0, 1]), params.guidance_scale)
    steps, ar_step, given = params.num_inference_steps, params.resolved_ar_step, params.given_frames
    schedule = ad_schedule(params.num_frames, steps, ar_step, window, given, params.sink_frames, params.window_stride)
    spacing = params.resolved_timestep_spacing
    return sample_full(denoise, noise, schedule, DIFFUSION, request.condition, params.solver, spacing)


def check_equal(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (result - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("frames", "ar_step", "given"), [(8, 0, 3), (6, 4, 0), (12, 1, 0), (12, 2, 3)])
def test_window_equals_the_plain_sampler(
    make_dit: Callable[..., DiT], solver: Solver, spacing: TimestepSpacing, frames: int, ar_step: int, given: int
) -> None:
    settings = {"num_frames": frames, "ar_step": ar_step, "solver": solver, "timestep_spacing": spacing}
    for dtype, tolerance in PRECISIONS:
        model, request = make_dit().to(dtype), make_request(given, dtype, **settings)
        check_equal(SamplingEngine(model, DIFFUSION).run(request), reference(model, request, 8), tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("ar_step", "given"), [(0, 2), (1, 0), (4, 2)])
def test_rolling_equals_one_pass_under_the_band_mask(
    make_dit: Callable[..., DiT], solver: Solver, ar_step: int, given: int
) -> None:
    for dtype, tolerance in PRECISIONS:
        short, whole = (make_dit(num_frames=frames, attention_window=5).to(dtype) for frames in (8, 12))
        request = make_request(given, dtype, ar_step=ar_step, solver=solver, mode="rolling")
        check_equal(SamplingEngine(short, DIFFUSION).run(request), reference(whole, request, None), tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step(make_dit: Callable[..., DiT], spacing: TimestepSpacing) -> None:
    """The model is told that noise is noise, and shown finished frames as clean."""
    model = make_dit().double()
    requests = [make_request(num_inference_steps=1, solver=solver, timestep_spacing=spacing) for solver in SOLVERS]
    results = [SamplingEngine(model, DIFFUSION).run(request) for request in requests]
    assert all(torch.allclose(result, results[0], rtol=0, atol=1e-12) for result in results)  # all are of first order
    check_equal(results[0], reference(model, requests[0], 8), 1e-10)


def test_packed_requests_equal_each_alone(make_dit: Callable[..., DiT]) -> None:
    """Requests with different solvers, spacings and numbers of steps share passes, and one is cancelled."""
    model = make_dit().double()
    combinations = list(itertools.product(SOLVERS, SPACINGS))
    requests = [
        make_request(given=i % 3, solver=solver, timestep_spacing=spacing, num_inference_steps=3 + i % 2)
        for i, (solver, spacing) in enumerate(combinations)
    ]
    packed = run_packed(model, DIFFUSION, requests, make_request(solver="unipc", seed=[7, 8]))
    for request, streamed in zip(requests, packed, strict=True):
        alone = SamplingEngine(model, DIFFUSION).run(request)
        check_equal(streamed, alone[:, request.params.given_frames :], 1e-12)


@pytest.mark.parametrize(
    ("frames", "ar_step", "given", "sink", "stride"),
    [(20, 1, 0, 1, 1), (12, 2, 3, 5, 1), (20, 2, 11, 3, 1), (20, 1, 0, 0, 3), (20, 2, 3, 2, 5), (20, 4, 9, 1, 7)],
)
@pytest.mark.parametrize("attention_backend", ["ragged", "masked", "stacked"])
def test_sinks_and_strides_equal_the_plain_sampler(
    make_dit: Callable[..., DiT], frames: int, ar_step: int, given: int, sink: int, stride: int, attention_backend: Any
) -> None:
    settings = {"num_frames": frames, "ar_step": ar_step, "solver": "dpmpp_2m"}
    settings |= {"sink_frames": sink, "window_stride": stride}
    config = EngineConfig(attention_backend=attention_backend)
    for dtype, tolerance in PRECISIONS:
        model, request = make_dit().to(dtype), make_request(given, dtype, **settings)
        check_equal(SamplingEngine(model, DIFFUSION, config).run(request), reference(model, request, 8), tolerance)


@pytest.mark.parametrize("changes", [{"sink_frames": 1}, {"window_stride": 4}])
def test_only_frames_after_the_first_window_change(make_dit: Callable[..., DiT], changes: dict[str, int]) -> None:
    model = make_dit().double()
    plain, changed = (SamplingEngine(model, DIFFUSION).run(make_request(ar_step=4, **c)) for c in ({}, changes))
    assert torch.equal(plain[:, :8], changed[:, :8])
    assert ((plain - changed)[:, 8:].abs().amax(dim=(0, 2, 3)) > 1e-3).all()


def test_solvers_differ(make_dit: Callable[..., DiT]) -> None:
    model = make_dit().double()
    results = [
        SamplingEngine(model, DIFFUSION).run(make_request(solver=solver, timestep_spacing=spacing))
        for solver, spacing in itertools.product(SOLVERS, SPACINGS)
    ]
    for one, other in itertools.combinations(results, 2):
        assert (one - other).abs().max() > 1e-3


def test_the_spacing_follows_the_solver() -> None:
    spacings = {solver: SamplingParams(solver=solver).resolved_timestep_spacing for solver in SOLVERS}
    assert spacings == {"ddim": "leading", "dpmpp_2m": "log_snr", "unipc": "log_snr"}
    assert SamplingParams(solver="unipc", timestep_spacing="trailing").resolved_timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "heun"}, "solver must be one of ddim, dpmpp_2m, unipc, lcm, got 'heun'"),
        (
            {"timestep_spacing": "karras"},
            "timestep_spacing must be one of leading, trailing, log_snr, distilled, got 'karras'",
        ),
        ({"mode": "fast"}, "mode must be one of window, rolling, full, got 'fast'"),
    ],
)
def test_unknown_names_are_errors_that_list_the_valid_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParamError, match=message) as error:
        validate(SamplingParams(**changes), ModelInfo(num_frames=8, num_classes=0, num_timesteps=1000))
    assert [error.value.param] == list(changes)


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"sink_frames": 8}, {}, "sink_frames must be between 0 and 7, because the window has 8 frames; got 8"),
        ({"sink_frames": -1}, {}, "sink_frames must be between 0 and 7"),
        ({"sink_frames": 1, "mode": "rolling"}, {"attention_window": 8}, "sample with mode=window or mode=full"),
        ({"sink_frames": 1}, {"attention_window": 5}, "dit.attention_window=5, dit.num_frames=8"),
        ({"window_stride": 0}, {}, "window_stride must be between 1 and 8"),
        ({"window_stride": 7, "sink_frames": 2}, {}, "window_stride must be between 1 and 6"),
        ({"window_stride": 2, "mode": "rolling"}, {"attention_window": 8}, "window_stride needs a window"),
    ],
)
def test_impossible_windows(changes: dict[str, Any], model: dict[str, Any], message: str) -> None:
    info = ModelInfo(num_frames=8, num_classes=0, num_timesteps=1000, **model)
    with pytest.raises(InvalidParamError, match=message) as error:
        validate(SamplingParams(**changes), info)
    assert error.value.param == next(iter(changes))


def test_a_sink_leaves_less_time_in_the_window() -> None:
    info = ModelInfo(num_frames=8, num_classes=0, num_timesteps=1000)
    params = SamplingParams(num_frames=20, num_inference_steps=20)
    smallest = [info.smallest_ar_step(replace(params, sink_frames=sink)) for sink in (0, 1, 3, 7)]
    assert smallest == [3, 3, 4, 20]
    with pytest.raises(InvalidParamError, match="3 of which are the first ones of the video; got 3"):
        validate(replace(params, sink_frames=3, ar_step=3), info)
    validate(replace(params, sink_frames=3, ar_step=4), info)
    assert info.smallest_ar_step(replace(params, sink_frames=1, window_stride=3)) == 4
    with pytest.raises(InvalidParamError, match="window of 8 frames, which moves by 7; got 9"):
        validate(replace(params, window_stride=7, ar_step=9), info)
    assert validate(replace(params, window_stride=7), info).ar_step == 10
