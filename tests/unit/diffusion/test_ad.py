"""The closed form against stored cases of the authors' loop, and the properties of windows."""

import itertools

import pytest
import torch

from ardiff.diffusion.ad import ADSchedule, ad_schedule, inference_timesteps
from ardiff.diffusion.ar_step import check_ar_step, smallest_ar_step

WINDOWED = [
    (frames, steps, window, ar_step)
    for frames, steps, window in itertools.product((1, 3, 4, 5, 9, 23), (1, 5, 8), (1, 3, 4, 8))
    for ar_step in range(smallest_ar_step(frames, steps, window), steps + 1)
]


def test_every_stored_case(golden_schedule):
    cases = golden_schedule("ad_schedule")["cases"]
    assert len(cases) == 19
    for case in cases:
        # Where S does not divide T the authors' code makes more than S steps; its schedule is that of the steps it
        # makes.
        steps = case["num_ddim_timesteps"]
        schedule = ad_schedule(case["F"], steps, case["s"], case["window"])
        assert schedule.step_index.tolist() == case["index"]
        assert schedule.update.int().tolist() == case["update"]
        assert (schedule.step_index.dtype, schedule.update.dtype) == (torch.int64, torch.bool)
        assert len(schedule.step_index) == case["steps"] == steps + (case["F"] - 1) * case["s"]
        assert schedule.window is None
        if 1000 % case["S"] == 0:
            template = torch.cat([torch.tensor([999]), inference_timesteps(1000, case["S"])])
            assert template.tolist() == case["template"]
            assert template[schedule.step_index].tolist() == case["timestep"]


def test_stored_templates_of_the_coefficients(golden_schedule):
    for case in golden_schedule("ddim_coeffs")["cases"]:
        assert inference_timesteps(1000, case["S"]).tolist() == case["ddim_timesteps"][::-1]


def check_updates(schedule: ADSchedule, steps: int) -> None:
    before = torch.cat([torch.zeros_like(schedule.step_index[:1]), schedule.step_index[:-1]])
    assert torch.equal(schedule.step_index - before, schedule.update.long())  # one step, and only where it says so
    assert (schedule.step_index[-1] == steps).all()
    assert (schedule.update.sum(dim=0) == steps).all()
    assert schedule.update.any(dim=1).all()  # no idle iteration


@pytest.mark.parametrize(("frames", "steps"), itertools.product((1, 2, 7), (1, 4, 9)))
def test_every_frame_makes_every_step_once(frames: int, steps: int) -> None:
    for ar_step in range(steps + 1):
        schedule = ad_schedule(frames, steps, ar_step)
        check_updates(schedule, steps)
        assert (schedule.step_index.diff(dim=1) <= 0).all()  # earlier frames are never noisier


def test_window_properties() -> None:
    for frames, steps, window, ar_step in WINDOWED:
        schedule = ad_schedule(frames, steps, ar_step, window)
        check_updates(schedule, steps)
        assert schedule.window is not None
        assert schedule.window.dtype == torch.int64
        assert schedule.window.shape == (len(schedule.update), 2)
        start, end = schedule.window.unbind(dim=1)
        assert (end - start == min(window, frames)).all()
        assert start[0] == 0
        assert end[-1] == frames
        frame = torch.arange(frames)
        inside = (frame >= start[:, None]) & (frame < end[:, None])
        assert not (schedule.update & ~inside).any()
        # The frames that have left are clean, so nothing is lost by not looking at them.
        assert (schedule.step_index[frame < start[:, None]] == steps).all()
        for n in range(1, len(end)):
            first_update = end[n - 1] < frames and bool(schedule.step_index[n, end[n - 1]] == 1)
            assert end[n] - end[n - 1] == int(first_update), (frames, steps, window, ar_step, n)


def test_a_window_as_long_as_the_video_sees_all_of_it() -> None:
    for window in (6, 7):
        schedule = ad_schedule(6, 5, 0, window)
        assert schedule.window is not None
        assert schedule.window.tolist() == [[0, 6]] * 5


