"""The diffusion process with a timestep per frame (Sec. 3.2).

Shapes: B videos, F frames, ... any latent axes (L tokens, D width), T timesteps, S sampling steps.
Latents ``(B, F, ...)``; timesteps int64 ``(B, F)``, 0-based ``0..T-1``; ``alphas_cumprod`` float64 ``(T,)``.
Coefficients are computed in float64 and rounded once to the dtype of the latents.
"""

import torch
from torch import Tensor


def betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The variance schedule of latent diffusion: linear in the square root, float64 ``(T,)``.

    Table 6 prints 0.002 as the end, which must be 0.02: with 0.002 the last timestep keeps 43 % of the signal's power.
    """
    if num_timesteps < 1 or not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"betas need num_timesteps >= 1 and 0 < beta_start <= beta_end < 1, got {num_timesteps}, "
            f"{beta_start}, {beta_end}"
        )
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def alphas_cumprod(betas: Tensor) -> Tensor:
    """The cumulative products of ``1 - betas`` (below Eq. 2), float64 ``(T,)``."""
    return torch.cumprod(1.0 - betas.double(), dim=0)


def q_sample(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Adds noise to clean latents, Eq. 2: ``sqrt(abar) x0 + sqrt(1 - abar) noise``.

    Eq. 3 prints ``(1 - abar) noise`` without the root, which contradicts Eq. 2. Returns the shape and dtype of ``x0``.
    """
    signal, sigma = _coefficients(timesteps, alphas_cumprod, x0)
    return signal * x0 + sigma * noise


def eps_from_x0(x_t: Tensor, x0: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Eq. 2 solved for the noise."""
    signal, sigma = _coefficients(timesteps, alphas_cumprod, x_t)
    return (x_t - signal * x0) / sigma


def x0_from_eps(x_t: Tensor, eps: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Eq. 2 solved for the clean latents."""
    signal, sigma = _coefficients(timesteps, alphas_cumprod, x_t)
    return (x_t - sigma * eps) / signal


def v_from_x0(x_t: Tensor, x0: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The velocity ``sqrt(abar) eps - sqrt(1 - abar) x0`` (Salimans and Ho, 2022, appendix D)."""
    signal, sigma = _coefficients(timesteps, alphas_cumprod, x_t)
    return (signal * x_t - x0) / sigma


def x0_from_v(x_t: Tensor, v: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The clean latents ``sqrt(abar) x_t - sqrt(1 - abar) v`` (Salimans and Ho, 2022, appendix D)."""
    signal, sigma = _coefficients(timesteps, alphas_cumprod, x_t)
    return signal * x_t - sigma * v


def ddim_coefficients(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of each deterministic DDIM step (Song et al., 2021, Eq. 12 with sigma 0).

    ``x_next = x_factor[i] * x + x0_factor[i] * x0`` leads from ``timesteps[i]`` to ``timesteps[i + 1]``. The last step
    leads to timestep 0 or, from timestep 0, to the clean latents.

    Args:
        timesteps: ``(S,)`` int64, descending, see :func:`ardiff.diffusion.ad.inference_timesteps`.
        alphas_cumprod: ``(T,)`` float64.

    Returns:
        ``x_factor`` and ``x0_factor``, float64 ``(S,)``.
    """
    abar = alphas_cumprod.double()[timesteps]
    last = alphas_cumprod.double()[:1] if int(timesteps[-1]) > 0 else torch.ones(1, dtype=torch.float64)
    abar_next = torch.cat([abar[1:], last.to(abar.device)])
    x_factor = ((1.0 - abar_next) / (1.0 - abar)).sqrt()
    return x_factor, abar_next.sqrt() - x_factor * abar.sqrt()


def ddim_step(x: Tensor, x0: Tensor, step: Tensor, x_factor: Tensor, x0_factor: Tensor) -> Tensor:
    """One deterministic DDIM step of every frame, each from its own timestep.

    Args:
        x: Noisy latents ``(B, F, ...)``.
        x0: Predicted clean latents, same shape.
        step: int64 ``(B, F)``, the 0-based index of the sampling step that each frame makes.
        x_factor, x0_factor: ``(S,)`` from :func:`ddim_coefficients`.
    """
    return per_frame(x_factor, step, x) * x + per_frame(x0_factor, step, x) * x0


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of signal and noise in Eq. 2, to broadcast over ``like``."""
    signal = per_frame(alphas_cumprod.double().sqrt(), timesteps, like)
    sigma = per_frame((1.0 - alphas_cumprod.double()).sqrt(), timesteps, like)
    return signal, sigma


def per_frame(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """``table[index]`` with the dtype of ``like`` and trailing axes of length 1 to broadcast over it."""
    values = table.to(like.device)[index.to(like.device)].to(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
