"""Timestep sampling against exact probabilities."""

from collections import Counter
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from ardiff.diffusion.timestep_sampling import TimestepSampling, sample_timesteps

METHODS = get_args(TimestepSampling)
SAMPLES = 400_000
SMALLEST_P = 1e-3


def draw(method: str, batch: int, frames: int, timesteps: int, seed: int = 0) -> torch.Tensor:
    return sample_timesteps(method, batch, frames, timesteps, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def codes(timesteps: torch.Tensor, base: int) -> np.ndarray:
    """Each row as one number, frame 0 the highest digit."""
    return (timesteps * base ** torch.arange(timesteps.shape[1] - 1, -1, -1)).sum(dim=1).numpy()


def p_value(drawn: torch.Tensor, probabilities: dict[tuple[int, ...], Fraction], base: int) -> float:
    """Of the chi-square test that the rows of ``drawn`` follow ``probabilities``; 0 if one has probability zero."""
    index = codes(torch.tensor(list(probabilities)), base)
    counts = np.bincount(codes(drawn, base), minlength=int(index.max()) + 1)
    expected = np.array([float(p) for p in probabilities.values()]) * len(drawn)
    if counts.sum() != counts[index].sum():
        return 0.0
    return 1.0 if len(probabilities) == 1 else float(stats.chisquare(counts[index], expected).pvalue)


def test_joint_and_marginals_equal_the_exact_fractions(golden_schedule):
    cases = golden_schedule("fopp_exact")["cases"]
    assert len(cases) == 7
    for case in cases:
        probabilities = {tuple(row["t"]): Fraction(row["p"]) for row in case["joint"]}
        assert sum(probabilities.values()) == 1
        assert len(probabilities) == case["num_compositions"]
        drawn = draw("fopp", SAMPLES, case["F"], case["T"])
        assert p_value(drawn, probabilities, case["T"]) > SMALLEST_P, (case["F"], case["T"])
        for frame, marginal in enumerate(case["marginal"]):
            expected = {(t,): Fraction(p) for t, p in enumerate(marginal)}
            assert p_value(drawn[:, frame : frame + 1], expected, case["T"]) > SMALLEST_P


def test_the_chi_square_test_would_notice_an_error_of_two_percent(golden_schedule):
    for case in golden_schedule("fopp_exact")["cases"]:
        freedom = case["num_compositions"] - 1
        critical = stats.chi2.isf(SMALLEST_P, freedom)
        assert stats.ncx2.sf(critical, freedom, SAMPLES * 0.02**2) > 0.99


def test_fopp_is_symmetric_under_reversal_of_frames_and_noise() -> None:
    """Checked at full size, where no table of exact fractions exists."""
    drawn = draw("fopp", 20_000, 16, 1000)
    mirrored = 999 - drawn.flip(1)
    for frame in (0, 5, 15):
        assert stats.ks_2samp(drawn[:, frame].numpy(), mirrored[:, frame].numpy()).pvalue > SMALLEST_P


@pytest.mark.parametrize("method", ["fopp", "synchronous", "uniform_from_first"])
@pytest.mark.parametrize(("frames", "timesteps"), [(1, 1), (1, 1000), (5, 1), (16, 1000), (400, 1000), (40, 3)])
def test_never_decreasing_and_in_range(method: str, frames: int, timesteps: int) -> None:
    drawn = draw(method, 32, frames, timesteps)
    assert drawn.shape == (32, frames)
    assert drawn.dtype == torch.int64
    assert drawn.device.type == "cpu"
    assert drawn.min() >= 0
    assert drawn.max() < timesteps
    assert (drawn.diff(dim=1) >= 0).all()


def test_long_clips_use_the_whole_range() -> None:
    """The tables of the authors' code overflow from 309 frames on."""
    drawn = draw("fopp", 256, 400, 1000)
    assert drawn[:, 0].min() < 20
    assert drawn[:, -1].max() > 980
    assert drawn[:, 200].float().std() > 150


def test_synchronous_is_one_uniform_timestep_a_clip() -> None:
    drawn = draw("synchronous", SAMPLES, 3, 5)
    assert p_value(drawn, {(t, t, t): Fraction(1, 5) for t in range(5)}, 5) > SMALLEST_P


def test_independent_is_uniform_per_frame() -> None:
    drawn = draw("independent", SAMPLES, 2, 4)
    assert p_value(drawn, {(s, t): Fraction(1, 16) for s in range(4) for t in range(4)}, 4) > SMALLEST_P


@pytest.mark.parametrize(("frames", "timesteps"), [(1, 4), (2, 3), (3, 3)])
def test_uniform_from_first_is_uniform_between_predecessor_and_end(frames: int, timesteps: int) -> None:
    joint: dict[tuple[int, ...], Fraction] = {(t,): Fraction(1, timesteps) for t in range(timesteps)}
    for _ in range(frames - 1):
        joint = {(*row, t): p / (timesteps - row[-1]) for row, p in joint.items() for t in range(row[-1], timesteps)}
    if (frames, timesteps) == (2, 3):
        ninth, sixth, third = Fraction(1, 9), Fraction(1, 6), Fraction(1, 3)
        assert joint == {
            (0, 0): ninth,
            (0, 1): ninth,
            (0, 2): ninth,
            (1, 1): sixth,
            (1, 2): sixth,
            (2, 2): third,
        }
    assert p_value(draw("uniform_from_first", SAMPLES, frames, timesteps), joint, timesteps) > SMALLEST_P


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_is_the_only_source_of_randomness(method: str) -> None:
    first = draw(method, 64, 5, 20, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, draw(method, 64, 5, 20, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, draw(method, 64, 5, 20, seed=4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_clips_of_a_batch_are_independent(method: str, batch: int) -> None:
    drawn = draw(method, batch, 3, 1000)
    assert drawn.shape == (batch, 3)
    assert len(Counter(map(tuple, drawn.tolist()))) == batch


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"unknown timestep sampling 'uniform'.*fopp, synchronous"):
        draw("uniform", 1, 1, 1)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_sizes_below_one(method: str, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        draw(method, *sizes)