def test_given_frames_are_clean_and_never_updated() -> None:
    for given, window, ar_step in itertools.product((1, 2, 5), (None, 3, 6), (2, 5)):
        schedule = ad_schedule(6, 5, ar_step, window, given)
        assert (schedule.step_index[:, :given] == 5).all()
        assert not schedule.update[:, :given].any()
        assert torch.equal(schedule.step_index[:, given:], ad_schedule(6 - given, 5, ar_step).step_index)
        if window is not None:
            assert schedule.window is not None
            start, end = schedule.window.unbind(dim=1)
            frame = torch.arange(6)
            assert not (schedule.update & ((frame < start[:, None]) | (frame >= end[:, None]))).any()
    for given in (-1, 6):
        with pytest.raises(ValueError, match="nothing to generate"):
            ad_schedule(6, 5, 2, None, given)


@pytest.mark.parametrize(
    ("arguments", "smallest"),
    [((128, 50, 3, 16), 4), ((17, 50, 0, 16), 4), ((9, 8, 1, 4), 2), ((5, 7, 2, 3), 3), ((2, 5, 4, 1), 5)],
)
def test_too_small_for_the_window_names_the_smallest_that_works(
    arguments: tuple[int, int, int, int], smallest: int
) -> None:
    frames, steps, _, window = arguments
    with pytest.raises(ValueError, match=rf"smallest valid ar_step is {smallest}\.") as caught:
        ad_schedule(*arguments)
    assert f"window of {window} frames" in str(caught.value)
    assert smallest_ar_step(frames, steps, window) == smallest
    check_updates(ad_schedule(frames, steps, smallest, window), steps)


@pytest.mark.parametrize("ar_step", [-1, 11])
def test_out_of_range(ar_step: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and num_inference_steps \(10\).*got {ar_step}.*smallest.* is 0"):
        ad_schedule(4, 10, ar_step)


@pytest.mark.parametrize(("sink", "stride"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3)])
def test_sinks_and_strides(sink: int, stride: int) -> None:
    """The first frames, then those from a multiple of the stride on; all frames that are left out are clean."""
    for frames, steps, window, ar_step in itertools.product((5, 11), (1, 4), (3, 5), (1, 2, 4)):
        if not smallest_ar_step(frames, steps, window, sink, stride) <= ar_step <= steps:
            continue
        schedule = ad_schedule(frames, steps, ar_step, window, sink_frames=sink, window_stride=stride)
        for n, index in enumerate(schedule.step_index):
            visible, started = schedule.visible(n).tolist(), int((index > 0).sum())
            start = next(s for s in range(0, frames, stride) if started <= s + window)
            assert visible == [*range(sink), *range(start + sink, min(start + window, frames))]
            before = schedule.step_index[n - 1] if n else torch.zeros(frames, dtype=torch.int64)
            assert all(before[frame] == steps for frame in set(range(started)) - set(visible))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 5, 0, 2, 2), "sink_frames must be between 0 and 1"),
        ((3, 5, 0, 2, 1, 2), "window_stride must be between 1 and 1, got 2"),
        ((0, 5, 0), "num_frames"),
        ((3, 0, 0), "num_inference_steps"),
        ((3, 5, 0, 0), "window must be at least 1"),
    ],
)
def test_sizes_below_one(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ar_step(*arguments)


def test_exactly_s_timesteps() -> None:
    for num_timesteps in (1, 2, 3, 17, 1000):
        for steps in range(1, num_timesteps + 1):
            timesteps = inference_timesteps(num_timesteps, steps)
            assert timesteps.dtype == torch.int64
            assert len(timesteps) == steps
            assert bool((timesteps[1:] < timesteps[:-1]).all())
            assert int(timesteps[-1]) >= 0
            assert int(timesteps[0]) < num_timesteps


def test_equal_to_the_authors_timesteps_where_they_have_the_right_length() -> None:
    for steps in (s for s in range(2, 501) if 1000 % s == 0):
        assert inference_timesteps(1000, steps).tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        inference_timesteps(1000, steps)
