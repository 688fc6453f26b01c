"""Solvers against exact solutions, and against their papers' equations written out step by step."""

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.noise import ddim_coefficients, eps_from_x0, q_sample
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.diffusion.solver_names import Solver, TimestepSpacing
from ardiff.diffusion.solvers import (
    dpmpp_2m_coefficients,
    half_log_snr,
    model_timesteps,
    solver_step,
    solver_table,
    spaced_timesteps,
    step_lengths,
)

DIFFUSION = DiffusionConfig()
ABAR = DIFFUSION.alphas_cumprod()
SOLVERS = [solver for solver in get_args(Solver) if solver != "lcm"]  # that of students
SPACINGS = [spacing for spacing in get_args(TimestepSpacing) if spacing != "distilled"]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_have_s_descending_timesteps(spacing: TimestepSpacing) -> None:
    for num_timesteps in (1, 2, 3, 17, 100):
        abar = DiffusionConfig(num_timesteps=num_timesteps).alphas_cumprod()
        for steps in range(1, num_timesteps + 1):
            timesteps = spaced_timesteps(spacing, steps, abar)
            assert (timesteps.dtype, len(timesteps)) == (torch.int64, steps)
            assert (timesteps.diff() < 0).all()
            assert 0 <= int(timesteps[-1]) <= int(timesteps[0]) < num_timesteps


def test_known_spacings() -> None:
    def timesteps(spacing: TimestepSpacing, steps: int) -> list[int]:
        return spaced_timesteps(spacing, steps, ABAR).tolist()

    assert timesteps("leading", 4) == [751, 501, 251, 1]
    assert timesteps("trailing", 4) == [999, 749, 499, 249]
    assert timesteps("log_snr", 4) == [999, 740, 303, 37]
    assert timesteps("log_snr", 6) == [999, 842, 614, 303, 89, 12]
    assert {tuple(timesteps(spacing, 1)) for spacing in SPACINGS} == {(999,)}  # noise is the last timestep
    lengths = step_lengths(spaced_timesteps("log_snr", 10, ABAR), ABAR)
    assert (lengths.max() - lengths.min()) / lengths.mean() < 0.1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_last_timestep_shown_to_a_model_is_that_of_clean_frames(spacing: TimestepSpacing) -> None:
    for steps in (1, 2, 4, 50, 999):
        shown = model_timesteps(DIFFUSION, steps, spacing)
        assert int(shown[-1]) == 1
        assert torch.equal(shown[:steps], spaced_timesteps(spacing, steps, ABAR))
    assert int(model_timesteps(DIFFUSION, 1000, spacing)[-1]) == 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_ddim_has_the_factors_of_ddim(spacing: TimestepSpacing, steps: int) -> None:
    table = solver_table(DIFFUSION, steps, "ddim", spacing)
    assert torch.equal(table.advance, torch.stack(ddim_coefficients(table.timesteps, ABAR), dim=1))


def test_dpmpp_2m_by_hand() -> None:
    """Four steps even in lambda, the second one written out."""
    table = solver_table(DIFFUSION, 4, "dpmpp_2m", "log_snr")
    lambdas = [0.5 * math.log(float(ABAR[t]) / (1 - float(ABAR[t]))) for t in (999, 740, 303)]
    h, r = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    x_factor = math.sqrt(1 - float(ABAR[303])) / math.sqrt(1 - float(ABAR[740]))
    gain = math.sqrt(float(ABAR[303])) * (1 - math.exp(-h))
    expected = [x_factor, gain * (1 + 1 / (2 * r)), -gain / (2 * r)]
    assert table.advance[1].tolist() == pytest.approx(expected, rel=1e-12)
    assert float(table.advance[0, 2]) == 0.0


def denoise(x: Tensor, timestep: int) -> Tensor:
    """A smooth prediction of x0."""
    return torch.tanh(x + timestep / 1000) + 0.1 * x.flip(-1)


def integrate(table_of: tuple[Solver, TimestepSpacing], steps: int, x: Tensor) -> Tensor:
    """A video of one frame."""
    table = solver_table(DIFFUSION, steps, *table_of)
    history = tuple(torch.zeros_like(x) for _ in range(table.history_size))
    for i, timestep in enumerate(table.timesteps.tolist()):
        x, history = solver_step(x, denoise(x, timestep), history, torch.full(x.shape[:1], i), table)
    return x


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_unipc_is_a_predictor_and_a_corrector(spacing: TimestepSpacing, steps: int) -> None:
    """Written as in the paper, with the linear system that determines rho, and one equation for each half."""
    timesteps = [*spaced_timesteps(spacing, steps, ABAR).tolist(), 0]
    alpha, sigma, lam = ABAR.sqrt(), (1 - ABAR).sqrt(), half_log_snr(ABAR)
    start = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, corrected, known = start, start, []
    for i, (now, after) in enumerate(itertools.pairwise(timesteps)):
        m0 = denoise(x, now)
        if i:
            before = timesteps[i - 1]
            h = float(lam[now] - lam[before])
            e = math.expm1(-h)
            change = 0.5 * (m0 - known[-1])
            if i > 1:
                r = float(lam[timesteps[i - 2]] - lam[before]) / h  # negative
                phi_1 = e / -h - 1
                b = torch.tensor([phi_1 / e, 2 * (phi_1 / -h - 0.5) / e], dtype=torch.float64)
                rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64), b)
                change = rho[0] * (known[-2] - known[-1]) / r + rho[1] * (m0 - known[-1])
            corrected = sigma[now] / sigma[before] * corrected - alpha[now] * e * (known[-1] + change)
        h = float(lam[after] - lam[now])
        target = m0
        if i and h <= 2 * float(lam[now] - lam[timesteps[i - 1]]):
            target = m0 + 0.5 * (m0 - known[-1]) * h / float(lam[now] - lam[timesteps[i - 1]])
        x = sigma[after] / sigma[now] * corrected - alpha[after] * math.expm1(-h) * target
        known.append(m0)
    assert torch.allclose(integrate(("unipc", spacing), steps, start), x, rtol=1e-10, atol=1e-10)


