"""Solvers: how a frame gets from each of its S sampling steps to the next, as data.

All evaluate the model once per step. They are linear in the noisy latents, the predicted clean latents (x0) and their
history, so a table of factors describes them. Each frame has its own history, because each is at its own sampling step:
what the solver remembers of the frame's earlier steps or, for ``lcm``, the noise that it adds in later ones. The others
are deterministic.

Equations use ``alpha = sqrt(abar)``, ``sigma = sqrt(1 - abar)`` and half the log-SNR, ``lambda = log(alpha / sigma)``.
Step i leads from ``lambda_i`` to ``lambda_(i+1)`` and is ``h_i`` long.

Shapes: B videos, F frames, ... any latent axes (L tokens, D width), T timesteps, S sampling steps, H tensors of a
history.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ardiff.diffusion.ad import inference_timesteps
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.noise import ddim_coefficients, ddim_step, per_frame
from ardiff.diffusion.solver_names import Solver, TimestepSpacing

LONGEST_SECOND_ORDER_STEP = 2.0
"""A step that is longer than the one before by more than this factor is of first order: it would extrapolate too far.
With mixtures of Gaussians, whose x0 is known, this has the smallest error in all spacings with 3 to 20 steps."""

History = tuple[Tensor, ...]
"""H tensors with the shape of the latents."""


@dataclass(frozen=True, slots=True, eq=False)
class SolverTable:
    """Factors of every sampling step; see :func:`solver_step`. Terms are ``(x, x0, *history)``, 2 + H of them."""

    solver: Solver
    timesteps: Tensor
    """int64 ``(S,)``: what the model is told of the noise at each step."""
    advance: Tensor
    """``(S, 2 + H)``: factors of the terms in the latents after the step."""
    correct: Tensor | None
    """``(S, 2 + H)``: factors in the corrected latents before the step. None for solvers without a corrector."""

    @property
    def history_size(self) -> int:
        """H."""
        return self.advance.shape[1] - 2

    def to(self, device: torch.device, dtype: torch.dtype) -> "SolverTable":
        """The table on a device, with its factors rounded to ``dtype``."""
        correct = None if self.correct is None else self.correct.to(device, dtype)
        return replace(
            self, timesteps=self.timesteps.to(device), advance=self.advance.to(device, dtype), correct=correct
        )


def solver_table(
    diffusion: DiffusionConfig,
    num_inference_steps: int,
    solver: Solver = "ddim",
    timestep_spacing: TimestepSpacing = "leading",
) -> SolverTable:
    """The table of a solver, with factors in float64 on the CPU.

    Raises:
        ValueError: ``num_inference_steps`` is not in ``1..T``, or the solver or the spacing is unknown.
    """
    abar = diffusion.alphas_cumprod()
    timesteps = sampling_timesteps(diffusion, num_inference_steps, timestep_spacing)
    match solver:
        case "ddim":
            return SolverTable(solver, timesteps, torch.stack(ddim_coefficients(timesteps, abar), dim=1), None)
        case "dpmpp_2m":
            return SolverTable(solver, timesteps, torch.stack(dpmpp_2m_coefficients(timesteps, abar), dim=1), None)
        case "unipc":
            return SolverTable(solver, timesteps, *unipc_coefficients(timesteps, abar))
        case "lcm":
            return SolverTable(solver, timesteps, lcm_coefficients(timesteps, abar), None)
        case _:
            raise ValueError(f"unknown solver {solver!r}")


def solver_step(x: Tensor, x0: Tensor, history: History, step: Tensor, table: SolverTable) -> tuple[Tensor, History]:
    """One step of every frame, each at its own sampling step.

    Args:
        x: Noisy latents; their first axes are those of ``step``.
        x0: Predicted clean latents, same shape.
        history: What the previous step of each frame returned. Any finite values where ``step`` is 0, but for ``lcm``
            the noise of each later step.
        step: int64, the 0-based index of the sampling step that each frame makes, ``(F,)`` or ``(B, F)``.
        table: From :func:`solver_table`.

    Returns:
        The latents after the step, and the history for the next one.
    """
    terms = (x, x0, *history)
    after = _combine(table.advance, step, terms)
    match table.solver:
        case "ddim":
            return after, ()
        case "dpmpp_2m":
            return after, (x0,)
        case "lcm":
            return after, history
        case "unipc":
            assert table.correct is not None
            return after, (_combine(table.correct, step, terms), x0, history[1])
        case _:
            raise ValueError(f"unknown solver {table.solver!r}")


def clean_timestep(num_timesteps: int, num_inference_steps: int) -> int:
    """The timestep at which the model is shown finished and given frames, whatever solver and spacing: 1.

    It is the last one of the spacing ``leading``, so it is 0 where S = T.
    """
    return 1 if num_inference_steps < num_timesteps else 0


@lru_cache(maxsize=64)
def model_timesteps(
    diffusion: DiffusionConfig, num_inference_steps: int, timestep_spacing: TimestepSpacing = "leading"
) -> Tensor:
    """All timesteps that a model is shown: those of the S steps, and that of clean frames as the last one.

    Returns:
        int64 ``(S + 1,)`` on the CPU; ``(S,)`` if the last step is made at the clean timestep. Callers share it.
    """
    timesteps = sampling_timesteps(diffusion, num_inference_steps, timestep_spacing)
    clean = clean_timestep(diffusion.num_timesteps, num_inference_steps)
    return timesteps if int(timesteps[-1]) == clean else torch.cat([timesteps, torch.tensor([clean])])


def sampling_timesteps(
    diffusion: DiffusionConfig, num_inference_steps: int, timestep_spacing: TimestepSpacing
) -> Tensor:
    """The timestep of each sampling step, int64 ``(S,)``: those of a student with ``distilled``, else spaced ones.

    Raises:
        ValueError: S is out of range, the spacing is unknown, or the model is no student.
    """
    if timestep_spacing == "distilled":
        if diffusion.student is None:
            raise ValueError("timestep_spacing=distilled is for students")
        return torch.tensor(diffusion.student.timesteps_of(num_inference_steps))
    return spaced_timesteps(timestep_spacing, num_inference_steps, diffusion.alphas_cumprod())


def spaced_timesteps(timestep_spacing: TimestepSpacing, num_inference_steps: int, alphas_cumprod: Tensor) -> Tensor:
    """The timestep of each sampling step, int64 ``(S,)``, strictly descending, within ``0..T-1``.

    ``leading`` are the authors' timesteps (:func:`~ardiff.diffusion.ad.inference_timesteps`), whose first step takes
    noise for less noisy than it is. ``trailing`` is even, too, but starts at T - 1 (Lin et al., 2024, Sec. 3.3).
    ``log_snr`` is even in lambda from T - 1 to 0, rounded to the nearest timesteps (DPM-Solver, Lu et al., 2022).

    Raises:
        ValueError: S is not in ``1..T``, or the spacing is unknown.
    """
    num_timesteps = len(alphas_cumprod)
    leading = inference_timesteps(num_timesteps, num_inference_steps)  # checks S
    index = torch.arange(num_inference_steps)
    match timestep_spacing:
        case "leading":
            return leading
        case "trailing":
            return (num_timesteps - index.double() * num_timesteps / num_inference_steps).round().long() - 1
        case "log_snr":
            lambdas = half_log_snr(alphas_cumprod)
            grid = torch.linspace(float(lambdas[-1]), float(lambdas[0]), num_inference_steps + 1, dtype=torch.float64)
            nearest = (lambdas - grid[:-1, None]).abs().argmin(dim=1)
            # Where several steps round to one timestep, move them up from the last one, then down from T - 1.
            distinct = (nearest + index).flip(0).cummax(0).values.flip(0).clamp(min=num_inference_steps) - index
            return torch.minimum(distinct, num_timesteps - 1 - index)
        case _:
            raise ValueError(f"unknown timestep_spacing {timestep_spacing!r}")


def half_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """``lambda = log(alpha / sigma)``, float64 ``(T,)``."""
    abar = alphas_cumprod.double()
    return 0.5 * (abar.log() - (-abar).log1p())


def step_lengths(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``h_i = lambda_(i+1) - lambda_i`` of each step, float64 ``(S,)``.

    The last step leads to timestep 0. From timestep 0 it leads to the clean latents and is infinitely long.
    """
    lambdas = half_log_snr(alphas_cumprod)
    last = lambdas[:1] if int(timesteps[-1]) > 0 else torch.full_like(lambdas[:1], torch.inf)
    return torch.cat([lambdas[timesteps], last]).diff()


