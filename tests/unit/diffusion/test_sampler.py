"""The reference sampler with denoisers in closed form."""

import itertools

import pytest
import torch

from ardiff.diffusion.ad import ad_schedule, inference_timesteps
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.noise import eps_from_x0, q_sample
from ardiff.diffusion.sampler import frame_noise, initial_noise, sample_full, stream_full

STEPS = 6
DIFFUSION = DiffusionConfig()
CASES = [(5, 0, None), (5, 2, None), (5, STEPS, None), (5, 3, 8), (9, 2, 4), (9, 6, 1), (7, 6, 3)]


class Recorder:
    """Predicts a smooth function of its input, and records the inputs."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []
        self.frames: list[list[int]] = []

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == len(frames)
        self.frames.append(frames.tolist())
        self.seen.append(x.clone())
        self.timesteps.append(timesteps.clone())
        return torch.tanh(x.cumsum(dim=1) + timesteps[..., None, None] / 1000)


@pytest.mark.parametrize(("frames", "ar_step", "window"), CASES)
def test_frames_that_make_no_step_stay_bit_equal(frames: int, ar_step: int, window: int | None) -> None:
    noise, recorder = initial_noise([0, 1], frames, 2, 4), Recorder()
    schedule = ad_schedule(frames, STEPS, ar_step, window)
    before = noise.clone()
    result = sample_full(recorder, noise, schedule, DIFFUSION)
    assert torch.equal(noise, before)  # the caller's noise is left alone
    spans = [(0, frames)] * len(schedule.update) if schedule.window is None else schedule.window.tolist()
    state = noise.clone()  # what every frame is by what the denoiser saw of it last
    for n, (start, end) in enumerate(spans):
        seen = recorder.seen[n]
        moved = schedule.update[n - 1] if n else torch.zeros(frames, dtype=torch.bool)
        for frame in range(start, end):
            same = torch.equal(seen[:, frame - start], state[:, frame])
            assert same == (not bool(moved[frame])), (n, frame)
            state[:, frame] = seen[:, frame - start]
    finished = ~schedule.update[-1]
    finished[: spans[-1][0]] = False  # left the window with their last step, so the denoiser never saw them clean
    assert torch.equal(result[:, finished], state[:, finished])
    assert not torch.equal(result[:, schedule.update[-1]], state[:, schedule.update[-1]])


@pytest.mark.parametrize(("frames", "ar_step", "window"), CASES)
def test_the_denoiser_sees_the_window_at_the_right_timesteps(frames: int, ar_step: int, window: int | None) -> None:
    schedule, recorder = ad_schedule(frames, STEPS, ar_step, window), Recorder()
    sample_full(recorder, initial_noise([0, 1], frames, 2, 4), schedule, DIFFUSION)
    template = torch.cat([torch.tensor([999]), inference_timesteps(1000, STEPS)])
    for n, (seen, timesteps) in enumerate(zip(recorder.seen, recorder.timesteps, strict=True)):
        start, end = (0, frames) if schedule.window is None else schedule.window[n].tolist()
        assert seen.shape == (2, end - start, 2, 4)
        assert recorder.frames[n] == list(range(start, end))
        assert timesteps.tolist() == [template[schedule.step_index[n, start:end]].tolist()] * 2


@pytest.mark.parametrize(("frames", "ar_step", "window"), CASES)
def test_perfect_predictions_lead_to_the_clean_latents(frames: int, ar_step: int, window: int | None) -> None:
    """With them the result does not depend on the schedule."""
    noise = initial_noise([3], frames, 2, 4).double()
    target = torch.randn(1, frames, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    schedule = ad_schedule(frames, STEPS, ar_step, window)
    position = itertools.count()

    def denoise(x: torch.Tensor, timesteps: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        n = next(position)
        return target if schedule.window is None else target[:, schedule.window[n, 0] : schedule.window[n, 1]]

    result = sample_full(denoise, noise, schedule, DIFFUSION)
    abar, first = DIFFUSION.alphas_cumprod(), int(inference_timesteps(1000, STEPS)[0])
    eps = eps_from_x0(noise, target, torch.full((1, frames), first), abar)
    expected = q_sample(target, eps, torch.zeros(1, frames, dtype=torch.int64), abar)
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)


def test_given_frames_are_seen_clean_and_stay() -> None:
    condition = torch.full((1, 2, 2, 4), 0.5)
    recorder = Recorder()
    schedule = ad_schedule(5, STEPS, 2, None, num_given=2)
    result = sample_full(recorder, initial_noise([0], 5, 2, 4), schedule, DIFFUSION, condition)
    last = int(inference_timesteps(1000, STEPS)[-1])
    assert torch.equal(result[:, :2], condition)
    for seen, timesteps in zip(recorder.seen, recorder.timesteps, strict=True):
        assert torch.equal(seen[:, :2], condition)
        assert timesteps[:, :2].tolist() == [[last, last]]


def test_frames_are_yielded_as_they_finish() -> None:
    recorder, iterations, lengths = Recorder(), [], []
    condition = torch.zeros(1, 1, 2, 4)
    schedule = ad_schedule(4, 4, 2, num_given=1)
    for latents in stream_full(recorder, initial_noise([0], 4, 2, 4), schedule, DIFFUSION, condition):
        iterations.append(len(recorder.seen))
        lengths.append(latents.shape[1])
    assert iterations == [0, 4, 6, 8]
    assert lengths == [1, 1, 1, 1]


def test_noise_of_a_frame_depends_on_its_seed_and_number_alone() -> None:
    many = initial_noise([5, 6, 7], 9, 2, 4)
    assert many.shape == (3, 9, 2, 4)
    assert many.dtype == torch.float32
    assert torch.equal(initial_noise([6], 4, 2, 4)[0], many[1, :4])
    assert torch.equal(frame_noise(7, 8, 2, 4), many[2, 8])
    assert len({tuple(x.flatten().tolist()) for x in many.flatten(0, 1)}) == 27


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = initial_noise(list(range(20)), 20, 8, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