def test_errors_shrink_with_the_order_of_the_solver() -> None:
    """On Gaussian data, whose x0 and whose exact path are known. Half the step: half, a quarter, an eighth."""
    variance = 0.3
    total = ABAR * variance + 1 - ABAR  # of the noisy latents at each timestep
    exact = float((total[0] / total[999]).sqrt())
    errors: dict[Solver, list[float]] = {}
    for solver in SOLVERS:
        for steps in (20, 40):
            table, x = solver_table(DIFFUSION, steps, solver, "log_snr"), torch.ones(1, 1, dtype=torch.float64)
            history = tuple(torch.zeros_like(x) for _ in range(table.history_size))
            for i, t in enumerate(table.timesteps.tolist()):
                x, history = solver_step(x, x * ABAR[t].sqrt() * variance / total[t], history, torch.tensor([i]), table)
            errors.setdefault(solver, []).append(abs(float(x) - exact))
    ratio = {solver: coarse / fine for solver, (coarse, fine) in errors.items()}
    assert ratio == pytest.approx({"ddim": 2, "dpmpp_2m": 4, "unipc": 8}, rel=0.1)
    assert errors["unipc"][1] < 0.5 * errors["dpmpp_2m"][1] < 0.5 * 0.1 * errors["ddim"][1]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_step_much_longer_than_the_one_before_is_of_first_order(spacing: TimestepSpacing) -> None:
    timesteps = spaced_timesteps(spacing, 4, ABAR)
    lengths = step_lengths(timesteps, ABAR)
    longer = torch.cat([torch.tensor([True]), lengths[1:] > 2 * lengths[:-1]])  # the first has none before it
    assert 1 < longer.sum() < 4
    assert ((dpmpp_2m_coefficients(timesteps, ABAR)[2] == 0) == longer).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_perfect_predictions_lead_to_timestep_0(solver: Solver, spacing: TimestepSpacing, steps: int) -> None:
    noise, target = initial_noise([3], 3, 2, 4).double(), torch.full((1, 3, 2, 4), 0.7, dtype=torch.float64)
    diffusion, schedule = DiffusionConfig(num_timesteps=60), ad_schedule(3, steps, 1)
    result = sample_full(lambda x, t, frames: target, noise, schedule, diffusion, None, solver, spacing)
    abar = diffusion.alphas_cumprod()
    eps = eps_from_x0(noise, target, spaced_timesteps(spacing, steps, abar)[:1].expand(1, 3), abar)
    expected = q_sample(target, eps, torch.zeros(1, 3, dtype=torch.int64), abar) if steps < 60 else target
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_frame_has_its_own_history(solver: Solver) -> None:
    """With a model that sees each frame alone, frames that start one after another end as those that start together."""
    noise = initial_noise([0, 1], 4, 2, 4).double()

    def alone(x: Tensor, timesteps: Tensor, frames: Tensor) -> Tensor:
        return torch.tanh(x + timesteps[..., None, None] / 1000)

    together, *others = (
        sample_full(alone, noise, ad_schedule(4, 5, ar_step), DIFFUSION, None, solver, "log_snr")
        for ar_step in (0, 1, 3, 5)
    )
    assert all(torch.allclose(other, together, rtol=0, atol=1e-12) for other in others)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 4])
def test_frames_are_shown_at_the_timesteps_of_their_noise(spacing: TimestepSpacing, steps: int) -> None:
    """Clean frames, given or finished, at timestep 1; frames that have not started at 999."""
    schedule, seen = ad_schedule(5, steps, steps, None, num_given=1), []

    def record(x: Tensor, timesteps: Tensor, frames: Tensor) -> Tensor:
        seen.append(timesteps.tolist())
        return torch.zeros_like(x)

    sample_full(record, initial_noise([0], 5, 2, 4), schedule, DIFFUSION, torch.zeros(1, 1, 2, 4), "ddim", spacing)
    template = spaced_timesteps(spacing, steps, ABAR).tolist()
    assert seen == [[[1] * frame + [t] + [999] * (4 - frame)] for frame in range(1, 5) for t in template]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown solver 'heun'"):
        solver_table(DIFFUSION, 4, "heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown timestep_spacing 'karras'"):
        solver_table(DIFFUSION, 4, "ddim", "karras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be in 1\.\.1000, got 1001"):
        solver_table(DIFFUSION, 1001, "unipc", "log_snr")