def dpmpp_2m_coefficients(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of DPM-Solver++(2M) (Lu et al., 2023, Algorithm 2), of ``x``, ``x0`` and the ``x0`` before it.

    It is a DDIM step towards an extrapolation of x0 by half a step::

        x_next = sigma_next / sigma x - alpha_next (exp(-h) - 1) D
        D = x0 + (x0 - x0_previous) / (2 r),  r = h_previous / h

    The first step, and each one with r < 1/2, has ``D = x0`` (first order, DDIM).

    Args:
        timesteps: ``(S,)`` int64, strictly descending.
        alphas_cumprod: ``(T,)`` float64.

    Returns:
        Three factors, float64 ``(S,)`` each.
    """
    x_factor, x0_factor = ddim_coefficients(timesteps, alphas_cumprod)
    lengths = step_lengths(timesteps, alphas_cumprod)
    growth = lengths[1:] / lengths[:-1]  # 1 / r
    extrapolation = torch.where(growth <= LONGEST_SECOND_ORDER_STEP, growth / 2, 0.0)
    extrapolation = torch.cat([torch.zeros_like(x_factor[:1]), extrapolation])
    return x_factor, x0_factor * (1 + extrapolation), -x0_factor * extrapolation


def unipc_coefficients(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of UniPC-2 with ``B(h) = exp(h) - 1`` on x0 (Zhao et al., 2023, in its form for data prediction).

    The predictor is DPM-Solver++(2M). The corrector makes the step before again, now that x0 at its end is known::

        x_corrected = sigma / sigma_before x_corrected_before
                      + alpha (1 - exp(-h)) (m1 + rho_1 (m1 - m2) / r + rho_2 (m0 - m1))

    with x0 of this step and the two before (m0, m1, m2), ``h`` and ``r`` of the step before, and rho from::

        rho_1 + rho_2 = b_1,  -r rho_1 + rho_2 = b_2,  E = exp(-h) - 1
        b_1 = (E / -h - 1) / E,  b_2 = 2 ((E / -h - 1) / -h - 1/2) / E

    The second step has ``rho_1 = 0, rho_2 = 1/2``; the first corrects nothing. No evaluation is added.

    Returns:
        Factors of ``(x, m0, x_corrected_before, m1, m2)`` in the latents after the step and in the corrected latents
        before it, float64 ``(S, 5)`` each.
    """
    x_factor, x0_factor = ddim_coefficients(timesteps, alphas_cumprod)
    x_coefficient, now, previous = dpmpp_2m_coefficients(timesteps, alphas_cumprod)
    correct = x_factor.new_zeros(len(timesteps), 5)
    correct[0, 0] = 1.0
    if len(timesteps) > 1:
        h = step_lengths(timesteps, alphas_cumprod)[:-1]  # of the steps that are corrected; all finite
        ratio = torch.cat([h[:1], h[:-1]]) / h
        e = torch.expm1(-h)
        b1 = (e / -h - 1) / e
        b2 = 2 * ((e / -h - 1) / -h - 0.5) / e
        rho_1 = (b1 - b2) / (1 + ratio)
        rho_2 = b1 - rho_1
        rho_1[0], rho_2[0] = 0.0, 0.5
        slope = rho_1 / ratio
        terms = [rho_2, torch.zeros_like(h), 1 + slope - rho_2, -slope]
        correct[1:, 1:] = x0_factor[:-1, None] * torch.stack(terms, dim=1)
        correct[1:, 2] = x_factor[:-1]
    advance = x_coefficient[:, None] * correct
    advance[:, 1] += now
    advance[:, 3] += previous
    return advance, correct


def lcm_coefficients(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The factors of multistep consistency sampling (Song et al., 2023, Algorithm 1; Luo et al., 2023, for latents).

    Step i adds new noise to the predicted clean latents, and the last one returns them::

        x_next = alpha_next x0 + sigma_next eps_i

    Returns:
        Factors of ``(x, x0, eps_0, ..., eps_(S-2))``, float64 ``(S, S + 1)``.
    """
    abar_next = alphas_cumprod.double()[timesteps[1:]]  # (S - 1,)
    x0_factor = torch.cat([abar_next.sqrt(), torch.ones(1, dtype=torch.float64)])[:, None]  # (S, 1)
    noise_factors = torch.diag((1.0 - abar_next).sqrt())  # (S - 1, S - 1)
    noise_factors = torch.nn.functional.pad(noise_factors, (0, 0, 0, 1))  # (S, S - 1)
    return torch.cat([torch.zeros_like(x0_factor), x0_factor, noise_factors], dim=1)


def _combine(factors: Tensor, step: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    """The sum of the terms ``(x, x0, *history)``, weighted by the factors ``(S, 2 + H)`` of each frame's step."""
    total = ddim_step(terms[0], terms[1], step, factors[:, 0], factors[:, 1])
    for factor, term in zip(factors.T[2:], terms[2:], strict=True):
        total = total + per_frame(factor, step, term) * term
    return total
